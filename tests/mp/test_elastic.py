"""Replicas as real processes that are killed, stopped and begun anew: `StoreGroup`."""

import multiprocessing
import os
import signal
import time
import traceback
import warnings

import pytest
import torch

from hardy.distributed.comm import WorkerLostError, join_world
from hardy.distributed.elastic import ExcludedError, Patience, StoreGroup, StoreHost
from hardy.distributed.store import connect_store

pytestmark = pytest.mark.mp

QUICK = Patience(heartbeat_s=0.1, limit_s=0.6, timeout_s=1.5)
"""For a replica that falls silent."""
CALM = Patience(heartbeat_s=0.1, limit_s=30.0, timeout_s=20.0)
"""Where the end of a process must be noticed by other means than silence."""


class Replicas:
    """Processes that run `body(group, tell, told)`; what they `tell`, the test hears."""

    def __init__(self):
        self.context = multiprocessing.get_context("fork")
        self.processes, self.pipes = {}, {}
        # The store has a process of its own, so that no replica is forked beside its threads.
        self._fork("store", _hold_store, ())
        self.address = self.hear("store")

    def _fork(self, name, work, arguments):
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=work, args=(theirs, *arguments), daemon=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*multi-threaded", category=DeprecationWarning)
            process.start()
        theirs.close()
        self.processes[name], self.pipes[name] = process, ours

    def start(self, body, number, *, name=None, world=None, **settings):
        settings = {"founders": 3, "fingerprint": "a", "patience": CALM, **settings}
        self._fork(number if name is None else name, _live, (body, self.address, number, world, settings))

    def hear(self, name, *, within_s=20.0):
        assert self.pipes[name].poll(within_s), f"{name} said nothing for {within_s} s"
        word = self.pipes[name].recv()
        assert not isinstance(word, BaseException), f"{name}: {word}"
        return word

    def say(self, word, *names):
        for name in names:
            self.pipes[name].send(word)

    def signal(self, which, *names):
        for name in names:
            os.kill(self.processes[name].pid, which)

    def report_loss(self, number):
        self.say(number, "store")
        assert self.hear("store") == number

    def end(self):
        for process in self.processes.values():
            if process.is_alive():
                process.kill()
            process.join()


def _hold_store(pipe):
    host = StoreHost()
    pipe.send(host.address)
    while True:
        number = pipe.recv()
        host.report_loss(number)
        pipe.send(number)


def _live(pipe, body, address, number, world, settings):
    torch.set_num_threads(1)
    try:
        inner = None if world is None else join_world(device_type="cpu", **world)
        group = StoreGroup(address, number, inner=inner, **settings)
        body(group, pipe.send, pipe.recv)
        group.close()
    except BaseException as error:
        pipe.send(AssertionError("".join(traceback.format_exception(error))))


@pytest.fixture
def replicas():
    if torch.cuda.is_available():
        pytest.skip("forked workers need the GPU hidden: CUDA_VISIBLE_DEVICES= pytest tests/mp")
    made = Replicas()
    yield made
    made.end()


def rounds(group, tell, told):
    """Meet, or let others in, whenever told to; after a loss do the same again in the next group."""
    tell((group.generation, group.members))
    while (word := told()) != "end":
        while True:
            try:
                if word == "admit" and group.mean(torch.tensor(float(group.wants_members()))) == 1:
                    group.reform()
                total = group.sum(torch.ones(1000)) if word == "meet" else None
                break
            except WorkerLostError:
                try:
                    group.reform()
                except ExcludedError as error:
                    tell(str(error))
                    return
        tell((group.generation, group.members) + (() if total is None else (set(total.tolist()),)))
    group.barrier()


def test_the_others_go_on_without_a_killed_replica_and_take_in_those_that_come(replicas):
    for number in range(4):
        replicas.start(rounds, number, founders=4)
    assert [replicas.hear(number) for number in range(4)] == [(0, (0, 1, 2, 3))] * 4
    replicas.say("meet", 0, 1, 2)
    time.sleep(0.2)  # they wait for replica 3 in the middle of the sum
    killed_s = time.monotonic()
    replicas.signal(signal.SIGKILL, 3)
    replicas.processes[3].join()
    replicas.report_loss(3)
    assert [replicas.hear(number) for number in range(3)] == [(1, (0, 1, 2), {3.0})] * 3
    assert time.monotonic() - killed_s < 5.0  # neither the limit nor the time-out of `CALM` was waited for
    inside = [0, 1, 2]
    for comes in (3, 7):  # one begins anew under its old number, one is new
        replicas.start(rounds, comes)
        while not replicas.pipes[comes].poll(0.02):
            replicas.say("admit", *inside)
            answers = {replicas.hear(number) for number in inside}
            assert len(answers) == 1
        inside.append(comes)
        assert {replicas.hear(comes)} == answers == {(len(inside) - 2, tuple(inside))}
        replicas.say("meet", *inside)
        for number in inside:
            assert replicas.hear(number)[2] == {float(len(inside))}
    replicas.say("end", *inside)
    for number in inside:
        replicas.processes[number].join(5)
        assert replicas.processes[number].exitcode == 0


def test_a_stopped_replica_is_dropped_after_the_time_out_and_told_so_when_it_wakes(replicas):
    for number in range(3):
        replicas.start(rounds, number, patience=QUICK)
    for number in range(3):
        replicas.hear(number)
    replicas.signal(signal.SIGSTOP, 0)  # the lowest, which would have decided
    replicas.say("meet", 0, 1, 2)
    assert [replicas.hear(number) for number in (1, 2)] == [(1, (1, 2), {2.0})] * 2
    replicas.signal(signal.SIGCONT, 0)
    text = replicas.hear(0)
    assert text.startswith(
        "replica 0 was left out of generation 1, whose members are 1.1, 2.1 (number.start)"
    )


def test_a_killed_replica_that_nobody_reports_is_dropped_when_it_was_silent_for_the_limit(replicas):
    for number in range(2):
        replicas.start(rounds, number, founders=2, patience=QUICK)
    for number in range(2):
        replicas.hear(number)
    replicas.signal(signal.SIGKILL, 1)
    replicas.say("meet", 0)
    assert replicas.hear(0) == (1, (0,), {1.0})


def test_one_that_reforms_for_reasons_of_its_own_frees_those_who_wait_for_it(replicas):
    """Its other workers lost someone, say; the others are in the middle of a sum."""

    def body(group, tell, told):
        tell(group.members)
        if group.rank == 2:
            time.sleep(0.3)
        else:
            with pytest.raises(
                WorkerLostError, match="of generation 0 could not finish 'sum' with the others"
            ):
                group.sum(torch.ones(1))
        group.reform()
        tell((group.generation, group.members))
        told()

    for number in range(3):
        replicas.start(body, number)
    assert [replicas.hear(number) for number in range(3)] == [(0, 1, 2)] * 3
    began_s = time.monotonic()
    assert [replicas.hear(number) for number in range(3)] == [(1, (0, 1, 2))] * 3
    assert time.monotonic() - began_s < 5.0  # of a time-out of 20


def slow_rounds(group, tell, told):
    """Come to the second round later than the others' time-out, as a busy or a hanging replica."""
    tell((group.generation, group.members))
    group.barrier()
    if group.members[group.rank] == 1:
        time.sleep(1.8)
    try:
        group.barrier()
    except WorkerLostError:
        try:
            group.reform()
        except ExcludedError as error:
            tell(str(error))
            return
    tell((group.generation, group.members, group.sum(torch.ones(1)).item()))


@pytest.mark.parametrize("busy_s", [60.0, 0.3])
def test_a_busy_replica_is_waited_for_after_the_time_out_but_not_for_ever(replicas, busy_s):
    patience = Patience(heartbeat_s=0.1, limit_s=30.0, timeout_s=0.7, busy_s=busy_s)
    for number in range(3):
        replicas.start(slow_rounds, number, patience=patience)
    assert [replicas.hear(number) for number in range(3)] == [(0, (0, 1, 2))] * 3
    last = [replicas.hear(number) for number in range(3)]
    if busy_s == 60.0:
        assert last == [(1, (0, 1, 2), 3.0)] * 3
    else:
        assert last[0] == last[2] == (1, (0, 2), 2.0)
        assert last[1].startswith("replica 1 was left out of generation 1")


def test_replicas_of_two_workers_agree_on_one_list(replicas, tmp_path):
    for number in range(3):
        for shard, name in enumerate((number, f"{number}.1")):
            world = {"rank": shard, "size": 2, "init_method": f"file://{tmp_path}/{number}"}
            replicas.start(rounds, number, name=name, world=world)
    assert {replicas.hear(name) for name in (0, "0.1", 1, "1.1", 2, "2.1")} == {(0, (0, 1, 2))}
    replicas.signal(signal.SIGKILL, 1, "1.1")
    replicas.report_loss(1)
    left = (0, "0.1", 2, "2.1")
    replicas.say("meet", *left)
    assert [replicas.hear(name) for name in left] == [(1, (0, 2), {2.0})] * 4


def test_all_workers_of_a_replica_see_alike_whether_another_asks_to_join(replicas, tmp_path):
    def look(group, tell, told):
        tell(group.members)
        if told() == "now":
            tell(group.wants_members())
        told()

    for shard, name in enumerate(("0.0", "0.1")):
        world = {"rank": shard, "size": 2, "init_method": f"file://{tmp_path}/0"}
        replicas.start(look, 0, name=name, world=world, founders=1)
    assert [replicas.hear(name) for name in ("0.0", "0.1")] == [(0,)] * 2
    replicas.say("now", "0.1")  # it looks before the other asks, the first worker after that
    time.sleep(0.2)
    for shard, name in enumerate(("1.0", "1.1")):
        world = {"rank": shard, "size": 2, "init_method": f"file://{tmp_path}/1"}
        replicas.start(look, 1, name=name, world=world, founders=1)
    store = connect_store(replicas.address, timeout_s=20.0)
    deadline_s = time.monotonic() + 20.0
    while store.add("num_asks", 0) < 2:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    time.sleep(0.1)  # until the ask is there that was counted
    replicas.say("now", "0.0")
    assert [replicas.hear(name) for name in ("0.0", "0.1")] == [True, True]


def test_another_fingerprint_is_refused_in_every_process(replicas):
    replicas.start(rounds, 0, founders=1)
    replicas.hear(0)
    replicas.start(rounds, 1, founders=1, fingerprint="settings b")
    with pytest.raises(AssertionError, match="replica 1 runs with other.*theirs is a, ours is settings b"):
        replicas.hear(1)
