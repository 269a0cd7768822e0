"""Learning rate as a pure function of the step: linear warm-up, then one of five shapes.

The sixth choice, `performance`, follows the loss and lives in `perf_decay`; `build_schedule` gives both kinds
one face.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from hardy.config import ConfigError
from hardy.optim.config import ScheduleConfig
from hardy.optim.perf_decay import PerfExpDecay


class Schedule(Protocol):
    """What a training loop asks for its learning rate, and tells what came of it."""

    def rate(self, step: int) -> float:
        """Return the learning rate of `step`, counted from 0."""
        ...

    def record(self, loss: float) -> None:
        """End a step, skipped or not, with the loss of its global batch."""
        ...

    def observe(self, value: float) -> None:
        """Take note of a validation loss."""
        ...

    def reset(self, *, at_step: int = 0) -> None:
        """Forget what was recorded; the coming step is `at_step`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        ...


@dataclass(frozen=True, kw_only=True)
class FixedSchedule:
    """A schedule known in advance: `learning_rate` with its arguments. It has no state and hears nothing."""

    config: ScheduleConfig
    peak: float
    total_steps: int

    def rate(self, step: int) -> float:
        """Return the learning rate of `step`."""
        return learning_rate(step, total_steps=self.total_steps, peak=self.peak, schedule=self.config)

    def record(self, loss: float) -> None:
        """Do nothing."""

    def observe(self, value: float) -> None:
        """Do nothing."""

    def reset(self, *, at_step: int = 0) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


def build_schedule(config: ScheduleConfig, *, peak: float, total_steps: int) -> Schedule:
    """Return the schedule that `config` names.

    Example:
        >>> build_schedule(ScheduleConfig(name="constant", warmup_steps=0), peak=0.5, total_steps=9).rate(8)
        0.5

    Raises:
        ConfigError: the warm-up is as long as the run or longer.
    """
    check_warmup(config.warmup_steps, total_steps=total_steps)
    if config.name != "performance":
        return FixedSchedule(config=config, peak=peak, total_steps=total_steps)
    return PerfExpDecay(
        config.performance, peak=peak, total_steps=total_steps, warmup_steps=config.warmup_steps
    )


def learning_rate(step: int, *, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Return the learning rate of `step`, counted from 0.

    Steps 0 ... warmup_steps - 1 rise linearly from peak / (warmup_steps + 1); step `warmup_steps` runs at the
    peak; the last step, total_steps - 1, runs at exactly peak * final_fraction, also where both are the same
    step. `constant` stays at the peak. `wsd` (warm-up, stable, decay) leaves the peak for the last
    `decay_fraction` of all steps, at the earliest when the warm-up ends.

    Example:
        >>> falling = ScheduleConfig(name="linear", warmup_steps=2, final_fraction=0.0)
        >>> [round(learning_rate(s, total_steps=7, peak=3.0, schedule=falling), 3) for s in range(7)]
        [1.0, 2.0, 3.0, 2.25, 1.5, 0.75, 0.0]

    Raises:
        ConfigError: the warm-up is as long as the run or longer.
        ValueError: the step is not one of the run's, or the schedule is `performance`.
    """
    check_warmup(schedule.warmup_steps, total_steps=total_steps)
    if schedule.name == "performance":
        raise ValueError("the schedule performance depends on the losses so far; use build_schedule")
    if not 0 <= step < total_steps:
        raise ValueError(f"step must be from 0 to {total_steps - 1}, got {step}")
    start, last = schedule.warmup_steps, total_steps - 1
    if step < start:
        return peak * (step + 1) / (start + 1)
    if schedule.name == "constant":
        return peak
    if step == last:
        return peak * schedule.final_fraction
    if schedule.name == "wsd":
        start = max(start, last - max(1, round(schedule.decay_fraction * total_steps)))
    return peak * _share_of_peak(max(0.0, (step - start) / (last - start)), schedule)


def check_warmup(warmup_steps: int, *, total_steps: int) -> None:
    """Refuse a warm-up that leaves no step at the peak."""
    if warmup_steps >= total_steps:
        raise ConfigError(
            f"optim.schedule.warmup_steps={warmup_steps} must be below train.steps={total_steps}, or the run "
            f"ends before the warm-up does; set optim.schedule.warmup_steps to {total_steps // 10} or raise "
            f"train.steps"
        )


def _share_of_peak(progress: float, schedule: ScheduleConfig) -> float:
    """Return the share of the peak when `progress` of the decay is over: 1 at 0, `final_fraction` at 1."""
    if schedule.name == "exponential":
        return schedule.final_fraction**progress
    left = (1 + math.cos(math.pi * progress)) / 2 if schedule.name == "cosine" else 1 - progress
    return left + (1 - left) * schedule.final_fraction
