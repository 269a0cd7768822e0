"""When replicas exchange: after a number of inner steps, or after a time.

Paper: J. Cheng et al., "EDiT: A Local-SGD-Based Efficient Distributed Training Method for Large Language
Models", 2024 (arXiv 2412.07210): EDiT counts steps, A-EDiT watches a clock. Fragments: A. Douillard et al.,
"Streaming DiLoCo with overlapping communication", 2025 (arXiv 2501.18512).
Letters: tau steps between two rounds, P fragments, p fragment from 0.

A trigger decides for one worker. All workers must decide alike: steps they share, a clock they do not, so one
worker of a replica is asked and tells the others.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

from hardy.config import ConfigError


class Trigger(Protocol):
    """Whether a round is due."""

    def due(self, step: int, now_s: float) -> bool:
        """Return whether a round is due.

        Args:
            step: finished inner steps since the warm-up ended.
            now_s: seconds of this worker's clock; only differences count.
        """
        ...

    def reset(self, now_s: float) -> None:
        """Start to count anew: a round ended or was left out, or the clock starts."""
        ...

    def enough(self, total_steps: int) -> bool:
        """Return whether `total_steps`, of all replicas since the last round, are worth a round."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take them back; the clock may have another zero by now."""
        ...


class EverySteps:
    """A round every `steps` inner steps; with fragments, one fragment of the model every steps / fragments.

    Args:
        steps: tau, inner steps between two rounds of the same fragment.
        fragments: P, parts of the model that are exchanged in turn; 1 is the whole model at once.

    Raises:
        ConfigError: a number below 1, or `steps` is no multiple of `fragments`.

    Example:
        >>> trigger = EverySteps(128)
        >>> [step for step in range(400) if trigger.due(step, 0.0)]
        [128, 256, 384]
        >>> [EverySteps(6, fragments=3).fragment_due(step) for step in range(9)]
        [None, None, 1, None, 2, None, 0, None, 1]
    """

    def __init__(self, steps: int, *, fragments: int = 1) -> None:
        if steps < 1 or fragments < 1:
            raise ConfigError(
                f"a round every steps={steps} inner steps in fragments={fragments}: both must be at least 1"
            )
        if steps % fragments:
            raise ConfigError(
                f"steps={steps} must be a multiple of fragments={fragments}, so that the fragments take "
                f"equal turns; {steps + fragments - steps % fragments} is the next"
            )
        self.steps, self.fragments = steps, fragments

    def fragment_due(self, step: int) -> int | None:
        """Return the fragment p that is due, or None.

        Fragment p is due where (step - floor(p tau / P)) mod tau = 0 and step > 0: at most one at a time.
        """
        turn, rest = divmod(step % self.steps, self.steps // self.fragments)
        return turn if step > 0 and rest == 0 else None

    def due(self, step: int, now_s: float) -> bool:
        """Return whether a fragment is due; the time is not looked at."""
        return self.fragment_due(step) is not None

    def reset(self, now_s: float) -> None:
        """Do nothing: the step says it all."""

    def enough(self, total_steps: int) -> bool:
        """Return True."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Do nothing."""


class EverySeconds:
    """A round every `seconds`: fast replicas do more steps meanwhile than slow ones.

    The first question only starts the clock. Only differences of one clock are used, in float64: a Unix time
    in fp32 moves in steps of 128 s.

    Args:
        seconds: between the end of a round and the next one.
        min_steps: inner steps of all replicas together below which a round is left out.

    Raises:
        ConfigError: no time, or `min_steps` below 1.

    Example:
        >>> trigger = EverySeconds(600.0, min_steps=100)
        >>> [trigger.due(step=0, now_s=1000.0), trigger.due(7, 1599.0), trigger.due(8, 1600.0)]
        [False, False, True]
        >>> trigger.enough(8)
        False
    """

    def __init__(self, seconds: float, *, min_steps: int) -> None:
        if not 0 < seconds < math.inf:
            raise ConfigError(f"a round every seconds={seconds}: the time must be above 0 and finite")
        if min_steps < 1:
            raise ConfigError(
                f"min_steps={min_steps} must be at least 1: a round without a step moves nothing and spoils "
                f"the statistics of norms"
            )
        self.seconds, self.min_steps = seconds, min_steps
        self._start_s: float | None = None
        self._seen_s = 0.0
        self._carried_s = 0.0

    def due(self, step: int, now_s: float) -> bool:
        """Return whether the time is over; the step is not looked at."""
        if self._start_s is None:
            self._start_s = now_s
        self._seen_s = now_s
        return self._elapsed_s() >= self.seconds

    def reset(self, now_s: float) -> None:
        """Count from `now_s`."""
        self._start_s = self._seen_s = now_s
        self._carried_s = 0.0

    def enough(self, total_steps: int) -> bool:
        """Return whether `total_steps` is at least `min_steps`."""
        return total_steps >= self.min_steps

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds from the last round to the last question."""
        return {"elapsed_s": self._elapsed_s()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with these seconds from the next question on; those in between do not count."""
        self._carried_s, self._start_s = float(state_dict["elapsed_s"]), None

    def _elapsed_s(self) -> float:
        """Return the seconds since the last round, as of the last question."""
        return self._carried_s + (0.0 if self._start_s is None else self._seen_s - self._start_s)
