"""One process of an elastic group: what it refuses, and what it concludes from the store; several in `mp`."""

import logging
import socket
import time

import pytest
import torch

from hardy.clock import VirtualClock
from hardy.config import UserError
from hardy.distributed import elastic
from hardy.distributed.comm import Alone, WorkerLostError
from hardy.distributed.elastic import ExcludedError, Patience, StoreGroup, StoreHost

QUICK = Patience(heartbeat_s=0.02, limit_s=0.2, timeout_s=0.3)
HASTY = Patience(heartbeat_s=0.02, limit_s=0.2, start_s=0.3)
"""For what is expected to fail at the start; elsewhere a name server may need its time."""


@pytest.fixture
def host():
    return StoreHost()


@pytest.fixture
def join(host):
    """Make groups that are left at the end."""
    made = []

    def make(replica=0, **settings):
        settings = {"founders": 1, "fingerprint": "a", "patience": QUICK, **settings}
        made.append(StoreGroup(host.address, replica, **settings))
        return made[-1]

    yield make
    for group in made:
        group.close()


def wait_until(fact, within_s=2.0):
    deadline_s = time.monotonic() + within_s
    while not fact():
        assert time.monotonic() < deadline_s, "it did not come true"
        time.sleep(0.005)


def test_the_groups_are_found_here():
    assert elastic.FixedGroup(Alone()).members == (0,) and elastic.SimGroup and elastic.OuterGroup


def test_a_lone_founder_is_a_group_and_stays_one(join):
    group = join(5)
    assert (group.rank, group.size, group.generation, group.members) == (0, 1, 0, (5,))
    assert group.is_elastic and group.runs_beside and not group.wants_members()
    assert group.sum(torch.ones(2)).tolist() == [1.0, 1.0] and group.bytes_sent == 0
    group.barrier()
    group.reform()
    assert (group.generation, group.members) == (1, (5,))


def test_another_fingerprint_is_refused_and_both_are_named(join):
    join(0, fingerprint="settings 12ab, hardy 0.1.0")
    text = "replica 1 runs with other settings.*theirs is settings 12ab, hardy 0.1.0, ours is settings 34cd"
    with pytest.raises(UserError, match=text) as refusal:
        join(1, fingerprint="settings 34cd")
    assert not isinstance(refusal.value, WorkerLostError)


def test_a_store_that_does_not_answer_says_what_to_check():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    text = f"no answer from the store at {address} within 0.3 s; check that the launcher.*port.*firewall"
    with pytest.raises(WorkerLostError, match=text):
        StoreGroup(address, 0, founders=1, fingerprint="a", patience=HASTY)


def test_founders_that_do_not_come_are_counted(join):
    with pytest.raises(WorkerLostError, match=r"replica 4 waited 20 s for 2 replicas.*1 came: 4.1 \(number"):
        join(4, founders=2, patience=Patience(start_s=20.0), inner=Alone(clock=VirtualClock()))


def test_a_replica_whose_workers_do_not_all_come_says_so(join):
    class FirstOfTwo(Alone):
        size = 2

    inner = FirstOfTwo(clock=VirtualClock())
    with pytest.raises(
        WorkerLostError, match="replica 0 has 2 workers, but not all of them came within 20 s"
    ):
        join(0, inner=inner, patience=Patience(start_s=20.0))


def test_one_that_comes_when_nobody_is_left_is_told_so(join):
    join(0).close()
    with pytest.raises(WorkerLostError, match="replica 1 asked to join, but no member is left: 0.1"):
        join(1)


def test_those_who_left_out_a_replica_tell_it(join, host):
    group = join(0)
    roster = group._roster  # what another member would write
    roster.write_list(1, ["8.1"])
    with pytest.raises(ExcludedError, match="replica 0 was left out of generation 1, whose members are 8.1"):
        group.reform()


def test_without_the_store_a_group_goes_on_but_cannot_change(caplog):
    host = StoreHost()
    group = StoreGroup(host.address, 0, founders=1, fingerprint="a", patience=QUICK)
    del host
    with caplog.at_level(logging.WARNING):
        assert not group.wants_members()
        assert group.sum(torch.ones(1)).item() == 1.0
        with pytest.raises(WorkerLostError, match="check that the launcher which holds it is alive"):
            group.reform()
        group.close()
    assert "cannot see whether a replica asks to join" in caplog.text


def test_one_that_asks_and_dies_costs_a_generation_and_no_more(join, host):
    group, ghost = join(0), roster(host, 1)
    ghost.ask()
    ghost._ended.set()  # as if it were killed
    assert group.wants_members()
    group.reform()
    assert (group.generation, group.members) == (2, (0,))  # the first, with the ghost, could not connect
    assert not group.wants_members()


# ---- What is concluded from signs of life ------------------------------------------------------------------


def roster(host, replica, *, patience=QUICK, clock=None):
    return elastic._Roster(host.address, replica, inner=Alone(clock=clock), patience=patience)


def test_silence_counts_as_death_after_the_limit_and_life_as_life(host):
    mine, other = roster(host, 0), roster(host, 1)
    assert mine.living([other.name, mine.name]) == ["0.1", "1.1"]
    time.sleep(2 * QUICK.limit_s)
    assert mine.living([other.name]) == ["1.1"]
    other._ended.set()  # as if it were killed: no word of farewell
    silent_s = time.monotonic()
    wait_until(lambda: mine.living([other.name]) == [])
    assert time.monotonic() - silent_s > 0.5 * QUICK.limit_s
    assert mine.living([mine.name]) == ["0.1"]
    mine.close()


def test_a_farewell_a_report_and_a_new_start_count_at_once(host):
    calm = Patience(heartbeat_s=0.02, limit_s=1000.0)
    mine = roster(host, 0, patience=calm)
    others = [roster(host, replica, patience=calm) for replica in (1, 2, 3)]
    names = [other.name for other in others]
    assert mine.living(names) == ["1.1", "2.1", "3.1"]
    others[0].close()
    assert mine.living(names) == ["2.1", "3.1"]
    host.report_loss(2)
    assert mine.living(names) == ["3.1"]
    anew = roster(host, 3, patience=calm)
    assert anew.name == "3.2" and mine.living([*names, "3.2"]) == ["3.2"]
    host.report_loss(3)  # of the newer one
    assert mine.living([*names, "3.2"]) == []
    for each in (mine, others[1], others[2], anew):
        each.close()


def test_one_who_was_stopped_itself_accuses_nobody(host):
    clock = VirtualClock()
    slow = Patience(heartbeat_s=30.0, limit_s=100.0)  # the threads do nothing in this test
    mine, other = roster(host, 0, patience=slow, clock=clock), roster(host, 1, patience=slow)
    assert mine.living([other.name]) == ["1.1"]
    mine._look(mine.store)
    clock.sleep(1000.0)  # nobody looked meanwhile, so nobody was seen
    mine._look(mine.store)
    assert mine.living([other.name]) == ["1.1"]
    for _ in range(4):
        clock.sleep(30.0)
        mine._look(mine.store)
    assert mine.living([other.name]) == []
    other._beat(other.store)
    mine._look(mine.store)
    assert mine.living([other.name]) == ["1.1"]
    mine.close()
    other.close()


def test_a_list_is_written_once(host):
    mine, other = roster(host, 10), roster(host, 9)
    assert mine.read_list(3) is None
    mine.write_list(3, ["10.1", "9.1"])
    other.write_list(3, ["9.1"])
    assert mine.read_list(3) == other.read_list(3) == ["9.1", "10.1"]  # by number, not by letters
    mine.close()
    other.close()


def test_those_who_ask_and_live_are_listed_by_number_until_they_are_members(host):
    mine, others = roster(host, 0), [roster(host, replica) for replica in (10, 2)]
    assert mine.asking([]) == []
    for other in others:
        other.ask()
    assert mine.asking([]) == ["2.1", "10.1"] and mine.asking(["2.1"]) == ["10.1"]
    others[0].close()
    assert mine.asking([]) == ["2.1"]
    mine.close()
    others[1].close()


def test_a_group_is_connected_when_all_are_and_not_when_one_gives_up(host):
    mine, other = roster(host, 0), roster(host, 1)
    names = [mine.name, other.name]
    began_s = time.monotonic()
    assert not mine.all_connected(0, names)  # nobody comes
    assert time.monotonic() - began_s > QUICK.timeout_s
    assert other.all_connected(0, names)
    other.say_ready(2)  # could not connect in generation 1
    began_s = time.monotonic()
    assert not mine.all_connected(1, names)
    assert time.monotonic() - began_s < QUICK.timeout_s
    mine.close()
    other.close()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"heartbeat_s": 0.0}, "heartbeat_s must be above 0 and below limit_s, got 0.0 and 10.0"),
        ({"limit_s": 2.0}, "heartbeat_s must be above 0 and below limit_s, got 2.0 and 2.0"),
        ({"timeout_s": 0.0}, "timeout_s must be above 0, got 0.0"),
        ({"start_s": -1.0}, "start_s must be above 0, got -1.0"),
    ],
)
def test_impossible_patience_is_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        Patience(**settings)
