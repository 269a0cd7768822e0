"""What belongs to one world only; what all promise is in `contracts/test_communicators.py`."""

import socket
import weakref

import pytest
import torch
import torch.distributed as dist

from hardy.clock import VirtualClock
from hardy.distributed.comm import (
    Alone,
    Outbox,
    PeerLostError,
    TorchComm,
    WorkerLostError,
    join_world,
    leave_world,
    lost_peer,
    own_group,
)


@pytest.fixture
def lone_process(tmp_path):
    yield join_world(rank=0, size=1, init_method=f"file://{tmp_path}/store", device_type="cpu", timeout_s=10)
    leave_world()


def test_alone_takes_the_clock_it_is_given():
    clock = VirtualClock(5.0)
    assert Alone(clock=clock).clock.now() == 5.0


def test_leaving_twice_is_harmless(lone_process):
    leave_world()
    leave_world()
    assert not dist.is_initialized()


def test_a_failing_collective_says_what_to_do(lone_process, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(dist, "all_reduce", fail)
    text = "worker 0 of 1 could not finish 'sum'.*`hardy resume`.*reset by peer"
    with pytest.raises(WorkerLostError, match=text):
        lone_process.sum(torch.ones(2))
    assert lone_process.bytes_sent == 0


def test_workers_that_do_not_come_are_named():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(WorkerLostError, match="worker 0 of 2 did not meet the others at tcp.* within 0.3 s"):
        join_world(rank=0, size=2, init_method=address, device_type="cpu", timeout_s=0.3)
    leave_world()


def test_a_group_counts_its_own_ranks(lone_process):
    comm = TorchComm(dist.new_group([0]), clock=VirtualClock())
    assert (comm.rank, comm.size, comm.clock.now()) == (0, 1, 0.0)
    assert comm.broadcast(torch.ones(1), source=0).item() == 1.0


def test_groups_keep_the_clock_and_the_patience_of_their_world(lone_process):
    clock = VirtualClock()
    comm = TorchComm(clock=clock, timeout_s=7.0)
    part = comm.divide([[0]])
    assert part.clock is clock and part.timeout_s == 7.0 and lone_process.timeout_s == 10
    assert part.group is not None and (part.rank, part.size) == (0, 1)
    assert part.divide([[0]]).sum(torch.ones(2)).tolist() == [1.0, 1.0]
    assert Alone(clock=clock).divide([[0]]).clock is clock


@pytest.mark.parametrize("groups", [[[0], [0, 1, 2]], [[0], [2]], [[0, 1, 2, 3]], []])
def test_groups_that_do_not_hold_each_worker_once_are_refused(groups):
    with pytest.raises(ValueError, match="groups must hold each rank from 0 to 2 exactly once, got"):
        own_group(groups, rank=0, num_workers=3)


class Handle:
    """The handle of a post that may fail."""

    def __init__(self, done, text=None):
        self.done, self.text = done, text

    def wait(self):
        self.done.append(self)
        if self.text:
            raise RuntimeError(self.text)


def test_an_outbox_keeps_tensor_and_handle_until_they_were_waited_for():
    outbox, done = Outbox(), []
    handles = [Handle(done) for _ in range(4)]
    kept = [weakref.ref(handle) for handle in handles]
    for to, handle in enumerate(handles):
        outbox.add(to, torch.zeros(1), handle)
    outbox.finish(keep_last=3, lost=None)
    assert done == handles[:1]
    outbox.finish(keep_last=1, lost=None)
    assert done == handles[:3]
    done.clear(), handles.clear()
    del handle
    assert [ref() is None for ref in kept] == [True, True, True, False]


def test_a_failed_post_is_forgotten_and_the_others_are_kept(lone_process):
    outbox, done = Outbox(), []
    for to, text in enumerate((None, "Connection closed by peer", None)):
        outbox.add(to, torch.zeros(1), Handle(done, text))
    with pytest.raises(PeerLostError, match="a message with worker 1: it died.*closed by peer") as loss:
        outbox.finish(keep_last=0, lost=lambda to, error: lost_peer(lone_process, to, error))
    assert loss.value.peer == 1 and len(done) == 2
    outbox.finish(keep_last=0, lost=None)
    assert len(done) == 3
