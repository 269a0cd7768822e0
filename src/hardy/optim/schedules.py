"""Learning rate as a pure function of the step: linear warm-up, then one of five shapes."""

import math

from hardy.config import ConfigError
from hardy.optim.config import ScheduleConfig


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
    """
    check_warmup(schedule.warmup_steps, total_steps=total_steps)
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
