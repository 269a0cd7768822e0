"""Real processes that die or fall silent, and what they exchange in few bytes."""

import os

import pytest
import torch

from hardy.distributed.comm import PeerLostError, TorchComm, WorkerLostError
from hardy.distributed.groups import split
from hardy.distributed.local.compression import BF16, Full, Int8, TopK
from hardy.distributed.simulation import SimWorld
from hardy.rng import generator_for

pytestmark = pytest.mark.mp


def test_the_death_of_a_worker_is_told_to_the_others(run_workers):
    def body(comm: TorchComm):
        comm.barrier()
        if comm.rank == 1:
            os._exit(1)
        with pytest.raises(WorkerLostError) as loss:
            for _ in range(100):
                comm.sum(torch.ones(1000))
        return str(loss.value)

    (text,) = run_workers(body, may_die=(1,))
    assert text.startswith("worker 0 of 2 could not finish 'sum' with the others: one of them died")


def test_a_silent_worker_runs_into_the_time_out(run_workers):
    def body(comm: TorchComm):
        if comm.rank == 1:
            comm.clock.sleep(60)
        with pytest.raises(WorkerLostError, match="came later than the time-out"):
            comm.all_gather(torch.ones(2))
        return "told"

    assert run_workers(body, timeout_s=1.5, may_die=(1,)) == ["told"]


def test_the_groups_of_a_world_keep_its_time_out(run_workers):
    def body(comm: TorchComm):
        grid = split(comm, replicas=2, shards=1)
        if comm.rank == 1:
            comm.clock.sleep(60)
        with pytest.raises(WorkerLostError, match="worker 0 of 2 could not finish 'sum'"):
            grid.outer.sum(torch.ones(2))
        return grid.inner.sum(torch.ones(2)).tolist()  # the others' loss is none of its business

    assert run_workers(body, timeout_s=1.5, may_die=(1,)) == [[1.0, 1.0]]


def test_replicas_that_are_rows_of_a_grid_add_up_columns_only(run_workers):
    def body(comm: TorchComm):
        grid = split(comm, replicas=2, shards=2)
        row, column = (group.sum(torch.tensor(1 << comm.rank)) for group in (grid.inner, grid.outer))
        return int(row), int(column), int(grid.outer.sum(row)), (grid.replica, grid.shard)

    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert run_workers(body, size=4) == [(3 if r == 0 else 12, 5 << s, 15, (r, s)) for r, s in places]


def test_a_killed_peer_fails_only_the_messages_with_it(run_workers):
    def body(comm: TorchComm):
        last = comm.size - 1
        if comm.rank == last:
            comm.post(torch.tensor(1.0), to=0, tag=0)
            comm.finish_posts()
            os._exit(1)
        if comm.rank == 0:
            assert comm.take(torch.tensor(0.0), source=last, tag=0).item() == 1.0
        with pytest.raises(PeerLostError, match=f"a message with worker {last}: it died") as loss:
            comm.take(torch.tensor(0.0), source=last, tag=1)
        other, x = 1 - comm.rank, torch.full((100_000,), float(comm.rank))
        for tag in range(3):
            comm.post(x, to=other, tag=tag)
        got = [comm.take(torch.empty(100_000), source=other, tag=tag)[-1].item() for tag in (2, 0, 1)]
        comm.finish_posts()
        return loss.value.peer, got

    assert run_workers(body, size=3, may_die=(2,)) == [(2, [1.0] * 3), (2, [0.0] * 3)]


def exchanges(comm):
    """Sums in every format, of units of many sizes; one replica is left out with NaN."""
    sums = []
    for part in (Full(), BF16(), Int8(block=100), TopK(density=0.1)):
        for unit, n in enumerate((0, 1, 5, 1000, 4097)):
            x_n = torch.randn(n, generator=generator_for(0, "x", comm.rank, n))
            if comm.rank == 1 and unit > 2:
                x_n = torch.full_like(x_n, float("nan"))
            weight = torch.tensor(0.0 if comm.rank == 1 and unit > 2 else 0.4, dtype=torch.float64)
            for _ in range(2):
                sums.append(part.weighted_sum(comm, x_n, weight, unit))
                part.commit()
    return sums, comm.bytes_sent


def test_compressed_sums_have_equal_bits_on_all_and_are_those_of_the_simulated_world(run_workers):
    answers, simulated = run_workers(exchanges, size=3), SimWorld(3).run(exchanges)
    for sums, sent in answers:
        assert all(torch.equal(a, b) for a, b in zip(sums, answers[0][0], strict=True))
        assert sent == simulated[0][1]
    for got, want in zip(answers[0][0], simulated[0][0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # gloo adds fp32 in another order
