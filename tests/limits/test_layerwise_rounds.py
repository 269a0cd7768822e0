"""Rounds inside the forward pass are those after the step, however a loop of one's own runs the model."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hardy.distributed.build import Trained, build_strategy
from hardy.distributed.config import EDiTConfig
from hardy.distributed.groups import split
from hardy.distributed.simulation import SimWorld

EVERY, WARMUP, STEPS, ROUNDS = 3, 2, 9, 3
UNITS = ["blocks.0", "blocks.1", "blocks.2"]
RECOMPUTE = {"nothing": None, "blocks again": False, "blocks re-entrant": True}


class Net(nn.Module):
    """Blocks that may be computed again in the backward pass, and one that may be left out."""

    def __init__(self, reentrant):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in UNITS)
        self.last = nn.Linear(8, 3)
        self.reentrant, self.left_out = reentrant, None
        generator = torch.Generator().manual_seed(0)
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=generator) * 0.3

    def forward(self, x):
        computes_again = self.reentrant is not None and torch.is_grad_enabled()
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            if number == self.left_out:
                continue
            x = checkpoint(block, x, use_reentrant=self.reentrant) if computes_again else block(x)
        return self.last(x)


class Run:
    """One replica in a loop of its own."""

    def __init__(self, comm, *, layerwise, reentrant):
        self.comm, self.model, self.steps, self.met = comm, Net(reentrant), 0, []
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        grid = split(comm, replicas=comm.size, shards=1)
        config = EDiTConfig(every_steps=EVERY, warmup_steps=WARMUP, clip_norm=0.2, layerwise=layerwise)
        trained = Trained(model=self.model, optimizer=self.optimizer, unit_names=UNITS, comm=comm, grid=grid)
        self.strategy = build_strategy(config, trained)
        outer_optimizer = self.strategy.parts.outer_optimizer
        step = outer_optimizer.step

        def note(unit, anchor_n, sum_n):
            self.met.append((self.strategy.round, unit))
            step(unit, anchor_n, sum_n)

        outer_optimizer.step = note

    def step(self, forward):
        """Make a step of two micro-batches and return their losses."""
        self.strategy.before_forward()
        self.optimizer.zero_grad()
        losses = []
        for micro in range(2):
            generator = torch.Generator().manual_seed(1000 * self.comm.rank + 2 * self.steps + micro)
            x, wanted = torch.randn(4, 5, generator=generator), torch.randn(4, 3, generator=generator)
            # Re-entrant recomputation gives no gradient where no input asks for one.
            loss = (forward(self, x.requires_grad_()) - wanted).square().mean()
            loss.backward()
            losses.append(loss.item())
        self.strategy.reduce_gradients()
        self.optimizer.step()
        self.strategy.after_step()
        self.steps += 1
        return losses

    def weights(self):
        return torch.cat([param.detach().reshape(-1) for param in self.model.parameters()])


def nothing(run):
    """Do nothing between steps."""


def train(comm, forward, between, *, layerwise, reentrant):
    run, losses = Run(comm, layerwise=layerwise, reentrant=reentrant), []
    for _ in range(STEPS):
        losses += run.step(forward)
        between(run)
    run.strategy.finish()
    return losses, run.weights(), torch.cat(run.strategy.anchors), run.met, comm.bytes_sent


def check_alike(forward, *, reentrant, between=nothing):
    """Train with rounds after the step and within the forward pass: all bits, and one meeting a round."""
    after, within = (
        SimWorld(2).run(partial(train, forward=forward, between=between, layerwise=flag, reentrant=reentrant))
        for flag in (False, True)
    )
    for one, other in zip(after, within, strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])
        once = [(number, unit) for number in range(ROUNDS) for unit in range(len(UNITS) + 1)]
        assert sorted(one[3]) == once and sorted(other[3]) == once
        assert one[4] == other[4]
    assert torch.equal(within[0][2], within[1][2]) and after[0][0] != after[1][0]


def plainly(run, x):
    return run.model(x)


def whole_again(run, x):
    return checkpoint(run.model, x, use_reentrant=True)


def in_eval_mode(run, x):
    """As one trains without dropout."""
    return run.model.eval()(x)


def unit_by_unit(run, x):
    """Never as `model(x)`, and without block 2."""
    model = run.model
    return model.last(model.blocks[1](model.blocks[0](model.first(x))))


def after_a_look(run, x):
    """A forward pass without gradient comes first, as for a teacher's targets."""
    with torch.no_grad():
        wanted = run.model.eval()(x)
    return run.model.train()(x) - 0.1 * wanted


def after_a_look_at_the_anchor(run, x):
    with torch.no_grad(), run.strategy.evaluation_parameters():
        wanted = run.model(x)
    return run.model(x) - 0.1 * wanted


def leaving_out(run, x):
    """Now one block, now another, in the first or in the second micro-batch."""
    run.model.left_out = {0: 1, 2: 2, 3: 0}.get(int(1000 * x[0, 0].abs()) % 5)
    return run.model(x)


FORWARDS = [
    plainly,
    whole_again,
    in_eval_mode,
    unit_by_unit,
    after_a_look,
    after_a_look_at_the_anchor,
    leaving_out,
]


@pytest.mark.parametrize("reentrant", RECOMPUTE.values(), ids=RECOMPUTE)
@pytest.mark.parametrize("forward", FORWARDS)
def test_however_the_model_is_run_layer_wise_rounds_are_those_after_the_step(forward, reentrant):
    check_alike(forward, reentrant=reentrant)


@pytest.mark.parametrize("reentrant", RECOMPUTE.values(), ids=RECOMPUTE)
def test_evaluations_between_rounds_change_nothing(reentrant):
    def look(run):
        with torch.no_grad():
            run.model(torch.ones(1, 5))
            with run.strategy.evaluation_parameters():
                run.model.eval()(torch.ones(1, 5))
        run.model.train()

    check_alike(plainly, reentrant=reentrant, between=look)
