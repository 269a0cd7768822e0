"""Where shards lie and what workers exchange; simulated by threads, real processes are in tests/mp."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardPlacement

from hardy.optim import _sharded
from hardy.optim._sharded import (
    Gather,
    Round,
    Scatter,
    Split,
    Sum,
    exchange,
    gather_whole,
    laid_out,
    local_part,
    own_columns,
    shard_of,
    units_of,
)


def split_of(rank, size):
    mesh = SimpleNamespace(size=lambda _: size, get_local_rank=lambda _: rank)
    return Split(0, mesh, 0)


def one_group(split):
    return "group"


class Ring:
    """Collectives between threads: each sees all workers' tensors once all have come."""

    def __init__(self, size, monkeypatch):
        self.size, self.barrier, self.brought, self.calls = size, threading.Barrier(size), {}, []
        self.me = threading.local()
        for owner, name, collective in (
            (_sharded.dist, "all_reduce", self.all_reduce),
            (_sharded, "reduce_scatter_single", lambda: self.reduce_scatter),
            (_sharded, "all_gather_single", lambda: self.all_gather),
        ):
            monkeypatch.setattr(owner, name, collective)

    def run(self, body):
        def work(rank):
            self.me.rank = rank
            return body(rank)

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(work, range(self.size)))

    def meet(self, tensor, name):
        self.barrier.wait()
        self.brought[self.me.rank] = tensor.clone()
        if self.me.rank == 0:
            self.calls.append(name)
        self.barrier.wait()
        return [self.brought[rank] for rank in range(self.size)]

    def all_reduce(self, tensor, group):
        tensor.copy_(sum(self.meet(tensor, "all_reduce")))

    def reduce_scatter(self, out, sent, group):
        total = sum(self.meet(sent, "reduce_scatter"))
        out.copy_(total.view(self.size, -1)[self.me.rank])

    def all_gather(self, out, sent, group):
        out.copy_(torch.cat(self.meet(sent, "all_gather")))


@pytest.mark.parametrize("num_columns", [1, 2, 3, 7, 9])
def test_columns_are_cut_as_torch_chunks_them(num_columns):
    cuts = [own_columns(num_columns, split_of(rank, 3)) for rank in range(3)]
    chunks = torch.arange(num_columns).chunk(3)
    for rank, (begin, end) in enumerate(cuts):
        mine = chunks[rank].tolist() if rank < len(chunks) else []
        assert list(range(begin, end)) == mine
    assert own_columns(num_columns, None) == (0, num_columns)


@pytest.mark.parametrize("sizes", [(7, 2), (3, 9), (1, 1)], ids=str)
def test_one_exchange_scatters_sums_and_gathers(monkeypatch, sizes):
    """Uneven and empty parts, two requests of each kind, sums of two dtypes."""
    generator = torch.Generator().manual_seed(0)
    parts = [[torch.randn(2, columns, generator=generator) for columns in sizes] for _ in range(3)]
    ring = Ring(3, monkeypatch)

    def body(rank):
        split = split_of(rank, 3)
        scatters = [Scatter(part, split) for part in parts[rank]]
        sums = [torch.full((2, 2), float(rank)), torch.tensor(rank, dtype=torch.float64)]
        riding = [Sum(x, (split,)) for x in sums]
        rounds = [Round(scatters=scatters[:1]), Round(sums=riding, scatters=scatters[1:])]
        exchange(rounds, group_of=one_group)
        gathers = [Gather(s.result, columns, split) for s, columns in zip(scatters, sizes, strict=True)]
        exchange([Round(gathers=gathers)], group_of=one_group)
        return [s.result for s in scatters], [g.result for g in gathers], sums

    results = ring.run(body)
    for place, columns in enumerate(sizes):
        total = sum(part[place] for part in parts)
        for rank, (scattered, gathered, sums) in enumerate(results):
            begin, end = own_columns(columns, split_of(rank, 3))
            torch.testing.assert_close(scattered[place], total[:, begin:end])
            assert scattered[place].is_contiguous()
            torch.testing.assert_close(gathered[place], total)
            assert (sums[0] == 3.0).all() and sums[1] == 3.0
    # The sum of another dtype cannot ride along.
    assert ring.calls == ["reduce_scatter", "all_reduce", "all_gather"]


def test_sums_alone_are_one_call(monkeypatch):
    ring = Ring(2, monkeypatch)

    def body(rank):
        sums = [torch.ones(3) * rank, torch.ones(()), torch.ones(2, 2)]
        exchange([Round(sums=[Sum(x, (split_of(rank, 2),))]) for x in sums], group_of=one_group)
        return sums

    for sums in ring.run(body):
        assert [x.sum().item() for x in sums] == [3.0, 2.0, 8.0]
    assert ring.calls == ["all_reduce"]


def test_without_an_axis_nothing_is_exchanged():
    part, whole, total = torch.ones(2, 3), torch.ones(2, 3), torch.ones(4)
    scatter, gather = Scatter(part, None), Gather(whole, 3, None)
    exchange([Round(sums=[Sum(total, ())], scatters=[scatter], gathers=[gather])], group_of=None)
    assert scatter.result is part and gather.result is whole and (total == 1).all()


def test_a_plain_tensor_is_its_own_shard():
    param = nn.Parameter(torch.ones(3, 4))
    shard = shard_of(param, "w")
    assert (shard.shape, shard.offset, shard.local_shape, shard.splits) == ((3, 4), (0, 0), (3, 4), ())
    state = torch.zeros(3)
    assert shard.wrap(state, (3,), {0: 0}) is state
    assert local_part(param) is param and gather_whole(state) is state and laid_out(state, shard) is state


def test_state_of_a_sharded_parameter_is_sharded_with_it(mesh_of_one):
    param = nn.Parameter(distribute_tensor(torch.randn(5, 4), mesh_of_one, [ShardPlacement(0)]))
    shard = shard_of(param, "w")
    assert [(split.dim, split.size, split.rank) for split in shard.splits_of(0)] == [(0, 1, 0)]
    assert shard.splits_of(1) == ()
    moment = shard.wrap(torch.zeros(2, 5), (2, 5), {0: 1})
    assert isinstance(moment, DTensor) and moment.placements == (ShardPlacement(1),)
    plain = torch.zeros(7)
    assert shard.wrap(plain, (7,), {1: 0}) is plain
    grad = distribute_tensor(torch.randn(5, 4), mesh_of_one, [Replicate()])
    assert laid_out(grad, shard).placements == (ShardPlacement(0),)
    assert torch.equal(gather_whole(grad), local_part(grad))


def test_a_partial_sum_is_no_parameter(mesh_of_one):
    param = DTensor.from_local(torch.ones(3), mesh_of_one, [Partial()])
    with pytest.raises(ValueError, match=r"parameter layers\.0\.w is a partial sum over workers"):
        shard_of(param, "layers.0.w")


def test_plain_parameters_are_units_of_their_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    params = list(model.parameters())
    assert units_of(model, params) == [[param] for param in params]
    assert units_of(model, params[1:3]) == [[param] for param in params[1:3]]
