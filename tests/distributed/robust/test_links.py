"""Links of pairs, in threads of one process; several processes in `mp/test_fastest.py`."""

import threading
import time

import pytest
import torch
from torch.distributed import TCPStore

from hardy.clock import WallClock
from hardy.distributed.comm import PeerLostError
from hardy.distributed.robust.links import Links


@pytest.fixture
def store():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def links_of(store, replica, *, shard=0, connect_s=5.0, timeout_s=5.0):
    client = TCPStore("127.0.0.1", store.port, is_master=False)
    return Links(client, replica, shard=shard, clock=WallClock(), connect_s=connect_s, timeout_s=timeout_s)


def together(*bodies):
    """Run bodies in threads; return what they return, raise what they raise."""
    results, errors = [None] * len(bodies), []

    def run(place, body):
        try:
            results[place] = body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(bodies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
        assert not thread.is_alive(), "it hangs"
    if errors:
        raise errors[0]
    return results


def opened(store, members, *, meeting=1, **settings):
    made = [links_of(store, replica, **settings) for replica in members]
    together(*[lambda each=each: each.open(members, meeting=meeting) for each in made])
    return made


def test_three_find_each_other_and_exchange_by_tags(store):
    members = {0: 1, 3: 1, 5: 2}
    first, second, third = opened(store, members)
    first.post(torch.arange(3.0), to=3, tag=7)
    first.post(torch.arange(2), to=3, tag=8)
    third.post(torch.full((2, 2), 5.0, dtype=torch.float64), to=3, tag=7)
    assert second.take(torch.empty(2, dtype=torch.int64), source=0, tag=8).tolist() == [0, 1]
    assert second.take(torch.empty(3), source=0, tag=7).tolist() == [0.0, 1.0, 2.0]
    assert second.take(torch.empty(2, 2, dtype=torch.float64), source=5, tag=7).tolist() == [[5.0] * 2] * 2
    first.finish_posts()


def test_links_are_kept_from_meeting_to_meeting(store):
    members = {0: 1, 1: 1}
    first, second = opened(store, members)
    link = first._open[1]
    together(lambda: first.open(members, meeting=2), lambda: second.open(members, meeting=3))
    assert first._open[1] is link


def test_one_that_begins_anew_gets_a_new_link(store):
    first, _ = opened(store, {0: 1, 1: 1})
    again = links_of(store, 1)
    members = {0: 1, 1: 2}
    together(lambda: first.open(members, meeting=4), lambda: again.open(members, meeting=4))
    again.post(torch.ones(1), to=0, tag=1)
    assert first.take(torch.empty(1), source=1, tag=1).item() == 1.0


def test_a_dropped_link_is_noticed_at_once_and_costs_no_other(store):
    first, second, third = opened(store, {0: 1, 1: 1, 2: 1}, timeout_s=20.0)
    began_s = time.monotonic()

    def wait():
        with pytest.raises(PeerLostError, match="replica 0 could not exchange with replica 1") as error:
            first.take(torch.empty(1), source=1, tag=1)
        return error.value.peer

    def leave():
        time.sleep(0.2)
        second.drop(0)

    assert together(wait, leave)[0] == 1
    assert time.monotonic() - began_s < 5.0
    third.post(torch.ones(1), to=0, tag=1)
    assert first.take(torch.empty(1), source=2, tag=1).item() == 1.0
    third.post(torch.ones(1), to=1, tag=1)
    assert second.take(torch.empty(1), source=2, tag=1).item() == 1.0
    members = {0: 1, 1: 1}
    first.drop(1)
    together(lambda: first.open(members, meeting=9), lambda: second.open(members, meeting=9))
    first.post(torch.ones(1), to=1, tag=1)
    assert second.take(torch.empty(1), source=0, tag=1).item() == 1.0


def test_a_time_out_costs_one_link_alone(store):
    first, second, third = opened(store, {0: 1, 1: 1, 2: 1}, timeout_s=0.3)
    with pytest.raises(PeerLostError) as error:
        first.take(torch.empty(1), source=1, tag=1)
    assert error.value.peer == 1
    third.post(torch.ones(1), to=0, tag=1)
    assert first.take(torch.empty(1), source=2, tag=1).item() == 1.0
    assert second is not None


def test_one_that_does_not_come_is_waited_for_a_little(store):
    alone = links_of(store, 0, connect_s=0.2)
    began_s = time.monotonic()
    with pytest.raises(PeerLostError, match="replica 0 could not exchange with replica 4") as error:
        alone.open({0: 1, 4: 1}, meeting=1)
    assert error.value.peer == 4 and 0.1 < time.monotonic() - began_s < 3.0


def test_shards_find_those_with_their_place(store):
    members = {0: 1, 1: 1}
    made = [(links_of(store, replica, shard=shard), replica, shard) for replica in (0, 1) for shard in (0, 1)]
    together(*[lambda each=each: each.open(members, meeting=1) for each, _, _ in made])
    for each, replica, shard in made:
        each.post(torch.tensor(10 * replica + shard), to=1 - replica, tag=0)
    for each, replica, shard in made:
        assert each.take(torch.tensor(0), source=1 - replica, tag=0).item() == 10 * (1 - replica) + shard


def test_without_a_link_nothing_is_sent(store):
    alone = links_of(store, 0)
    for act in (
        lambda: alone.post(torch.ones(1), to=1, tag=0),
        lambda: alone.take(torch.ones(1), source=1, tag=0),
    ):
        with pytest.raises(PeerLostError, match="there is no link to it"):
            act()
    alone.finish_posts()
    alone.close()
