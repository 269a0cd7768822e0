"""The workers of one replica during an attempt: who gives up stops all, wherever they are."""

import pytest
import torch

from hardy.distributed.comm import PeerLostError, WorkerLostError
from hardy.distributed.robust.inside import Inside, StoppedError, whom_lost
from hardy.distributed.simulation import SimWorld


def test_while_nobody_gives_up_it_is_the_communicator_that_it_is_made_of():
    def body(comm):
        inside = Inside(comm)
        x = torch.tensor([[1.0, 2.0], [4.0, 8.0]]) * (comm.rank + 1)
        inside.barrier()
        assert (inside.rank, inside.size, inside.clock) == (comm.rank, 2, comm.clock)
        assert torch.equal(inside.sum(x), comm.sum(x)) and torch.equal(inside.mean(x), comm.mean(x))
        assert torch.equal(inside.all_gather(x), comm.all_gather(x))
        assert torch.equal(inside.all_to_all(x), comm.all_to_all(x))
        assert torch.equal(inside.broadcast(x, source=1), comm.broadcast(x, source=1))
        assert inside.bytes_sent == comm.bytes_sent > 0
        return whom_lost(comm, None)

    assert SimWorld(2).run(body) == [None, None]


def test_sums_are_added_in_rank_order():
    parts = torch.tensor([1e16, 1.0, -1e16, 1.0], dtype=torch.float64)
    found = SimWorld(4).run(lambda comm: Inside(comm).sum(parts[comm.rank]).item())
    assert found == [1.0] * 4  # 2.0 in another order


@pytest.mark.parametrize(
    ("error", "peer"), [(PeerLostError("gone", peer=4), 4), (WorkerLostError("gone"), -1)]
)
@pytest.mark.parametrize("call", ["sum", "all_to_all", "barrier"])
def test_where_one_gives_up_the_others_stop_at_their_next_call_and_know_whom_it_lost(call, error, peer):
    def body(comm):
        if comm.rank == 1:
            return whom_lost(comm, error)
        with pytest.raises(StoppedError, match="another worker of this replica could not finish") as stopped:
            getattr(Inside(comm), call)(*([] if call == "barrier" else [torch.zeros(3)]))
        return whom_lost(comm, stopped.value)  # asks nobody: they have answered

    assert SimWorld(3).run(body) == [peer] * 3
