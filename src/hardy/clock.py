"""Time is handed in: code that measures or waits takes a `Clock`, so a slow worker costs a test nothing."""

import time
from typing import Protocol


class Clock(Protocol):
    """What code may ask of time."""

    def now(self) -> float:
        """Return seconds since some fixed moment; only differences mean anything."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let `seconds` pass."""
        ...


class WallClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Return monotonic seconds."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """Block for `seconds`."""
        time.sleep(seconds)


class VirtualClock:
    """A clock that moves only when told; one per simulated worker.

    Example:
        >>> clock = VirtualClock()
        >>> clock.sleep(600.0)
        >>> clock.now()
        600.0
    """

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        """Return the virtual time in seconds."""
        return self._now_s

    def sleep(self, seconds: float) -> None:
        """Advance by `seconds` at once."""
        if not seconds >= 0:
            raise ValueError(f"time only moves forward, got a step of {seconds} s")
        self._now_s += seconds

    def advance_to(self, moment_s: float) -> None:
        """Move to `moment_s`, or stay when it has passed."""
        self._now_s = max(self._now_s, moment_s)
