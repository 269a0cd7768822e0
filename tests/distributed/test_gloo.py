"""What belongs to a bare gloo group only; what all promise is in `contracts/test_communicators.py`."""

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from hardy.clock import VirtualClock
from hardy.distributed.comm import PeerLostError, WorkerLostError
from hardy.distributed.gloo import GlooComm


@pytest.fixture
def lone_group(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    group = dist.ProcessGroupGloo(store, 0, 1, timedelta(seconds=10))
    return GlooComm(group, clock=VirtualClock(), whose="a group of one")


def test_a_closed_group_says_so_and_does_not_hang(lone_group):
    assert lone_group.sum(torch.ones(2)).tolist() == [1.0, 1.0]
    lone_group.close()
    text = "worker 0 of a group of one could not finish 'sum'.*strategy.timeout_s.*connections are closed"
    with pytest.raises(WorkerLostError, match=text):
        lone_group.sum(torch.ones(2))


def test_a_collective_that_fails_closes_the_group(lone_group):
    class Broken:
        def broadcast(self, *_arguments):
            raise RuntimeError("Connection reset by peer")

    lone_group._group = Broken()
    with pytest.raises(WorkerLostError, match="'broadcast'.*reset by peer"):
        lone_group.broadcast(torch.ones(2), source=0)
    with pytest.raises(WorkerLostError, match="'barrier'.*connections are closed"):
        lone_group.barrier()
    assert lone_group.bytes_sent == 0


def test_closing_is_noticed_by_one_who_waits_though_posts_to_it_were_not_taken(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 2)
    noticed, comms = [], {}

    def live(rank):
        group = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=20))
        comms[rank] = GlooComm(group, clock=VirtualClock(), whose="two threads")
        del group
        comms[rank].barrier()
        if rank == 0:
            comms[0].post(torch.ones(100_000), to=1, tag=1)
            comms[0].close()
            return
        began_s = time.monotonic()
        with pytest.raises(PeerLostError, match="with worker 0"):
            comms[1].take(torch.ones(1), source=0, tag=2)
        noticed.append(time.monotonic() - began_s)

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert noticed and noticed[0] < 5.0  # of a time-out of 20
