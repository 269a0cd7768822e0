"""The loop: right cadence, right schedule, and a run that only wastes time is stopped."""

import math

import pytest

from hardy.distributed.comm import Alone
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
        RunFailedError, match=r"not finite in 3 steps in a row.*train.max_nonfinite_steps=2.*optim.lr"
    ):
        log.run(assembly)
    assert [r["skipped"] for r in log.records] == [1, 2, 3]
    assert log.saved == [2]


def test_a_run_that_diverges_is_stopped_with_the_numbers(build):
    assembly = build(train__steps=200, train__max_loss_rise=0.5, optim__lr=30.0, optim__clip_norm=None)
    log = Log()
    with pytest.raises(
        RunFailedError, match=r"the run diverged: at step \d+ .*train.max_loss_rise=0.5.*lower optim.lr"
    ):
        log.run(assembly)
    assert len(log.records) < 200


def test_progress_comes_back_as_plain_values():
    progress = Progress(step=3, tokens=10, skipped=1, first_loss=2.5, last_loss=math.nan)
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
