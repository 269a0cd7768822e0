"""A learning rate that falls exponentially, and faster while the loss stalls. Arithmetic on the host only.

Paper: "Adaptive Optimization for Enhanced Efficiency in LLM Training" (arXiv 2412.04718) says no more than a
large initial rate with exponential decay "based on performance metrics". What stands here is hardy's reading
of it; formulas and constants are ours, none is the paper's.
Letters: t step from 1, T total_steps, w warmup_steps, C clock, s stall, a improvement, v observed value,
k_slow and k_fast slow_rate and fast_rate (decay per step).

    k = k_slow + s (k_fast - k_slow);  C grows by k in each step t > w
    rate of step t = peak * min(1, t / w) * max(exp(-C), final_fast)
    at an observation v after an earlier one:  i = (previous - v) / |previous|,
    a = i the first time, else beta a + (1 - beta) i;  s = 1 - a / target, cut to 0 ... 1
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from hardy.config import ConfigError
from hardy.optim.config import PerfDecayConfig

LARGEST_DELAY_STEPS = 8
"""Steps between the end of an interval and the use of its mean, where the caller names none."""
TINY = 1e-12
"""Below this an earlier value counts as this large, so that an improvement from 0 is defined."""


@dataclass(kw_only=True)
class _State:
    """All that changes, and what the decay rates were computed from."""

    total_steps: int
    warmup_steps: int
    final_slow: float
    final_fast: float
    slow_rate: float = 0.0
    fast_rate: float = 0.0
    step: int = 0
    """Steps done."""
    clock: float = 0.0
    """C when the decay per step last changed."""
    held_steps: int = 0
    """Steps since; C is clock + held_steps * k, so it does not gather a rounding per step."""
    stall: float = 0.0
    improvement: float | None = None
    previous: float | None = None
    sum: float = 0.0
    count: int = 0
    """Losses in `sum`."""
    pending: float | None = None
    """An interval's mean that is not used yet."""
    due_step: int = 0
    best: float | None = None
    bad: int = 0
    cooldown: int = 0


class PerfExpDecay:
    """Exponential decay between a slow and a fast curve, led by the loss.

    While the watched loss improves by `target` per observation the rate follows the slow exponential, which
    ends at final_slow; while it does not improve the fast one, which ends at final_fast; in between a blend.
    After T the decay goes on, down to final_fast. Every worker must be fed the same values, such as the loss
    of the global batch; then all have the same rate without talking to each other.

    Ask for `rate`, make the step, hand its loss to `record`; also for steps that were skipped, since their
    data is consumed.

    Args:
        config: mode, limits and what is watched.
        peak: rate at the end of the warm-up.
        total_steps: planned steps.
        warmup_steps: steps of linear rise; None means 5 % of `total_steps`.
        delay_steps: steps between an interval's end and the use of its mean, at most an interval, for losses
            that are read late; None means the interval, at most 8.
        goal: whether a smaller or a larger value is better.

    Raises:
        ConfigError: the warm-up is as long as the run, or the delay longer than an interval.

    Example:
        >>> slow = PerfDecayConfig(mode="time", final_slow=0.25)
        >>> decay = PerfExpDecay(slow, peak=1.0, total_steps=4, warmup_steps=2)
        >>> rates = []
        >>> for step in range(4):
        ...     rates.append(round(decay.rate(step), 3))
        ...     decay.record(2.0)
        >>> rates
        [0.5, 1.0, 0.5, 0.25]

    A resume with another T, w or final share keeps C and spreads what is left of both curves over the steps
    that are left.
    """

    def __init__(
        self,
        config: PerfDecayConfig | None = None,
        *,
        peak: float,
        total_steps: int,
        warmup_steps: int | None = None,
        delay_steps: int | None = None,
        goal: Literal["min", "max"] = "min",
    ) -> None:
        config = config or PerfDecayConfig()
        warmup_steps = round(0.05 * total_steps) if warmup_steps is None else warmup_steps
        if not 0 <= warmup_steps < total_steps:
            raise ConfigError(
                f"warmup_steps={warmup_steps} must be at least 0 and below total_steps={total_steps}, or "
                f"nothing is left to decay over; lower the first or raise the second"
            )
        self.interval_steps = config.interval_steps or max(1, round(0.02 * total_steps))
        self.delay_steps = (
            min(self.interval_steps, LARGEST_DELAY_STEPS) if delay_steps is None else delay_steps
        )
        if not 0 <= self.delay_steps <= self.interval_steps:
            raise ConfigError(
                f"delay_steps={self.delay_steps} must be from 0 to the interval of {self.interval_steps} "
                f"steps, or two means would wait at once; lower it or raise interval_steps"
            )
        self.config, self.peak = config, peak
        self._sign = 1.0 if goal == "min" else -1.0
        self._state = _State(
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            final_slow=config.final_slow,
            final_fast=config.final_fast,
        )
        self._spread_rates()

    @property
    def steps_done(self) -> int:
        """Steps that were recorded, which is the step (from 0) that `rate` gives the rate of."""
        return self._state.step

    @property
    def stall(self) -> float:
        """How much of the way from the slow to the fast decay is taken, 0 to 1."""
        return self._state.stall

    @property
    def share(self) -> float:
        """Rate of the coming step as a share of the peak."""
        state, t = self._state, self._state.step + 1
        rise = min(1.0, t / state.warmup_steps) if state.warmup_steps else 1.0
        decayed = self._clock(1) if t > state.warmup_steps else self._clock()
        return rise * max(math.exp(-decayed), self.config.final_fast)

    def rate(self, step: int) -> float:
        """Return the learning rate of `step`, counted from 0, which must be the coming one.

        Raises:
            ValueError: another step; the schedule needs every loss in order.
        """
        if step != self._state.step:
            raise ValueError(
                f"the schedule stands before step {self._state.step} and was asked for step {step}; record "
                f"every step's loss, load the state of the checkpoint, or reset(at_step={step})"
            )
        return self.peak * self.share

    def record(self, loss: float) -> None:
        """End a step: the clock goes on, and the step's loss counts toward its interval.

        The mean of an interval that holds a NaN or infinite loss is ignored.
        """
        state = self._state
        state.step += 1
        if state.step <= state.warmup_steps:
            return
        state.held_steps += 1  # before a new decay rate comes into force: the step ran at the old one
        self._use_pending()
        if self.config.metric != "training":
            return
        state.sum += loss
        state.count += 1
        if state.count >= self.interval_steps:
            state.pending, state.due_step = state.sum / state.count, state.step + self.delay_steps
            state.sum, state.count = 0.0, 0
            self._use_pending()

    def observe(self, value: float) -> None:
        """Take an evaluation into account, from the coming step on; only where the config watches it."""
        if self.config.metric == "validation" and self._state.step > self._state.warmup_steps:
            self._take(value)

    def reset(self, *, at_step: int = 0) -> None:
        """Forget the past and decay from the peak; at_step 0 also warms up anew."""
        old = self._state
        self._state = _State(
            total_steps=old.total_steps,
            warmup_steps=old.warmup_steps,
            final_slow=old.final_slow,
            final_fast=old.final_fast,
            step=at_step,
        )
        self._spread_rates()

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        return asdict(self._state)

    def load_state_dict(self, state_dict: dict[str, Any], *, reset_schedule: bool = False) -> None:
        """Go on where the state was taken; where T, w or a final share is another now, by new decay rates.

        Args:
            state_dict: from `state_dict`.
            reset_schedule: start over instead, for weights that are the start of another run.
        """
        if reset_schedule:
            self.reset()
            return
        now = {key: getattr(self._state, key) for key in _RATES_COME_FROM}
        self._state = _State(**state_dict)
        if any(getattr(self._state, key) != value for key, value in now.items()):
            for key, value in now.items():
                setattr(self._state, key, value)
            self._spread_rates()

    def _clock(self, more_steps: int = 0) -> float:
        """Return C, `more_steps` ahead."""
        return self._state.clock + (self._state.held_steps + more_steps) * self._decay_per_step()

    def _decay_per_step(self) -> float:
        state = self._state
        if self.config.mode == "plateau":
            return 0.0
        return state.slow_rate + state.stall * (state.fast_rate - state.slow_rate)

    def _spread_rates(self) -> None:
        """Choose the decay rates so that what is left of each curve takes the steps that are left."""
        state = self._state
        state.clock, state.held_steps = self._clock(), 0
        left_steps = max(1, state.total_steps - max(state.step, state.warmup_steps))
        state.slow_rate = max(0.0, (-math.log(state.final_slow) - state.clock) / left_steps)
        state.fast_rate = max(0.0, (-math.log(state.final_fast) - state.clock) / left_steps)

    def _use_pending(self) -> None:
        state = self._state
        if state.pending is not None and state.step >= state.due_step:
            value, state.pending = state.pending, None
            self._take(value)

    def _take(self, value: float) -> None:
        """Let one observation act."""
        if not math.isfinite(value):
            return
        value *= self._sign
        if self.config.mode == "perf":
            self._take_progress(value)
        elif self.config.mode == "plateau":
            self._take_plateau(value)

    def _take_progress(self, value: float) -> None:
        state, config = self._state, self.config
        if state.previous is not None:
            gained = (state.previous - value) / max(abs(state.previous), TINY)
            if state.improvement is not None:
                gained = config.smoothing * state.improvement + (1 - config.smoothing) * gained
            state.improvement = gained
            state.clock, state.held_steps = self._clock(), 0
            state.stall = min(1.0, max(0.0, 1 - gained / config.target))
        state.previous = value

    def _take_plateau(self, value: float) -> None:
        state, config = self._state, self.config
        if state.cooldown > 0:
            state.cooldown -= 1
            return
        if state.best is None or value < state.best - config.threshold * abs(state.best):
            state.best, state.bad = value, 0
            return
        state.bad += 1
        if state.bad >= config.patience:
            state.clock -= math.log(config.factor)
            state.bad, state.cooldown = 0, config.cooldown


_RATES_COME_FROM = ("total_steps", "warmup_steps", "final_slow", "final_fast")


class _HasGroups(Protocol):
    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


def write_rates(optimizer: _HasGroups, *, base_rates: Iterable[float], share: float) -> None:
    """Give each group its own base rate times `share`; a rate kept in a tensor is overwritten in place.

    Args:
        optimizer: whose groups are changed.
        base_rates: each group's rate at the peak.
        share: `PerfExpDecay.share`.
    """
    for group, base in zip(optimizer.param_groups, base_rates, strict=True):
        if hasattr(group["lr"], "fill_"):
            group["lr"].fill_(base * share)
        else:
            group["lr"] = base * share
