"""Robust rules on real workers: between FSDP2 replicas, inside one group, as DDP's hook; all as dense."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from hardy.config import ConfigError
from hardy.distributed.aggregation import build_aggregator
from hardy.distributed.build import Trained, build_strategy
from hardy.distributed.comm import Alone
from hardy.distributed.groups import Grid, split
from hardy.distributed.robust.config import AttackConfig, DStarConfig, RobustConfig
from hardy.distributed.sharded import parallelize

UNITS = ["body.0", "body.1", "body.2"]
STEPS = 3


class Net(nn.Module):
    """Odd sizes, so that shards are uneven and some are empty."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(5, 7)
        self.body = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7, bias=False), nn.Linear(7, 3))
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=generator) * 0.4

    def forward(self, x):
        return self.body(torch.tanh(self.first(x)))


def loss_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, wanted = torch.randn(6, 5, generator=generator), torch.randn(6, 3, generator=generator)
    return (model(inputs) - wanted).square().mean()


def vector_of(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def dense(config, *, workers, bad=None):
    """Return the weights after some steps on whole stacks of gradients, in one process."""
    model, weights = Net(), []
    rule = build_aggregator(config.rule, num_faulty=config.f, pre=config.pre, history=config.history)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        rows = []
        for worker in range(workers):
            grads = torch.autograd.grad(loss_of(model, 100 * step + worker), list(model.parameters()))
            rows.append(vector_of(grads) * (1.0 if worker != bad else math.nan))
        (vector,) = rule([torch.stack(rows)]).vectors
        for param, part in zip(
            model.parameters(), vector.split([p.numel() for p in model.parameters()]), strict=True
        ):
            param.grad = part.view_as(param).clone()
        optimizer.step()
        weights.append(vector_of(p.detach() for p in model.parameters()))
    return weights[-1]


def trained(comm, config, *, replicas, bad=None, wrap="fsdp"):
    """Return the weights after some steps; worker number `bad` has NaNs for a gradient."""
    if config.worker == "replica":
        grid = split(comm, replicas=replicas, shards=comm.size // replicas)
        shards, inner, number = grid.shards, grid.inner, grid.replica
    else:
        inner, number = comm, comm.rank
        shards = comm.size if wrap == "fsdp" else 1
        grid = Grid(inner=comm, outer=Alone(), replica=0, replicas=1, shard=comm.rank, shards=comm.size)
    model = parallelize(
        Net(),
        inner,
        replicas=inner.size // shards,
        shards=shards,
        unit_names=UNITS,
        device_type="cpu",
        precision="fp32",
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def draw_trusted(draw):
        loss_of(model, 10**6 + draw).backward()

    strategy = build_strategy(
        config,
        Trained(
            model=model,
            optimizer=optimizer,
            unit_names=UNITS,
            comm=comm,
            grid=grid,
            draw_trusted=draw_trusted,
        ),
    )
    for step in range(STEPS):
        strategy.before_forward()
        (loss_of(model, 100 * step + number) * (1.0 if number != bad else math.nan)).backward()
        strategy.reduce_gradients()
        optimizer.step()
        strategy.after_step()
        optimizer.zero_grad()
        report = strategy.take_report()
        assert bad is None or bad in report["removed_workers"]
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return vector_of(p.detach() for p in full)


RULES = {
    "median": RobustConfig(rule="median", f=1, pre=()),
    "nnm": RobustConfig(rule="trimmed_mean", f=1, pre=("nnm",)),
    "multi_krum": RobustConfig(rule="multi_krum", f=0, pre=()),
    "history": RobustConfig(rule="mda", f=1, pre=("arc",), history=0.9),
}


def as_ranks(config):
    return replace(config, worker="rank")


def assert_all_equal(found, expected):
    for weights in found:
        assert torch.equal(weights, found[0])
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["nnm", "median", "history"])
def test_between_replicas_that_are_sharded_the_rule_is_that_of_the_whole_stack(name, run_workers):
    config = RULES[name]
    found = run_workers(lambda comm: trained(comm, config, replicas=3, bad=1), size=6)
    assert_all_equal(found, dense(config, workers=3, bad=1))


@pytest.mark.parametrize("wrap", ["fsdp", "ddp"])
@pytest.mark.parametrize("name", list(RULES))
def test_inside_one_group_the_rule_is_that_of_the_whole_stack(name, wrap, run_workers):
    config = as_ranks(RULES[name])
    found = run_workers(lambda comm: trained(comm, config, replicas=1, wrap=wrap), size=3)
    assert_all_equal(found, dense(config, workers=3))


@pytest.mark.parametrize("wrap", ["fsdp", "ddp"])
@pytest.mark.parametrize("name", ["median", "nnm"])
def test_inside_one_group_a_rank_with_nan_is_left_out(name, wrap, run_workers):
    config = as_ranks(RULES[name])
    found = run_workers(lambda comm: trained(comm, config, replicas=1, wrap=wrap, bad=2), size=3)
    assert_all_equal(found, dense(config, workers=3, bad=2))


def test_fsdp_divides_no_gradient_before_the_rule_in_any_dtype(run_workers):
    """In fp64 FSDP2 divides before it reduces, unless told not to."""
    config = as_ranks(RULES["median"])

    def body(comm):
        grid = Grid(inner=comm, outer=Alone(), replica=0, replicas=1, shard=comm.rank, shards=comm.size)
        model = parallelize(
            Net().double(), comm, replicas=1, shards=3, unit_names=UNITS, device_type="cpu", precision="fp32"
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        made = Trained(model=model, optimizer=optimizer, unit_names=UNITS, comm=comm, grid=grid)
        strategy = build_strategy(config, made)
        model(torch.ones(2, 5, dtype=torch.float64)).square().mean().backward()
        strategy.reduce_gradients()
        return vector_of(param.grad.full_tensor() for param in model.parameters())

    alone = Net().double()
    alone(torch.ones(2, 5, dtype=torch.float64)).square().mean().backward()
    for found in run_workers(body, size=3):
        torch.testing.assert_close(found, vector_of(param.grad for param in alone.parameters()))


def test_dstar_by_reports_works_on_sharded_replicas(run_workers):
    config = DStarConfig(f=1)
    found = run_workers(lambda comm: trained(comm, config, replicas=3, bad=0), size=6)
    whole = run_workers(lambda comm: trained(comm, config, replicas=3, bad=0), size=3)
    assert_all_equal(found, whole[0])


def test_an_attack_is_the_same_on_sharded_replicas(run_workers):
    attack = AttackConfig(name="alie", workers=(2,), arguments=("z=1.5",))
    config = RobustConfig(rule="median", f=1, pre=(), attack=attack)
    found = run_workers(lambda comm: trained(comm, config, replicas=3), size=6)
    whole = run_workers(lambda comm: trained(comm, config, replicas=3), size=3)
    assert_all_equal(found, whole[0])


def test_gradients_that_are_copies_are_refused_and_not_used(run_workers):
    def body(comm):
        config = as_ranks(RULES["nnm"])
        grid = Grid(inner=comm, outer=Alone(), replica=0, replicas=1, shard=comm.rank, shards=comm.size)
        model = parallelize(
            Net(), comm, replicas=1, shards=3, unit_names=UNITS, device_type="cpu", precision="fp32"
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        made = Trained(model=model, optimizer=optimizer, unit_names=UNITS, comm=comm, grid=grid)
        strategy = build_strategy(config, made)
        loss_of(model, comm.rank).backward()
        strategy.reduce_gradients()
        loss_of(model, comm.rank).backward()  # without zero_grad: FSDP2 adds to what is there
        with pytest.raises(ConfigError, match="is a copy of what was reduced"):
            strategy.reduce_gradients()

    run_workers(body, size=3)
