"""The fastest k of n as a strategy: who is late takes the weights of the others; nothing else changes."""

import math

import pytest
import torch
from torch import nn

from hardy.distributed.aggregation import build_aggregator
from hardy.distributed.comm import Alone
from hardy.distributed.config import ClusterConfig
from hardy.distributed.robust.combine import Combiner
from hardy.distributed.robust.election import Rules
from hardy.distributed.robust.fastest import FastestGroup
from hardy.distributed.robust.fastest_simulated import SimWire
from hardy.distributed.robust.fastest_strategy import FastestRobust, fill_state
from hardy.distributed.robust.sender import Sender
from hardy.distributed.robust.trusted import TrustedGradient
from hardy.distributed.simulation import SimWorld

STEPS = 8


def make_model():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        param.data = torch.randn(param.shape, generator=generator) * 0.5
    return model


def loss_of(model, seed):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))


class Side:
    """One replica that steps as `train_step` does, on the virtual clock."""

    def __init__(self, comm, *, k, rule="mean", f=0, form="slices", keeps_late=False, **group):
        self.comm, self.model = comm, make_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        trusted = None
        if rule == "dstar":
            parameters = list(self.model.parameters())
            trusted = TrustedGradient(parameters, lambda n: loss_of(self.model, 10**6 + n).backward())
        sender = Sender(self.model, inner=Alone(clock=comm.clock), trusted=trusted)
        rules = Rules(k=k, least=2 * f + 1, takes_late=keeps_late)

        def enter(step):
            return FastestGroup(SimWire(comm, rules=rules, **group), replicas=comm.size, step=step)

        self.strategy = FastestRobust(
            self.optimizer,
            sender=sender,
            inner=Alone(clock=comm.clock),
            enter=enter,
            combine=Combiner(build_aggregator(rule, num_faulty=f), num_workers=comm.size),
            form=form,
            keeps_late=keeps_late,
        )
        self.steps, self.computed, self.overtaken = 0, 0, 0

    def step(self, *, work_s=1.0, spoil=None):
        strategy = self.strategy
        strategy.before_forward()
        seed = 1000 * strategy.own_steps(self.steps) + self.comm.rank
        if not strategy.skips_forward:
            self.comm.spend(work_s)
            loss = loss_of(self.model, seed)
            loss.backward()
            self.computed += 1
            strategy.note_loss(loss.detach().double())
        if spoil is not None:
            for param in self.model.parameters():
                param.grad.mul_(spoil)
        strategy.reduce_gradients()
        if strategy.is_overtaken:
            self.overtaken += 1
        elif not strategy.refusal:
            self.optimizer.step()
        strategy.after_step()
        self.optimizer.zero_grad()
        self.steps = strategy.standing(self.steps + 1)

    def train(self, steps=STEPS, **step):
        while self.steps < steps:
            self.step(**step)
        self.strategy.finish()
        return self

    def weights(self):
        return torch.cat([param.detach().flatten() for param in self.model.parameters()])


def test_with_all_of_them_it_is_synchronous_training():
    def body(comm):
        return Side(comm, k=comm.size).train().weights()

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(STEPS):
        for rank in range(3):
            (loss_of(model, 1000 * step + rank) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = torch.cat([param.detach().flatten() for param in model.parameters()])
    for found in SimWorld(3).run(body):
        torch.testing.assert_close(found, expected)


def test_a_straggler_is_skipped_and_ends_with_the_bits_of_the_others():
    world = SimWorld(4, cluster=ClusterConfig(slow_factors=(1.0, 1.0, 5.0, 1.0)))

    def body(comm):
        side = Side(comm, k=3).train()
        return side.weights(), side.overtaken, side.computed, comm.clock.now()

    found = world.run(body)
    assert all(torch.equal(found[0][0], weights) for weights, *_ in found)
    assert [overtaken for _, overtaken, *_ in found] == [0, 0, found[2][1], 0] and found[2][1] >= 1
    assert found[2][2] <= 2 and found[0][2] == STEPS
    assert found[0][3] < STEPS * 1.5 + 5.0, "nobody waited for it but at the very end"


def test_dstar_remembers_the_same_on_one_who_was_late():
    world = SimWorld(5, cluster=ClusterConfig(slow_factors=(1.0, 1.0, 1.0, 1.0, 3.0)))

    def body(comm):
        side = Side(comm, k=4, rule="dstar", f=1, form="scalars").train(12)
        return side.weights(), side.strategy._combine.aggregator.state_dict()

    found = world.run(body)
    for weights, state in found:
        assert torch.equal(weights, found[0][0]) and torch.equal(state["history"], found[0][1]["history"])


def test_a_gradient_that_is_not_finite_is_elected_and_left_out():
    def body(comm):
        side = Side(comm, k=4, rule="median", f=1)
        side.train(spoil=math.nan if comm.rank == 2 else None)
        return side.weights()

    found = SimWorld(5).run(body)
    assert all(torch.equal(found[0], other) and other.isfinite().all() for other in found)


def test_one_that_dies_costs_nothing_but_itself():
    world = SimWorld(5, deaths={1: 3.5})

    def body(comm):
        return Side(comm, k=3).train().weights()

    found = world.run(body)
    assert found[1] is None
    alive = [weights for weights in found if weights is not None]
    assert len(alive) == 4 and all(torch.equal(alive[0], other) for other in alive)


def test_a_late_gradient_may_count_at_the_next_step():
    world = SimWorld(4, cluster=ClusterConfig(slow_factors=(1.0, 1.0, 1.0, 1.5)))

    def body(comm):
        side = Side(comm, k=3, keeps_late=True)
        side.train(12)
        return side.weights(), side.computed, side.overtaken

    found = world.run(body)
    assert all(torch.equal(found[0][0], weights) for weights, *_ in found)
    assert found[3][2] > 0 and found[3][1] < 12


def test_the_loss_is_that_of_the_elected():
    def body(comm):
        side = Side(comm, k=3, rule="median", f=1)
        side.strategy.before_forward()
        loss_of(side.model, comm.rank).backward()
        side.strategy.note_loss(torch.tensor({0: math.nan}.get(comm.rank, float(comm.rank))).double())
        side.strategy.reduce_gradients()
        totals = side.strategy.joint_totals(torch.tensor([9.0, 1.0], dtype=torch.float64), Alone())
        side.strategy.after_step()
        return totals.tolist()

    assert SimWorld(3).run(body) == [[1.5, 1.0]] * 3


def test_state_comes_back():
    def body(comm):
        side = Side(comm, k=3, rule="dstar", f=1, form="scalars")
        for _ in range(3):
            side.step()
        saved = side.strategy.state_dict()
        other = Side(comm, k=3, rule="dstar", f=1, form="scalars").strategy
        other.load_state_dict(saved)
        assert other.own_steps(0) == 3
        return other.state_dict()["about"] == saved["about"]

    assert SimWorld(3).run(body) == [True] * 3


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_the_state_of_an_optimizer_is_made_without_a_step(make):
    model = make_model()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = make(model.parameters(), lr=0.1, weight_decay=0.1)
    loss_of(model, 0).backward()
    held = [param.grad.clone() for param in model.parameters()]
    fill_state(optimizer)
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(param.grad, old) for param, old in zip(model.parameters(), held, strict=True))
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_an_exchange_that_is_done_again_finds_the_rule_as_it_was():
    def body(comm):
        side = Side(comm, k=3, rule="dstar", f=1, form="scalars")
        side.step()
        strategy, decide = side.strategy, side.strategy._work
        before = strategy._combine.aggregator.state_dict()

        def twice(decision, prepared):
            first, second = decide(decision, prepared), decide(decision, prepared)
            now = strategy._combine.aggregator.state_dict()
            assert now["steps"] == before["steps"] and torch.equal(now["history"], before["history"])
            assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
            return second

        strategy._work = twice
        side.step()
        return strategy._combine.aggregator.state_dict()["steps"] - before["steps"]

    assert SimWorld(3).run(body) == [1, 1, 1]


def test_a_long_window_travels_to_one_that_is_late():
    def body(comm):
        side = Side(comm, k=3, rule="dstar", f=1)
        rule = build_aggregator("dstar", num_faulty=1, arguments={"window": 2000})
        filled = torch.arange(2000.0, dtype=torch.float64) / 3
        rule.load_state_dict(rule.state_dict() | {"history": filled, "steps": 2000})
        settings = {"sender": side.strategy._sender, "inner": Alone(clock=comm.clock), "form": "slices"}
        combine = Combiner(rule, num_workers=comm.size)
        side.strategy = FastestRobust(side.optimizer, enter=side.strategy._enter, combine=combine, **settings)
        side.train(4, work_s=5.0 if comm.rank == 3 else 1.0)
        return side.overtaken, combine.aggregator.state_dict()["history"]

    found = SimWorld(4).run(body)
    assert found[3][0] > 0 and all(torch.equal(history, found[0][1]) for _, history in found)
    assert len(found[0][1]) == 2000
