"""What stops training: the first signal asks the loop to save and stop, the second ends the process at once;
a reader of our output that goes away asks as a signal does.
"""

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from hardy.cli.failure import Terminated


def stopping_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask to stop: Ctrl-C, `kill`, and but for `nohup` the end of the terminal."""
    hears_terminal = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hears_terminal else ()))


class StopSignal:
    """While entered, remembers the signal that asked to stop.

    Before training has first asked (data is being prepared, nothing is worth saving), a signal ends the
    process at once; so does the second one.
    """

    def __init__(self, *, launcher: int | None = None) -> None:
        """Take the process that started this worker; when it is gone, nobody waits for this one."""
        self.number: int | None = None
        self._launcher = launcher
        self._is_training = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> int | None:
        """Return the signal that came, if any; training asks this once a step."""
        self._is_training = True
        if self.number is None and self._launcher not in (None, os.getppid()):
            self.number = signal.SIGTERM
        return self.number

    def __enter__(self) -> "StopSignal":
        """Take over the signals that ask to stop."""
        self._before = {number: signal.signal(number, self._on_signal) for number in stopping_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reader_gone(self) -> None:
        """Stop as after a signal: what reads our output went away, as `head` does."""
        if self.number is None:
            self.number = signal.SIGPIPE

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._is_training and self.number is None:
            self.number = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise Terminated
