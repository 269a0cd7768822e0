"""The workers of one replica, started and ended together: whoever loses one loses all."""

import signal
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from hardy.cli.failure import FAILURE, SUCCESS

LOST_GRACE_S = 5.0
"""What the others of a replica are given to end once one of them was lost: they have nothing to save."""


class Running(Protocol):
    """A replica while it runs: a process (`subprocess.Popen`), or a `Team`."""

    def poll(self) -> int | None:
        """Return the exit code, below 0 for a signal; None while it runs."""
        ...

    def send_signal(self, number: int, /) -> None:
        """Send a signal."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...

    def wait(self) -> int:
        """Wait for its end and return the exit code."""
        ...


class Team:
    """Processes that end as one.

    One that ends otherwise than well, or than it was told to, is lost. The others are told to end then, and
    killed if they do not within `LOST_GRACE_S`; the code of all is that of the one that was lost.

    Args:
        workers: the processes.
        report_loss: called at once when one is lost, long before all have ended.
    """

    def __init__(self, workers: Sequence[Running], report_loss: Callable[[], None]) -> None:
        self._workers, self._report_loss = list(workers), report_loss
        self._told: set[int] = set()
        self._cause: int | None = None
        self._deadline_s = 0.0

    def poll(self) -> int | None:
        """Return the exit code once all have ended; see to those that lost one of them. Call it often."""
        codes = [worker.poll() for worker in self._workers]
        lost = [code for code in codes if code is not None and not self._is_well(code)]
        if lost and self._cause is None:
            # One whose neighbour is gone fails itself, with this code, and may be seen in the same moment.
            self._cause = next((code for code in lost if code != FAILURE), lost[0])
            self._deadline_s = time.monotonic() + LOST_GRACE_S
            self._report_loss()
            tell(self._workers, signal.SIGTERM)
        elif lost and time.monotonic() > self._deadline_s:
            tell(self._workers, signal.SIGKILL)
        if None in codes:
            return None
        return self._cause if self._cause is not None else next((code for code in codes if code), SUCCESS)

    def send_signal(self, number: int, /) -> None:
        """Send a signal to all that run."""
        self._told.add(number)
        tell(self._workers, number)

    def kill(self) -> None:
        """End all at once."""
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        """Wait until all have ended and return the exit code."""
        for worker in self._workers:
            worker.wait()
        code = self.poll()
        assert code is not None, "all have ended"
        return code

    def _is_well(self, code: int) -> bool:
        return code == SUCCESS or any(is_told(code, number) for number in self._told)


def tell(processes: Iterable[Running], number: int) -> None:
    """Send a signal to those that run."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def is_told(code: int, number: int) -> bool:
    """Return whether an exit code is that of one who ended because of a signal.

    Example:
        >>> is_told(-15, 15), is_told(143, 15), is_told(-9, 15)
        (True, True, False)
    """
    return code in (-number, 128 + number)
