"""The strategy: equal bits everywhere, what a bad worker cannot do, reports, momentum, state."""

import copy
import math

import pytest
import torch
from torch import nn

from hardy.config import ConfigError
from hardy.distributed.aggregation import aggregate, build_aggregator
from hardy.distributed.build import Trained, build_strategy
from hardy.distributed.groups import split
from hardy.distributed.robust.combine import NOTHING_LEFT, Combiner
from hardy.distributed.robust.config import AttackConfig, DStarConfig, RobustConfig, TrustedConfig
from hardy.distributed.robust.strategy import Robust
from hardy.distributed.simulation import SimWorld

NUM = 6


def make_model():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        param.data = torch.randn(param.shape, generator=generator) * 0.5
    return model


def loss_of(model, seed, rows=8):
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    x = x.to(next(model.parameters()).dtype)
    return nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))


class Side:
    """One worker's side of a run."""

    def __init__(self, comm, config, *, lr=0.1, dtype=torch.float32):
        self.comm, self.model = comm, make_model().to(dtype)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.grid = split(comm, replicas=comm.size, shards=1)
        trained = Trained(
            model=self.model,
            optimizer=self.optimizer,
            unit_names=["0", "2"],
            comm=comm,
            grid=self.grid,
            draw_trusted=lambda number: loss_of(self.model, 10**6 + number, rows=32).backward(),
        )
        self.strategy = build_strategy(config, trained)

    def gradients(self, step, *, spoil=None):
        loss_of(self.model, 100 * step + self.comm.rank).backward()
        if spoil is not None:
            for param in self.model.parameters():
                spoil(param.grad)
        return torch.cat([param.grad.flatten() for param in self.model.parameters()])

    def step(self, step, *, spoil=None):
        self.strategy.before_forward()
        self.gradients(step, spoil=spoil)
        self.strategy.reduce_gradients()
        reduced = torch.cat([param.grad.flatten() for param in self.model.parameters()])
        self.optimizer.step()
        self.strategy.after_step()
        self.optimizer.zero_grad()
        return reduced

    def weights(self):
        return torch.cat([param.detach().flatten() for param in self.model.parameters()])


def reduced_by(config, *, spoiled=(), spoil=None, steps=1, size=NUM):
    def body(comm):
        side = Side(comm, config)
        return [side.step(t, spoil=spoil if comm.rank in spoiled else None) for t in range(steps)][-1]

    return SimWorld(size).run(body)


def own_gradients(size=NUM):
    return torch.stack(SimWorld(size).run(lambda comm: Side(comm, RobustConfig(f=0)).gradients(0)))


RULES = [
    RobustConfig(rule="mean", f=0, pre=()),
    RobustConfig(rule="median", f=1, pre=()),
    RobustConfig(rule="trimmed_mean", f=2, pre=("nnm",)),
    RobustConfig(rule="krum", f=1, pre=()),
    RobustConfig(rule="geometric_median", f=2, pre=("bucketing:1",)),
    RobustConfig(rule="cge", f=2, pre=(), exchange="scalars"),
]


@pytest.mark.parametrize("config", RULES, ids=lambda config: config.rule)
def test_all_workers_get_the_bits_of_the_rule_on_the_whole_stack(config):
    found = reduced_by(config)
    assert all(torch.equal(found[0], other) for other in found)
    expected = aggregate(own_gradients(), config.rule, num_faulty=config.f, pre=config.pre)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", RULES[1:], ids=lambda config: config.rule)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_as_if_it_had_not_come(config, bad):
    found = reduced_by(config, spoiled=(2,), spoil=lambda grad: grad.view(-1)[0].fill_(bad))
    others = own_gradients()[[0, 1, 3, 4, 5]]
    expected = aggregate(others, config.rule, num_faulty=config.f - 1, pre=config.pre)
    for vector in found:
        torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-6)


def test_where_nobody_can_be_believed_the_step_is_refused_and_gradients_are_left():
    def body(comm):
        side = Side(comm, RobustConfig(rule="median", f=1, pre=()))
        side.gradients(0, spoil=lambda grad: grad.fill_(math.nan))
        side.strategy.reduce_gradients()
        refused = side.strategy.refusal
        side.optimizer.zero_grad()
        side.gradients(1)
        side.strategy.reduce_gradients()
        return refused, side.strategy.refusal

    assert SimWorld(3).run(body) == [(NOTHING_LEFT, "")] * 3


def test_a_loss_that_is_no_number_or_a_lie_stops_nobody():
    def body(comm):
        side = Side(comm, RobustConfig(rule="median", f=1, pre=()))
        loss = {0: math.nan, 1: 1e30}.get(comm.rank, float(comm.rank))
        votes = float(comm.rank == 3)
        return side.strategy.joint_totals(torch.tensor([loss, votes]), side.grid.inner).tolist()

    assert SimWorld(5).run(body) == [[3.5, 1.0]] * 5  # 1e30 and the smallest are left out of 2, 3, 4, 1e30


def test_an_attack_bends_the_mean_and_not_the_rule():
    attack = AttackConfig(name="ipm", workers=(0, 1), arguments=("strength=10",))
    honest = own_gradients()[2:].mean(0)
    bent = reduced_by(RobustConfig(rule="mean", f=0, pre=(), attack=attack))[0]
    kept = reduced_by(RobustConfig(f=2, attack=attack))[0]
    cosine = nn.functional.cosine_similarity
    assert cosine(bent, honest, dim=0) < -0.9 and cosine(kept, honest, dim=0) > 0.9


def test_an_attack_may_try_the_actual_rule_out():
    attack = AttackConfig(name="optimal", workers=(5,))
    found = reduced_by(RobustConfig(rule="centered_clip", f=1, pre=(), attack=attack), steps=3)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("settings", [{}, {"arguments": ("scale=none", "threshold=current")}])
def test_dstar_by_reports_equals_dstar_by_slices(settings):
    found = {
        exchange: reduced_by(DStarConfig(f=2, exchange=exchange, **settings), steps=4)[0]
        for exchange in ("scalars", "slices")
    }
    torch.testing.assert_close(found["scalars"], found["slices"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("exchange", ["scalars", "slices"])
def test_a_rejected_gradient_is_never_multiplied(exchange):
    config = DStarConfig(f=2, exchange=exchange)
    spoil = lambda grad: grad.fill_(math.nan)  # noqa: E731 - one line, used once
    found = reduced_by(config, spoiled=(1, 4), spoil=spoil, steps=2)
    assert all(torch.equal(found[0], other) and other.isfinite().all() for other in found)


@pytest.mark.parametrize("exchange", ["scalars", "slices"])
def test_dstar_takes_the_trusted_gradient_where_it_accepts_nobody(exchange):
    def body(comm):
        side = Side(comm, DStarConfig(f=2, exchange=exchange))
        loss_of(side.model, 10**6, rows=32).backward()
        expected = torch.cat([param.grad.flatten() for param in side.model.parameters()])
        side.optimizer.zero_grad()
        return expected, side.step(0, spoil=lambda grad: grad.mul_(-1.0))

    for expected, found in SimWorld(5).run(body):
        torch.testing.assert_close(found, expected)


def test_a_wrong_trusted_gradient_of_one_worker_is_outvoted():
    def run(agree):
        def body(comm):
            side = Side(comm, DStarConfig(f=1, exchange="slices", trusted=TrustedConfig(agree=agree)))
            if comm.rank == 2:
                draw = side.strategy._sender._trusted._draw

                def wrong(number):
                    draw(number)
                    for param in side.model.parameters():
                        param.grad.mul_(-1e4)

                side.strategy._sender._trusted._draw = wrong
            return side.step(0)

        return SimWorld(5).run(body)[0]

    good = reduced_by(DStarConfig(f=1, exchange="slices"), size=5)[0]
    torch.testing.assert_close(run("median"), good)
    assert not torch.allclose(run("own"), good)


def test_momentum_is_the_workers_own_and_survives_a_gradient_that_is_not_finite():
    beta = 0.75
    config = RobustConfig(rule="mean", f=0, pre=(), worker_momentum=beta)

    def body(comm):
        side, m, found = Side(comm, config, lr=0.0), 0.0, []
        for t in range(4):
            bad = t == 1 and comm.rank == 0
            loss_of(side.model, 100 * t + comm.rank).backward()
            g = torch.cat([param.grad.flatten() for param in side.model.parameters()])
            side.optimizer.zero_grad()
            if not bad:
                m = beta * m + (1 - beta) * g
            reduced = side.step(t, spoil=(lambda grad: grad.fill_(math.nan)) if bad else None)
            found.append((m, reduced, bad))
        return found

    for per_step in zip(*SimWorld(3).run(body), strict=True):
        expected = torch.stack([m for m, _, bad in per_step if not bad]).mean(0)
        for _, reduced, _ in per_step:
            torch.testing.assert_close(reduced, expected)


@pytest.mark.parametrize("rule", ["centered_clip", "kardam", "mda"])
def test_a_momentum_state_of_another_run_goes_on_bit_for_bit(rule):
    history = 0.5 if rule == "mda" else 0.0
    config = RobustConfig(rule=rule, f=1, pre=(), worker_momentum=0.9, history=history)

    def body(comm):
        side = Side(comm, config)
        for t in range(3):
            side.step(t)
        other = Side(comm, config)
        other.model.load_state_dict(side.model.state_dict())
        saved = side.strategy.state_dict()
        plain = {key: value for key, value in saved.items() if not torch.is_tensor(value)}
        other.strategy.expect(plain)
        room = other.strategy.state_dict()
        assert room.keys() == saved.keys()
        other.strategy.load_state_dict(saved)
        return [torch.equal(side.step(t), other.step(t)) for t in range(3, 6)]

    assert SimWorld(5).run(body) == [[True] * 3] * 5


def test_dstar_state_goes_on_bit_for_bit():
    def body(comm):
        config = DStarConfig(f=2, trusted=TrustedConfig(every_steps=2))
        side, other = Side(comm, config), Side(comm, config)
        for t in range(3):
            side.step(t)
        other.model.load_state_dict(side.model.state_dict())
        saved = side.strategy.state_dict()
        other.strategy.expect({key: value for key, value in saved.items() if not torch.is_tensor(value)})
        assert other.strategy.state_dict().keys() == saved.keys()
        other.strategy.load_state_dict(saved)
        return [torch.equal(side.step(t), other.step(t)) for t in range(3, 15)]

    assert SimWorld(5).run(body) == [[True] * 12] * 5


def test_too_many_faulty_ones_are_refused_with_the_largest_legal_f():
    with pytest.raises(ConfigError, match="at most 2"):
        SimWorld(5).run(lambda comm: Side(comm, RobustConfig(rule="median", f=3, pre=())))


def test_a_rule_that_needs_a_trusted_gradient_is_given_one():
    def body(comm):
        grid = split(comm, replicas=comm.size, shards=1)
        combine = Combiner(build_aggregator("fltrust", num_faulty=1), num_workers=comm.size)
        Robust(make_model(), inner=grid.inner, outer=grid.outer, combine=combine)

    with pytest.raises(ValueError, match="needs a trusted gradient"):
        SimWorld(3).run(body)


def test_parameters_without_a_gradient_count_as_zeros():
    def body(comm):
        side = Side(comm, RobustConfig(rule="mean", f=0, pre=()))
        side.model[2].requires_grad_(comm.rank == 0)
        side.model[2].requires_grad_(True)
        if comm.rank == 0:
            side.gradients(0)
        side.strategy.reduce_gradients()
        return torch.cat([param.grad.flatten() for param in side.model.parameters()])

    found = SimWorld(4).run(body)
    torch.testing.assert_close(found[3], own_gradients(4)[0] / 4)


def gone_on(config, *, size, other_size=None, other_config=None, dtype=torch.float32):
    """Return what the workers of a run and of one that takes its state over do at the next steps."""
    saved = {}

    def first(comm):
        side = Side(comm, config, dtype=dtype)
        for t in range(4):
            side.step(t)
        weights, state = copy.deepcopy((side.model.state_dict(), side.strategy.state_dict()))
        saved[comm.rank] = (weights, state)
        return [side.step(t) for t in range(4, 8)]

    def second(comm):
        side = Side(comm, other_config or config, dtype=dtype)
        weights, state = saved[comm.rank % size]
        side.model.load_state_dict(weights)
        side.strategy.expect({key: value for key, value in state.items() if not torch.is_tensor(value)})
        room = side.strategy.state_dict()
        for key, value in room.items():
            if torch.is_tensor(value):
                value.copy_(state[key])
        side.strategy.load_state_dict(room)
        return [side.step(t) for t in range(4, 8)]

    return SimWorld(size).run(first), SimWorld(other_size or size).run(second)


@pytest.mark.parametrize(
    "attack",
    [("stale", ("steps=3",)), ("replay", ()), ("mimic", ("warmup_steps=6",)), ("drift", ())],
    ids=lambda attack: attack[0],
)
def test_what_an_attack_remembers_goes_on_bit_for_bit(attack):
    name, arguments = attack
    played = AttackConfig(name=name, workers=(1,), arguments=arguments)
    config = RobustConfig(rule="mean", f=1, pre=(), attack=played)
    for went_on, took_over in zip(*gone_on(config, size=4), strict=True):
        assert all(map(torch.equal, went_on, took_over))


@pytest.mark.parametrize(
    "config",
    [
        RobustConfig(rule="centered_clip", f=1, pre=()),
        RobustConfig(rule="mean", f=1, pre=(), worker_momentum=0.9),
        RobustConfig(rule="mda", f=1, pre=(), history=0.5),
    ],
    ids=["centered_clip", "momentum", "history"],
)
def test_of_float64_weights_all_bits_are_remembered(config):
    went_on, took_over = gone_on(config, size=4, dtype=torch.float64)
    assert all(map(torch.equal, went_on[0], took_over[0])) and went_on[0][0].dtype == torch.float64


@pytest.mark.parametrize(
    "config",
    [
        RobustConfig(rule="mda", f=1, pre=(), history=0.5),
        RobustConfig(rule="kardam", f=1, pre=()),
        RobustConfig(rule="centered_clip", f=1, pre=()),
        RobustConfig(
            rule="mean", f=1, pre=(), attack=AttackConfig(name="stale", workers=(1,), arguments=("steps=3",))
        ),
    ],
    ids=["history", "kardam", "centered_clip", "stale"],
)
@pytest.mark.parametrize("other_size", [4, 6])
def test_with_other_workers_what_was_kept_of_each_begins_anew(config, other_size):
    _, took_over = gone_on(config, size=5, other_size=other_size)
    assert len(took_over) == other_size and all(x.isfinite().all() for x in took_over[0])


@pytest.mark.parametrize("other", [AttackConfig(), AttackConfig(name="mimic", workers=(2,))])
def test_a_run_may_go_on_under_another_attack(other):
    config = RobustConfig(rule="mean", f=1, pre=(), attack=AttackConfig(name="stale", workers=(1,)))
    other_config = RobustConfig(rule="mean", f=1, pre=(), attack=other)
    went_on, took_over = gone_on(config, size=4, other_config=other_config)
    assert all(map(torch.equal, took_over[0], took_over[3])) and not torch.equal(
        went_on[0][0], took_over[0][0]
    )
