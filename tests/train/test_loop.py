"""The loop: right cadence, right schedule, and a run that only wastes time is stopped."""

import math

import pytest

from hardy.distributed.comm import Alone
from hardy.distributed.simulation import SimWorld
from hardy.optim.config import PerfDecayConfig
from hardy.optim.perf_decay import PerfExpDecay
from hardy.train.device import choose_hardware
from hardy.train.loop import Progress, RunFailedError, run_loop
from hardy.train.setup import assemble

HARDWARE = choose_hardware("cpu", "fp32")


class Log:
    def __init__(self):
        self.records, self.saved = [], []

    def run(self, assembly, progress=None, *, stop=lambda: False):
        self.progress = progress or Progress()
        return run_loop(
            assembly.worker,
            assembly.plan,
            self.progress,
            save=lambda now: self.saved.append(now.step),
            record=self.records.append,
            stop=stop,
        )


@pytest.fixture
def build(make_config, corpus):
    def build(**dotted):
        return assemble(make_config(**dotted), Alone(), corpus=corpus, hardware=HARDWARE)

    return build


def test_every_step_has_its_record_and_the_cadences_hold(build):
    log = Log()
    assert log.run(build(train__steps=7, train__evaluate_every_steps=3, checkpoint__every_steps=2))
    assert [r["step"] for r in log.records] == [1, 2, 3, 4, 5, 6, 7]
    assert [r["step"] for r in log.records if "validation_loss" in r] == [3, 6, 7]
    assert log.saved == [2, 4, 6, 7]
    assert [r["tokens"] for r in log.records] == [4 * 32 * i for i in range(1, 8)]
    assert all(r["busy_time_s"] <= r["step_time_s"] for r in log.records)
    assert log.records[0]["lr"] == pytest.approx(0.01 / 3)
    assert log.records[-1]["lr"] == pytest.approx(0.001)
    assert log.progress.first_loss == log.records[0]["loss"]
    assert log.records[-1]["loss"] < log.records[0]["loss"]


def test_a_request_to_stop_saves_and_leaves(build):
    log = Log()
    asked = iter([False, False, True])
    assert not log.run(build(checkpoint__every_steps=100), stop=lambda: next(asked))
    assert log.saved == [3]
    assert len(log.records) == 3


def test_a_request_at_the_last_step_is_a_finished_run(build):
    log = Log()
    assert log.run(build(train__steps=3), stop=lambda: len(log.records) == 2)
    assert log.saved == [2, 3]


def test_too_many_non_finite_steps_in_a_row_stop_the_run(build):
    assembly = build(train__max_nonfinite_steps=2)
    parameter = next(assembly.worker.model.parameters())
    parameter.data[:] = math.nan
    log = Log()
    with pytest.raises(
        RunFailedError,
        match=r"^3 steps in a row were left out, up to step 3 \(train.max_nonfinite_steps=2\), the last for "
        r"NaN or Inf in the gradient of embedding.weight, .*; lower optim.lr",
    ):
        log.run(assembly)
    assert [r["skipped"] for r in log.records] == [1, 2, 3]
    assert log.saved == [2]


def test_a_guard_counts_its_clips_and_names_spikes_when_the_run_fails(build):
    """A factor of 1 clips about every second step; later every step is called a spike."""
    guard = {"history": "global", "history_factor": 1.0, "history_warmup_steps": 1, "spike_skip": 3.0}
    assembly = build(train__steps=9, train__max_nonfinite_steps=1, optim__guard=guard, optim__clip_norm=None)
    log = Log()
    log.run(assembly, stop=lambda: len(log.records) == 4)
    clipped = [r["clipped"] for r in log.records]
    assert clipped == sorted(clipped) and 0 < clipped[-1] <= 4
    assert log.progress.clipped == clipped[-1] == assembly.worker.guard.check().n_clipped
    assembly.worker.guard.spike_skip = 1e-3
    with pytest.raises(
        RunFailedError, match=r"^2 steps in a row .* a spike by optim.guard.spike_skip=0.001; "
    ):
        log.run(assembly, log.progress)
    assert [r["skipped"] for r in log.records][-2:] == [1, 2]
    assert log.records[-1]["clipped"] == clipped[-1]


def test_clipping_by_the_limit_is_counted_too(build):
    log = Log()
    log.run(build(optim__clip_norm=1e-3))
    assert [r["clipped"] for r in log.records] == [1, 2, 3, 4, 5, 6]
    log.run(build(optim__clip_norm=None))
    assert log.progress.clipped == 0


def rates_of(losses, *, warmup_steps, total_steps, peak, **settings):
    """The rates that the schedule gives for the losses of a run."""
    config = PerfDecayConfig(**settings)
    decay = PerfExpDecay(config, peak=peak, total_steps=total_steps, warmup_steps=warmup_steps)
    rates = []
    for step, loss in enumerate(losses):
        rates.append(decay.rate(step))
        decay.record(loss)
    return rates


def test_the_performance_schedule_hears_the_loss_of_every_step(build):
    settings = {"interval_steps": 2, "target": 0.5}
    schedule = {"name": "performance", "warmup_steps": 2, "performance": settings}
    log = Log()
    log.run(build(train__steps=14, optim__schedule=schedule))
    losses = [r["loss"] for r in log.records]
    rates = [r["lr"] for r in log.records]
    assert rates == rates_of(losses, warmup_steps=2, total_steps=14, peak=0.01, **settings)
    assert rates != rates_of([1.0] * 14, warmup_steps=2, total_steps=14, peak=0.01, **settings)


def test_the_performance_schedule_may_watch_the_evaluations(build):
    schedule = {"name": "performance", "performance": {"metric": "validation", "target": 10.0}}
    log = Log()
    log.run(build(train__steps=9, train__evaluate_every_steps=3, optim__schedule=schedule))
    rates = [r["lr"] for r in log.records]
    falls = [b / a for a, b in zip(rates, rates[1:], strict=False)][2:]
    # Two evaluations make an improvement far from the target: from step 7 on the decay is faster.
    assert falls[0] == pytest.approx(falls[2]) and falls[3] < falls[2]


def test_all_workers_have_the_same_rate_from_different_shares_of_the_batch(make_config, corpus):
    schedule = {"name": "performance", "warmup_steps": 1, "performance": {"interval_steps": 1}}
    config = make_config(
        train__steps=8,
        optim__schedule=schedule,
        optim__guard={"history": "global", "history_warmup_steps": 2},
    )

    def body(comm):
        assembly, log = assemble(config, comm, corpus=corpus, hardware=HARDWARE), Log()
        log.run(assembly)
        return [(r["lr"], r["grad_norm"], r["clipped"]) for r in log.records]

    alone, (first, second) = body(Alone()), SimWorld(2).run(body)
    assert first == second
    assert [lr for lr, *_ in first] == pytest.approx([lr for lr, *_ in alone], rel=1e-4)


def test_a_bad_loss_moves_the_schedule_on_and_is_not_learned_from(build):
    schedule = {"name": "performance", "warmup_steps": 0, "performance": {"interval_steps": 1}}
    assembly = build(train__max_nonfinite_steps=20, optim__schedule=schedule)
    next(assembly.worker.model.parameters()).data[:] = math.nan
    log = Log()
    log.run(assembly)
    rates = [r["lr"] for r in log.records]
    assert rates == pytest.approx([0.01 * 0.3 ** (t / 6) for t in range(1, 7)], rel=1e-12)


def test_a_run_that_diverges_is_stopped_with_the_numbers(build):
    assembly = build(train__steps=200, train__max_loss_rise=0.5, optim__lr=30.0, optim__clip_norm=None)
    log = Log()
    with pytest.raises(
        RunFailedError, match=r"the run diverged: at step \d+ .*train.max_loss_rise=0.5.*lower optim.lr"
    ):
        log.run(assembly)
    assert len(log.records) < 200


def test_progress_comes_back_as_plain_values():
    progress = Progress(step=3, tokens=10, skipped=1, clipped=2, first_loss=2.5, last_loss=math.nan)
    progress.smoothed.update(2.0)
    again = Progress()
    again.load_state_dict(progress.state_dict())
    assert again.state_dict() == progress.state_dict()
    assert math.isnan(again.last_loss)
    assert again.validation_loss is None


def test_stopping_and_going_on_gives_the_same_losses(build):
    whole, first, second = Log(), Log(), Log()
    whole.run(build())
    assembly = build()
    first.run(assembly, stop=lambda: len(first.records) == 2)
    second.run(assembly, first.progress)
    assert [r["loss"] for r in first.records + second.records] == [r["loss"] for r in whole.records]
