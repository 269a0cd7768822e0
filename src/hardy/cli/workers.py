"""Start N workers on this machine and wait for them: signals go to all, and their exit codes become one.

Not torchrun, which turns every exit code into 1, adds a traceback of its own to the workers', and kills a
worker that needs more than 30 s to save. torchrun may still start hardy, on several machines too.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hardy.cli.environment import MEETING
from hardy.cli.failure import FAILURE, SUCCESS, USER_ERROR

GRACE_S = 20.0
"""What the other workers are given to end by themselves once one has failed."""
POLL_S = 0.05


def run_workers(num_workers: int, arguments: Sequence[str]) -> int:
    """Run `python -m hardy ARGUMENTS` in `num_workers` processes and return one exit code for all.

    SIGINT and SIGTERM are handed on, and the workers may take their time to save. When a worker fails, the
    others are told to end.
    """
    with tempfile.TemporaryDirectory(prefix="hardy-workers-") as folder, forwarded_signals() as received:
        workers: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(num_workers):
                environment = worker_environment(
                    os.environ, rank, num_workers, meeting=Path(folder) / "meeting"
                )
                command = [sys.executable, "-m", "hardy", *arguments]
                # A session of its own: Ctrl-C on a terminal reaches the workers once, through us.
                workers.append(subprocess.Popen(command, env=environment, start_new_session=True))
            return _wait(workers, received)
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                worker.wait()


def worker_environment(
    environment: Mapping[str, str], rank: int, num_workers: int, *, meeting: Path
) -> dict[str, str]:
    """Return the environment of one worker; the cores are shared out unless OMP_NUM_THREADS is set."""
    threads = max(1, (os.cpu_count() or 1) // num_workers)
    return (
        {"OMP_NUM_THREADS": str(threads)}
        | dict(environment)
        | {
            "RANK": str(rank),
            "WORLD_SIZE": str(num_workers),
            "LOCAL_RANK": str(rank),
            MEETING: meeting.as_uri(),
        }
    )


def joint_code(codes: Sequence[int], signal_number: int | None) -> int:
    """Return one exit code for workers that ended with `codes` after `signal_number` came, if any.

    Example:
        >>> joint_code([0, 0], None), joint_code([2, 143], None), joint_code([-9, 143], None)
        (0, 2, 1)
    """
    if not any(codes):
        return SUCCESS
    stopping = {signal.SIGTERM, signal_number or signal.SIGTERM}  # SIGTERM: what we send when one has failed
    told_to_stop = {SUCCESS} | {-number for number in stopping} | {128 + number for number in stopping}
    own = [code for code in codes if code not in told_to_stop]
    if own:
        return USER_ERROR if all(code == USER_ERROR for code in own) else FAILURE
    return 128 + signal_number if signal_number else FAILURE


@contextmanager
def forwarded_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, to be handed on, instead of ending."""
    received: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: Sequence["subprocess.Popen[bytes]"], received: Sequence[int]) -> int:
    """Wait until all have ended; hand signals on, and end the rest when one has failed."""
    forwarded, deadline_s = 0, None
    while any(worker.poll() is None for worker in workers):
        for number in received[forwarded:]:
            _tell(workers, number)
            forwarded += 1
        if deadline_s is None and not received and any(worker.poll() for worker in workers):
            _tell(workers, signal.SIGTERM)
            deadline_s = time.monotonic() + GRACE_S
        if deadline_s is not None and time.monotonic() > deadline_s:
            _tell(workers, signal.SIGKILL)
        time.sleep(POLL_S)
    return joint_code([worker.wait() for worker in workers], received[0] if received else None)


def _tell(workers: Sequence["subprocess.Popen[bytes]"], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)
