"""The laws of local-update training, on simulated workers."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from hardy.config import ConfigError
from hardy.distributed.build import Trained, build_strategy
from hardy.distributed.config import (
    AEDiTConfig,
    AnomalyConfig,
    ClusterConfig,
    CompressionConfig,
    DelayedConfig,
    DiLoCoConfig,
    EDiTConfig,
    LocalSGDConfig,
    OuterSGDConfig,
    OuterTorchConfig,
    PostLocalSGDConfig,
    StreamingDiLoCoConfig,
    SynchronousConfig,
)
from hardy.distributed.groups import SimGroup, split
from hardy.distributed.simulation import SimWorld

UNITS = ["1", "2", "3"]
PLAIN = OuterSGDConfig(lr=1.0)
NESTEROV = OuterSGDConfig(lr=0.7, momentum=0.9, nesterov=True)


def model_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)]
    for layer in layers:
        for param in layer.parameters():
            param.data = torch.randn(param.shape, generator=generator) * 0.3
    return nn.Sequential(*layers)


def batch_of(replica, step):
    generator = torch.Generator().manual_seed(1000 * replica + step)
    return torch.randn(4, 5, generator=generator), torch.randn(4, 3, generator=generator)


class Run:
    """One replica's training, step by step."""

    def __init__(self, comm, config, *, inner=None, seed=0, outer=None):
        self.comm, self.model = comm, model_of(seed)
        self.optimizer = (inner or (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01)))(
            self.model.parameters()
        )
        self.grid = split(comm, replicas=comm.size, shards=1)
        trained = Trained(
            model=self.model,
            optimizer=self.optimizer,
            unit_names=UNITS,
            comm=comm,
            grid=self.grid,
            outer=outer,
        )
        self.strategy = build_strategy(config, trained)
        self.steps = 0

    def step(self, *, after_gradients=lambda run: None, work_s=0.0):
        inputs, wanted = batch_of(self.comm.rank, self.steps)
        self.strategy.before_forward()
        self.optimizer.zero_grad()
        loss = (self.model(inputs) - wanted).square().mean()
        loss.backward()
        after_gradients(self)
        self.strategy.reduce_gradients()
        self.optimizer.step()
        if work_s:
            self.comm.spend(work_s)
        self.strategy.after_step()
        self.steps += 1
        return self.strategy.take_report()

    def weights(self):
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()]).clone()

    def anchor(self):
        return torch.cat(self.strategy.anchors)

    def state(self):
        state = self.strategy.state_dict()
        return {
            "strategy": {k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()},
            "model": {k: v.clone() for k, v in self.model.state_dict().items()},
            "optimizer": _deep(self.optimizer.state_dict()),
            "steps": self.steps,
        }

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(_deep(state["optimizer"]))
        plain = {k: v for k, v in state["strategy"].items() if not torch.is_tensor(v)}
        self.strategy.expect(plain)
        room = self.strategy.state_dict()
        filled = {k: v for k, v in state["strategy"].items() if torch.is_tensor(v)}
        assert {k for k, v in room.items() if torch.is_tensor(v)} == filled.keys()
        self.strategy.load_state_dict(plain | filled)
        self.steps = state["steps"]


def _deep(value):
    if isinstance(value, dict):
        return {k: _deep(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_deep(v) for v in value]
    return value.clone() if torch.is_tensor(value) else value


def train(config, steps, *, replicas=2, inner=None, **hooks):
    """Return each replica's weights after each step, [replicas][steps]."""

    def body(comm):
        run = Run(comm, config, inner=inner)
        history = []
        for _ in range(steps):
            run.step(**hooks)
            history.append(run.weights())
        return history

    return SimWorld(replicas).run(body)


def local(every=4, *, kind=LocalSGDConfig, **settings):
    return kind(every_steps=every, **settings)


# ---- What it collapses to ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LocalSGDConfig, DiLoCoConfig, EDiTConfig])
def test_a_plain_round_after_each_step_is_synchronous_training(kind):
    settings = {"outer": PLAIN, "clip_norm": None, "warmup_steps": 0, "aggregate": "mean"}
    ours = train(local(1, kind=kind, anomaly=AnomalyConfig(), **settings), 20, replicas=3)
    right = train(SynchronousConfig(), 20, replicas=3)
    for replica in range(3):
        for mine, other in zip(ours[replica], right[0], strict=True):
            assert (mine - other).abs().max() < 2e-6


def test_outer_sgd_without_momentum_averages_weights():
    history = train(local(3), 3, replicas=3)
    apart = train(local(4), 3, replicas=3)  # no round yet
    mean = torch.stack([run[2] for run in apart]).mean(0)
    for replica in range(3):
        assert torch.allclose(history[replica][2], mean, atol=1e-6)
    assert not torch.allclose(apart[0][2], apart[1][2], atol=1e-3)


def test_the_warm_up_is_synchronous_and_the_first_round_comes_a_full_interval_later():
    history = train(PostLocalSGDConfig(warmup_steps=5, every_steps=4), 10, replicas=2)
    right = train(SynchronousConfig(), 5, replicas=2)
    for step in range(5):
        assert torch.equal(history[0][step], history[1][step])
        assert torch.allclose(history[0][step], right[0][step], atol=1e-6)
    equal = [torch.equal(history[0][step], history[1][step]) for step in range(5, 10)]
    assert equal == [False, False, False, True, False]


# ---- Replicas after a round --------------------------------------------------------------------------------

FAMILY = {
    "local_sgd": local(4),
    "edit": local(4, kind=EDiTConfig, warmup_steps=2),
    "diloco": local(4, kind=DiLoCoConfig),
    "streaming": local(4, kind=StreamingDiLoCoConfig, fragments=2, delay_steps=1, mix=0.0),
    "streaming-mix": local(4, kind=StreamingDiLoCoConfig, fragments=2, delay_steps=1, mix=0.3),
    "delayed": local(4, kind=DelayedConfig),
    "adam": local(4, outer=OuterTorchConfig(name="torch.optim.Adam", lr=0.01)),
    "int8": local(4, compression=CompressionConfig(name="int8", block=8)),
    "bf16": local(4, compression=CompressionConfig(name="bf16")),
    "topk": local(4, compression=CompressionConfig(name="topk", density=0.2)),
    "anchored": local(4, aggregate="anchored"),
    "layerwise": local(4, kind=EDiTConfig, warmup_steps=2, layerwise=True),
    "offload": local(4, kind=DiLoCoConfig, offload=True),
    "averaged": local(4, inner_state="average"),
    "reset": local(4, inner_state="reset"),
}


@pytest.mark.parametrize("name", FAMILY)
def test_anchors_are_the_same_bits_on_all_replicas_at_all_times(name):
    def body(comm):
        run = Run(comm, FAMILY[name])
        anchors = []
        for _ in range(14):
            run.step()
            anchors.append(run.anchor() if run.strategy.anchors else None)
        run.strategy.finish()
        return anchors, run.weights(), run.anchor(), run.strategy.round

    results = SimWorld(3).run(body)
    for others, weights, anchor, rounds in results[1:]:
        for mine, other in zip(results[0][0], others, strict=True):
            assert (mine is None) == (other is None) and (mine is None or torch.equal(mine, other))
        assert torch.equal(anchor, results[0][2])
        if name != "streaming-mix":
            assert torch.equal(weights, results[0][1])
        assert rounds == results[0][3] >= 3


def test_all_replicas_have_the_anchor_right_after_a_round():
    def body(comm):
        run = Run(comm, local(4, kind=DiLoCoConfig))
        for step in range(1, 9):
            run.step()
            assert torch.equal(run.strategy.units.read(0), run.strategy.anchors[0]) == (step % 4 == 0)

    SimWorld(2).run(body)


@pytest.mark.parametrize("settings", [{}, {"clip_norm": 0.05}, {"outer": NESTEROV}], ids=str)
def test_layer_wise_rounds_are_those_after_the_step_bit_for_bit(settings):
    def body(comm, layerwise):
        run = Run(comm, local(4, kind=EDiTConfig, warmup_steps=3, layerwise=layerwise, **settings))
        losses = []
        for step in range(25):
            if step % 5 == 2:  # an evaluation between
                run.model.eval()
                with torch.no_grad(), run.strategy.evaluation_parameters():
                    losses.append(run.model(torch.ones(1, 5)).sum().item())
                run.model.train()
            run.step()
        run.strategy.finish()
        return losses, run.weights(), run.anchor(), run.strategy.round

    after, within = (SimWorld(2).run(lambda comm, flag=flag: body(comm, flag)) for flag in (False, True))
    for one, other in zip(after, within, strict=True):
        assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])
        assert one[3] == other[3] == 6
    # A round within the forward pass comes after an evaluation that follows its step: only these may differ.
    assert after[0][0][0] == within[0][0][0]


def test_a_block_that_runs_twice_or_not_at_all_meets_once():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model_of()
            self.skips = False

        def forward(self, x):
            for index, layer in enumerate(self.body):
                if index == 2 and self.skips:
                    continue
                x = layer(x)
                if index == 1:
                    x = layer(x)
            return x

    def body(comm, layerwise):
        model = Odd()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        grid = split(comm, replicas=2, shards=1)
        names = [f"body.{name}" for name in UNITS]
        trained = Trained(model=model, optimizer=optimizer, unit_names=names, comm=comm, grid=grid)
        strategy = build_strategy(local(3, kind=DiLoCoConfig, layerwise=layerwise), trained)
        for step in range(8):
            strategy.before_forward()
            optimizer.zero_grad()
            model.skips = step % 3 == 0
            for micro in range(2):
                inputs, wanted = batch_of(comm.rank, 2 * step + micro)
                (model(inputs) - wanted).square().mean().backward()
            strategy.reduce_gradients()
            optimizer.step()
            strategy.after_step()
        strategy.finish()
        return torch.cat(strategy.anchors), strategy.round

    after, within = (SimWorld(2).run(lambda comm, flag=flag: body(comm, flag)) for flag in (False, True))
    assert torch.equal(after[0][0], within[0][0]) and torch.equal(within[0][0], within[1][0])
    assert after[0][1] == within[0][1] == 3


# ---- Replicas that are not well ----------------------------------------------------------------------------


def spoil(kind, *, replica=1, at=2):
    def change(run):
        if run.comm.rank == replica and run.steps == at:
            for param in run.model.parameters():
                if kind == "far":
                    param.data.add_(100.0)
                else:
                    param.grad.fill_(kind)

    return change


@pytest.mark.parametrize("kind", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("config", [local(4, kind=EDiTConfig, warmup_steps=0), local(4, kind=DiLoCoConfig)])
def test_a_replica_that_is_not_finite_is_left_out_once_and_repaired(kind, config):
    def body(comm, spoils):
        run = Run(comm, config, inner=lambda p: torch.optim.AdamW(p, lr=0.01))
        reports = []
        for _ in range(12):
            report = run.step(after_gradients=spoil(kind) if spoils else lambda run: None)
            reports += [report] if report else []
        return run.anchor(), reports, run.strategy.repairs

    results = SimWorld(3).run(lambda comm: body(comm, spoils=True))
    for anchor, reports, _ in results:
        assert torch.equal(anchor, results[0][0]) and anchor.isfinite().all()
        assert [report["flagged_replicas"] for report in reports] == [[1], [], []]
        assert reports[0]["nonfinite_units"] == 4
    assert [result[2] for result in results] == [0, 1, 0]
    assert results[1][1][0]["weight"] == 0 and results[1][1][1]["weight"] > 0


def test_without_the_spoiled_replica_the_others_go_on_as_two():
    settings = {"kind": LocalSGDConfig, "anomaly": AnomalyConfig()}

    def two(comm):
        run = Run(comm, local(4, **settings))
        for _ in range(4):
            run.step()
        return run.anchor()

    def three(comm):
        run = Run(comm, local(4, **settings))
        for _ in range(4):
            run.step(after_gradients=spoil(math.nan, replica=2, at=1))
        return run.anchor()

    assert torch.allclose(SimWorld(3).run(three)[0], SimWorld(2).run(two)[0], atol=1e-6)


def test_a_replica_far_off_is_left_out_once_norms_are_known():
    anomaly = AnomalyConfig(name="ztest", warmup_rounds=4, delta=20.0)

    def body(comm):
        config = local(2, kind=EDiTConfig, warmup_steps=0, anomaly=anomaly, temperature=1e6)
        run = Run(comm, config, inner=lambda params: torch.optim.SGD(params, lr=0.05))
        flagged = []
        for _ in range(24):
            report = run.step(after_gradients=spoil("far", at=16))
            flagged += [report["flagged_replicas"]] if report else []
        return run.anchor(), flagged

    results = SimWorld(3).run(body)
    assert results[0][1][8] == [1] and results[0][0].abs().max() < 10
    assert results[0][1][9] == []


@pytest.mark.parametrize(("relative", "left_out"), [(False, []), (True, [1])])
def test_a_bad_replica_shows_in_norms_per_learning_rate_though_rates_and_norms_fall(relative, left_out):
    anomaly = AnomalyConfig(name="ztest", warmup_rounds=4, delta=5.0, relative_to_rate=relative)
    config = local(2, anomaly=anomaly)

    def body(comm):
        run, flagged = Run(comm, config, inner=lambda params: torch.optim.SGD(params, lr=0.02)), []

        def grow(run):
            if run.steps >= 12 and comm.rank == 1:
                for param in run.model.parameters():
                    param.grad.mul_(4)

        for step in range(18):
            run.optimizer.param_groups[0]["lr"] = 0.02 if step < 12 else 0.002
            report = run.step(after_gradients=grow)
            flagged += report["flagged_replicas"] if report else []
        return sorted(set(flagged))

    assert SimWorld(3).run(body) == [left_out] * 3


@pytest.mark.parametrize("kind", [math.nan, math.inf])
def test_where_all_are_left_out_the_round_is_undone_exactly(kind):
    def body(comm):
        run = Run(comm, local(3, kind=DiLoCoConfig), inner=lambda p: torch.optim.AdamW(p, lr=0.01))
        for _ in range(6):
            run.step()
        before = run.anchor().clone(), _deep(run.strategy.parts.outer_optimizer.state_dict())
        for _ in range(3):
            run.step(after_gradients=spoil(kind, replica=comm.rank, at=7))
        after = run.anchor(), run.strategy.parts.outer_optimizer.state_dict()
        assert torch.equal(before[0], after[0])
        assert all(torch.equal(before[1][key], after[1][key]) for key in before[1])
        assert torch.equal(torch.cat([run.strategy.units.read(u) for u in range(4)]), after[0])
        assert run.strategy.rollbacks == 4 and run.strategy.round == 3
        for _ in range(3):
            run.step()
        return run.anchor()

    anchors = SimWorld(2).run(body)
    assert torch.equal(*anchors) and anchors[0].isfinite().all()


def test_the_move_of_a_round_is_bounded_by_the_clip():
    phi, momentum, lr = 0.05, 0.6, 0.5
    outer = OuterSGDConfig(lr=lr, momentum=momentum, nesterov=True)
    config = local(2, kind=LocalSGDConfig, clip_norm=phi, outer=outer)

    def body(comm):
        run = Run(comm, config)
        moves = []
        for _ in range(20):
            before = [a.clone() for a in run.strategy.anchors]
            run.step()
            if before:
                pairs = zip(run.strategy.anchors, before, strict=True)
                moves.append(max((now - was).norm().item() for now, was in pairs))
        return moves

    moves = SimWorld(2).run(body)[0]
    assert 0 < max(moves) <= lr * phi / (1 - momentum) + 1e-6


def test_replicas_that_begin_apart_are_refused():
    def body(comm):
        run = Run(comm, PostLocalSGDConfig(warmup_steps=1, every_steps=2), seed=comm.rank)
        run.step()
        with pytest.raises(
            RuntimeError, match="the replicas' weights differ in the root, 1, 2 before they train"
        ):
            run.step()

    SimWorld(2).run(body)


def test_one_replica_alone_is_moved_by_its_outer_optimizer():
    history = train(local(2, outer=OuterSGDConfig(lr=0.5)), 2, replicas=1)
    apart = train(local(3), 2, replicas=1)
    start = torch.cat([p.detach().reshape(-1) for p in model_of().parameters()])
    assert torch.allclose(history[0][1], start + 0.5 * (apart[0][1] - start), atol=1e-6)


# ---- Saved and resumed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "at"), [*product(FAMILY, (7, 8)), *product(("edit", "streaming-mix", "delayed", "topk"), (3, 9))]
)
def test_a_run_resumed_at_any_step_is_the_run_bit_for_bit(name, at):
    def inner(params):
        return torch.optim.AdamW(params, lr=0.01)

    def whole(comm):
        run = Run(comm, FAMILY[name], inner=inner)
        for _ in range(at):
            run.step()
        state = run.state()
        told = [run.step().get("replica_rates") for _ in range(8)]
        run.strategy.finish()
        return state, run.weights(), run.anchor(), (told, run.strategy.report.state_dict())

    results = SimWorld(2).run(whole)

    def rest(comm):
        run = Run(comm, FAMILY[name], inner=inner, seed=99)
        run.load(results[comm.rank][0])
        told = [run.step().get("replica_rates") for _ in range(8)]
        run.strategy.finish()
        return run.weights(), run.anchor(), (told, run.strategy.report.state_dict())

    for (_, weights, anchor, told), (again, anchor_again, told_again) in zip(
        results, SimWorld(2).run(rest), strict=True
    ):
        assert torch.equal(weights, again) and torch.equal(anchor, anchor_again)
        assert str(told) == str(told_again)


def test_more_replicas_begin_at_the_anchor_of_those_that_were():
    config = local(4, kind=DiLoCoConfig)

    def first(comm):
        run = Run(comm, config)
        for _ in range(6):
            run.step()
        return run.state(), run.anchor()

    state, anchor = SimWorld(2).run(first)[0]

    def more(comm):
        run = Run(comm, config)
        run.load(state)
        assert torch.equal(run.anchor(), anchor)
        assert torch.equal(torch.cat([run.strategy.units.read(u) for u in range(4)]), anchor)
        assert run.strategy.round == 1 and run.strategy.parts.outer_optimizer.buffers(0)["momentum"].any()
        for _ in range(4):
            run.step()
        return run.anchor()

    anchors = SimWorld(3).run(more)
    assert torch.equal(anchors[0], anchors[2]) and not torch.equal(anchors[0], anchor)


# ---- By time -----------------------------------------------------------------------------------------------


def timed(config, *, factors, steps=None, until_s=None):
    def body(comm):
        run = Run(comm, config)
        while (run.steps < steps) if steps else (comm.clock.now() < until_s):
            run.step(work_s=0.01)
        return run.steps, run.strategy.round, run.anchor(), run.strategy.total_steps

    world = SimWorld(len(factors), cluster=ClusterConfig(slow_factors=factors))
    return world.run(body)


def test_by_time_a_slow_replica_does_fewer_steps_and_holds_nobody_up():
    config = AEDiTConfig(warmup_steps=0, every_s=0.25, min_steps=1)
    results = timed(config, factors=(1, 1, 1, 3), until_s=3.0)
    steps = [result[0] for result in results]
    assert steps[3] < 0.4 * steps[0] and min(steps[:3]) > 0.9 * 300
    assert len({result[1] for result in results}) == 1 and results[0][1] >= 10
    assert all(torch.equal(result[2], results[0][2]) for result in results)


def test_a_round_with_too_few_steps_is_put_off():
    config = AEDiTConfig(warmup_steps=0, every_s=0.1, min_steps=10**6)
    results = timed(config, factors=(1, 1), until_s=1.0)
    assert results[0][1] == 0 and results[0][3] == 0


def test_with_rounds_by_time_the_run_stands_at_the_mean_of_steps():
    def body(comm):
        run = Run(comm, AEDiTConfig(warmup_steps=2, every_s=0.25, min_steps=1))
        seen = []
        while comm.clock.now() < 2.0:
            run.step(work_s=0.01)
            if run.strategy.is_together and run.strategy.anchors:
                seen.append((run.strategy.standing(0), run.strategy.total_steps, run.strategy.round))
        return seen

    seen = SimWorld(2, cluster=ClusterConfig(slow_factors=(1, 2))).run(body)
    assert len(seen[0]) >= 5
    for mine, other in zip(*seen, strict=True):
        assert mine[1:] == other[1:]
        assert mine[0] == 2 + mine[1] // 2


# ---- Wishes ------------------------------------------------------------------------------------------------


def test_a_wish_to_stop_reaches_all_replicas_in_the_next_round():
    def body(comm):
        run = Run(comm, local(4, kind=DiLoCoConfig))
        told = []
        for step in range(8):
            run.step()
            told.append(run.strategy.agreed_stop(votes=int(step == 1 and comm.rank == 1)))
        return told

    assert SimWorld(2).run(body) == [[False] * 3 + [True] + [False] * 3 + [True]] * 2


def test_what_a_round_says_of_itself():
    def body(comm):
        run = Run(comm, local(4, kind=EDiTConfig, warmup_steps=0))
        reports = [run.step() for _ in range(4)]
        assert [bool(report) for report in reports] == [False, False, False, True]
        return reports[-1]

    report = SimWorld(2).run(body)[0]
    assert report["round"] == 1 and report["replicas"] == 2 and report["replica_steps"] == [4, 4]
    assert -1 <= report["drift_cosine"] <= 1 and 1 <= report["effective_replicas"] <= 2
    assert report["bytes_sent"] > 0 and report["flagged_replicas"] == []


def test_the_drift_of_a_round_is_the_cosine_of_what_a_replica_brought_to_the_mean():
    apart = train(local(5, kind=DiLoCoConfig), 4)  # as far, and no round yet
    start = torch.cat([param.detach().reshape(-1) for param in model_of().parameters()])
    deltas = start - torch.stack([history[-1] for history in apart])

    def body(comm):
        run = Run(comm, local(4, kind=DiLoCoConfig))
        return [run.step() for _ in range(4)][-1]

    reports, mean = SimWorld(2).run(body), deltas.mean(0)
    for report, delta in zip(reports, deltas, strict=True):
        cosine = torch.cosine_similarity(delta, mean, dim=0).item()
        assert report["drift_cosine"] == pytest.approx(cosine, abs=1e-5)
        assert report["outer_grad_norm"] == pytest.approx(mean.norm().item(), rel=1e-5)
    assert abs(reports[0]["drift_cosine"] - reports[1]["drift_cosine"]) > 1e-3


def test_a_round_tells_norms_weights_and_cosines_of_all_replicas():
    def body(comm):
        run = Run(
            comm, local(4, kind=EDiTConfig, warmup_steps=3), inner=lambda p: torch.optim.SGD(p, lr=0.05)
        )
        return [report for _ in range(15) if (report := run.step())]

    mine, others = SimWorld(2).run(body)
    alike = ("replica_norms", "replica_weights", "replica_rates", "replica_steps", "replica_cosines_before")
    assert len(mine) == 3 and all(
        a[key] == b[key] for a, b in zip(mine, others, strict=True) for key in alike
    )
    assert mine[0]["replica_cosines_before"] == [None, None]
    for before, after in ((0, 1), (1, 2)):
        cosines = [mine[before]["drift_cosine"], others[before]["drift_cosine"]]
        assert mine[after]["replica_cosines_before"] == cosines
    for a, b in zip(mine, others, strict=True):
        assert a["replica_norms"] == pytest.approx([a["pseudo_grad_norm"], b["pseudo_grad_norm"]], rel=1e-6)
        assert a["replica_weights"] == [a["weight"], b["weight"]] and sum(
            a["replica_weights"]
        ) == pytest.approx(1)
        assert a["replica_rates"] == pytest.approx([4 * 0.05] * 2)


def test_learning_rates_add_up_for_each_fragment_on_its_own():
    config = local(4, kind=StreamingDiLoCoConfig, fragments=2, delay_steps=0, mix=0.0)

    def body(comm):
        run, told = Run(comm, config, inner=lambda p: torch.optim.SGD(p, lr=1.0)), {}
        for step in range(1, 17):
            run.optimizer.param_groups[0]["lr"] = 0.001 * step
            report = run.step()
            told |= {step: report["replica_rates"]} if report else {}
        return told

    told = SimWorld(2).run(body)[0]
    assert len(told) >= 6
    for step, rates in told.items():
        assert rates == pytest.approx([0.001 * sum(range(max(step - 3, 1), step + 1))] * 2)


def test_a_watch_of_the_weights_speaks_in_the_line_of_a_round():
    config = local(1, kind=EDiTConfig, warmup_steps=0, temperature=1e-6, clip_norm=1e-6)

    def body(comm):
        run = Run(comm, config)
        return [run.step().get("warning") for _ in range(10)]

    for said in SimWorld(2).run(body):
        assert said[:9] == [None] * 9
        assert "4 of 4 units rest on fewer than" in said[9] and "4 of 4 units are clipped" in said[9]


def test_gradients_of_the_warm_up_are_averaged_also_where_a_replica_has_none():
    def body(comm):
        run = Run(comm, replace(local(4), warmup_steps=3))

        def drop(run):
            if comm.rank == 1:
                for param in run.model[2].parameters():
                    param.grad = None

        run.step(after_gradients=drop)
        return run.weights()

    weights = SimWorld(2).run(body)
    assert torch.equal(*weights)


def test_a_model_whose_parameters_were_given_other_memory_still_meets():
    """As `model.to` does."""

    def body(comm):
        run = Run(comm, LocalSGDConfig(every_steps=2, outer=PLAIN))
        for param in run.model.parameters():
            param.data = param.data.clone()
        run.step()
        run.step()
        return run.weights()

    first, second = SimWorld(2).run(body)
    assert torch.equal(first, second)


def test_replicas_that_mix_end_with_the_same_weights():
    def body(comm):
        run = Run(comm, StreamingDiLoCoConfig(every_steps=4, fragments=2, delay_steps=1, mix=0.5))
        for _ in range(6):
            run.step()
        run.strategy.finish()
        return run.weights(), torch.cat([run.strategy.units.read(unit) for unit in range(4)]), run.anchor()

    (first, _, _), (second, inside, anchor) = SimWorld(2).run(body)
    assert torch.equal(first, second) and torch.equal(inside, anchor)


# ---- Replicas that die and come ----------------------------------------------------------------------------


def elastic(config, *, founders, num_workers, steps, births=None, deaths=None):
    """Return (anchor after each round, steps, members) of each replica; None of those that died."""

    def body(comm):
        run = Run(comm, config, outer=SimGroup(comm, founders=founders))
        anchors = {}
        while run.strategy.step < steps:
            report = run.step(work_s=0.01)
            if report:  # however often the round was begun
                assert report["replica_rates"] == pytest.approx([0.05 * n for n in report["replica_steps"]])
            if run.strategy.round and run.strategy.is_together:
                anchors[run.strategy.round] = run.anchor()
        run.strategy.finish()
        return anchors, run.steps, run.strategy.outer.members

    cluster = ClusterConfig(bandwidth_bytes_per_s=1e6)
    world = SimWorld(num_workers, births=births or {}, deaths=deaths or {}, detect_s=0.05, cluster=cluster)
    return world.run(body)


ELASTIC = [
    local(4, kind=DiLoCoConfig, elastic=True),
    local(4, kind=EDiTConfig, elastic=True, warmup_steps=0),
    local(4, kind=LocalSGDConfig, elastic=True, compression=CompressionConfig(name="topk", density=0.3)),
]


@pytest.mark.parametrize("config", ELASTIC)
@pytest.mark.parametrize("death_s", [0.02, 0.0405, 0.041, 0.0415, 0.043, 0.06])
def test_a_replica_that_dies_costs_its_part_of_one_round_and_nobody_waits(config, death_s):
    results = elastic(config, founders=3, num_workers=3, steps=16, deaths={1: death_s})
    assert results[1] is None
    first, other = results[0], results[2]
    assert first[1] == other[1] == 16 and first[2] == other[2] == (0, 2)
    assert sorted(first[0]) == sorted(other[0]) == [1, 2, 3, 4]
    assert all(torch.equal(first[0][number], other[0][number]) for number in first[0])
    assert first[0][4].isfinite().all() and not torch.equal(first[0][4], first[0][1])


@pytest.mark.parametrize("death_s", [0.0, 0.0005, 0.001])
def test_a_founder_may_die_before_the_replicas_have_begun(death_s):
    results = elastic(local(4, elastic=True), founders=3, num_workers=3, steps=8, deaths={1: death_s})
    assert results[1] is None
    assert sorted(results[0][0]) == [1, 2] and results[0][2] == (0, 2)
    assert torch.equal(results[0][0][2], results[2][0][2])


def test_a_round_says_who_took_part_who_came_and_how_often_it_was_begun():
    config = local(4, elastic=True)

    def body(comm):
        run = Run(comm, config, outer=SimGroup(comm, founders=3))
        run.strategy.join()
        came_at = run.strategy.step, run.strategy.is_together
        reports = []
        while run.strategy.step < 40:
            report = run.step(work_s=0.01)
            if report:
                reports.append(report)
        return came_at, reports, run.strategy.standing(0), run.strategy.total_steps

    cluster = ClusterConfig(bandwidth_bytes_per_s=1e6)
    results = SimWorld(4, births={3: 0.15}, deaths={1: 0.06}, detect_s=0.05, cluster=cluster).run(body)
    first, came = results[0], results[3]
    keys = ("generation", "members", "joined", "redone")
    told = [tuple(report[key] for key in keys) for report in first[1]]
    begins = [row for row, before in zip(told, [None, *told], strict=False) if row != before]
    assert begins[:3] == [
        (0, [0, 1, 2], [], 0),
        (1, [0, 2], [], 1),
        (1, [0, 2], [], 0),
    ] and begins[3:] == [(2, [0, 2, 3], [3], 0), (2, [0, 2, 3], [], 0)]
    assert [report["round"] for report in first[1]] == [*range(1, 11)]
    (step, is_together), later = came[0], came[1]
    assert step % 4 == 0 and 0 < step < 40 and is_together and first[0][0] == 0
    assert later[0]["round"] == step // 4 + 1 and later[0]["joined"] == [3]
    assert {result[2] for result in results if result} == {40}
    took_part = sum(4 * len(report["members"]) for report in first[1])
    assert {result[3] for result in results if result} == {took_part}


@pytest.mark.parametrize("config", ELASTIC)
def test_one_who_comes_in_the_middle_of_a_round_gets_its_result_and_nobody_waits(config):
    """Replica 1 dies in round 2, so the group is made anew there, with replica 3 who has asked meanwhile."""

    def body(comm):
        run = Run(comm, config, outer=SimGroup(comm, founders=3))
        run.strategy.join()
        came_at = run.strategy.step, run.strategy.round, run.anchor() if run.strategy.anchors else None
        reports, anchors = [], {}
        while run.strategy.step < 40:
            report = run.step(work_s=0.01)
            if report:
                reports.append(report)
                anchors[run.strategy.round] = run.anchor()
        return came_at, reports, anchors, comm.clock.now()

    cluster = ClusterConfig(bandwidth_bytes_per_s=1e6)
    world = SimWorld(4, births={3: 0.055}, deaths={1: 0.065}, detect_s=0.05, cluster=cluster)
    first, dead, _, came = world.run(body)
    assert dead is None and [report["round"] for report in first[1]] == [*range(1, 11)]
    second = first[1][1]
    assert second["members"] == [0, 2, 3] and second["joined"] == [3] and second["redone"] == 1
    assert second["replica_rates"] == pytest.approx([0.2, 0.2, 0.0])  # also where it was begun again
    assert second["replica_steps"] == [4, 4, 0] and second["flagged_replicas"] == [2]
    assert all(report["replica_steps"] == [4, 4, 4] for report in first[1][2:])
    assert came[0][:2] == (8, 2) and torch.equal(came[0][2], first[2][2])
    for number, anchor in came[2].items():
        assert torch.equal(anchor, first[2][number])
    assert [*came[2]] == [*range(3, 11)] and came[3] == pytest.approx(first[3], abs=0.01)


def test_with_rounds_by_time_all_stand_at_the_steps_of_the_furthest():
    config = DiLoCoConfig(every_steps=None, every_s=0.045, min_steps=1, elastic=True)

    def body(comm):
        run = Run(comm, config, outer=SimGroup(comm, founders=3))
        standings = []
        while not run.strategy.is_together or run.strategy.step < 30:
            run.step(work_s=0.02 if comm.rank == 2 else 0.01)
            standings.append((run.strategy.standing(0), run.strategy.round, run.strategy.is_together))
        return standings

    results = SimWorld(3, deaths={1: 0.13}, detect_s=0.05).run(body)
    at_round = [{number: step for step, number, met in result if met} for result in (results[0], results[2])]
    assert at_round[0] == at_round[1] and max(at_round[0].values()) >= 30
    for result in (results[0], results[2]):
        steps = [step for step, _, _ in result]
        assert steps == sorted(steps)


def test_the_round_of_a_death_is_that_of_the_living():
    config = local(4, elastic=True)
    together = elastic(config, founders=3, num_workers=3, steps=4, deaths={2: 0.005})
    alone = elastic(config, founders=2, num_workers=2, steps=4)
    assert torch.equal(together[0][0][1], alone[0][0][1])


@pytest.mark.parametrize("config", ELASTIC)
def test_one_who_comes_takes_the_anchor_over_and_contributes_from_the_next_round(config):
    results = elastic(config, founders=2, num_workers=3, steps=40, births={2: 0.06})
    assert all(result[2] == (0, 1, 2) for result in results)
    came = results[2][0]
    assert 0 < results[2][1] < 40 and min(came) > 1
    for number, anchor in came.items():
        assert torch.equal(anchor, results[0][0][number]) and torch.equal(anchor, results[1][0][number])


def test_replicas_die_and_come_again_and_again():
    config = local(3, kind=DiLoCoConfig, elastic=True)
    results = elastic(
        config,
        founders=4,
        num_workers=7,
        steps=60,
        deaths={0: 0.1, 2: 0.25, 5: 0.45},
        births={4: 0.15, 5: 0.3, 6: 0.5},
    )
    left = [result for result in results if result is not None]
    assert len(left) == 4 and all(result[2] == left[0][2] == (1, 3, 4, 6) for result in left)
    last = max(left[0][0])
    assert last >= 15 and all(torch.equal(result[0][last], left[0][0][last]) for result in left)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layerwise": True}, "strategy.elastic=true needs strategy.layerwise=false"),
        ({"warmup_steps": 5}, "from the first step on, but warmup_steps=5; set"),
        ({"delay_rounds": 1}, "but delay_rounds=1; set strategy.warmup_steps and the delays to 0"),
        ({"copies": 2}, "replicas of one worker or sharded ones in this version, but strategy.copies=2; set"),
        ({"inner_state": "average"}, "needs strategy.inner_state='keep' or 'reset'"),
    ],
)
def test_what_replicas_that_come_and_go_cannot_do(settings, words):
    with pytest.raises(ConfigError, match=words):
        local(4, elastic=True, **settings)
