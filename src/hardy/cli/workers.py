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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Protocol

from hardy.cli.environment import MEETING, REPLICA_SIZE, RESTARTS, STORE
from hardy.cli.failure import FAILURE, READER_GONE, SAID, SUCCESS, USER_ERROR
from hardy.cli.stop import stopping_signals
from hardy.cli.team import Running, Team, is_told, tell

GRACE_S = 20.0
"""What the other workers are given to end by themselves once one has failed."""
END_S = 600.0
"""What replicas that come and go are given to end once the first of them has reached the end."""
POLL_S = 0.05


def run_workers(num_workers: int, arguments: Sequence[str]) -> int:
    """Run `python -m hardy ARGUMENTS` in `num_workers` processes and return one exit code for all.

    SIGINT, SIGTERM and SIGHUP are handed on, and the workers may take their time to save. When a worker
    fails, the others are told to end.
    """
    with tempfile.TemporaryDirectory(prefix="hardy-workers-") as folder, forwarded_signals() as received:
        workers: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(num_workers):
                said = {MEETING: (Path(folder) / "meeting").as_uri(), SAID: folder}
                workers.append(_begin(arguments, worker_environment(os.environ, rank, num_workers, said)))
            return _wait(workers, received)
        finally:
            _end(workers)


class Host(Protocol):
    """What ties replicas together that come and go, held by their launcher: `StoreHost`, `ElectionHost`."""

    address: str

    def report_loss(self, replica: int) -> None:
        """Tell the others that a replica has ended."""
        ...


def run_replicas(
    num_replicas: int,
    arguments: Sequence[str],
    host: Host,
    *,
    max_restarts: int,
    setting: str = "strategy.max_restarts",
    replica_size: int = 1,
) -> int:
    """Run `python -m hardy ARGUMENTS` in processes that may be lost: the others go on, and it begins again.

    The workers of a replica begin and end together: when one is lost, the others of it are told to end, and
    all begin again and meet at a new place.

    A replica whose settings cannot work (exit code 2) is not started again; where it had never been lost, the
    others are told to end, for their settings are the same. Signals are handed on as by `run_workers`.

    Args:
        num_replicas: each is a world of its own.
        arguments: of the command.
        host: what ties them together.
        max_restarts: how often each is started again.
        setting: the name under which a user may change that.
        replica_size: processes of each, neighbours in rank.
    """

    def begin(replica: int, restarts: int) -> Running:
        said = {STORE: host.address, RESTARTS: str(restarts), SAID: folder}
        if replica_size == 1:
            return _begin(arguments, worker_environment(os.environ, replica, num_replicas, said))
        said[MEETING] = (Path(folder) / f"meeting-{replica}-{restarts}").as_uri()
        said[REPLICA_SIZE] = str(replica_size)
        first, size = replica * replica_size, num_replicas * replica_size
        return Team(
            [
                _begin(arguments, worker_environment(os.environ, rank, size, said))
                for rank in range(first, first + replica_size)
            ],
            partial(host.report_loss, replica),
        )

    with tempfile.TemporaryDirectory(prefix="hardy-workers-") as folder, forwarded_signals() as received:
        crew = Crew(begin, host.report_loss, max_restarts=max_restarts, setting=setting)
        try:
            for replica in range(num_replicas):
                crew.start(replica)
            while crew.running:
                crew.look(received)
                time.sleep(POLL_S)
            return crew.joint_code(received[0] if received else None)
        finally:
            _end(crew.running.values())


class Crew:
    """Replicas that are started again when they are lost.

    Args:
        begin: starts a replica, given its number and how often it was lost.
        report_loss: tells the others of a loss.
        max_restarts: how often each is started again.
        setting: the name under which a user may change that.
    """

    def __init__(
        self,
        begin: Callable[[int, int], Running],
        report_loss: Callable[[int], None],
        *,
        max_restarts: int,
        setting: str,
    ) -> None:
        self._begin, self._report_loss = begin, report_loss
        self._max_restarts, self._setting = max_restarts, setting
        self.running: dict[int, Running] = {}
        self.codes: dict[int, int] = {}
        """Of those that will not begin again."""
        self._restarts: dict[int, int] = {}
        self._forwarded = 0
        self._deadline_s: float | None = None

    def start(self, replica: int) -> None:
        """Start a replica for the first time."""
        self._restarts[replica] = 0
        self.running[replica] = self._begin(replica, 0)

    def look(self, received: Sequence[int]) -> None:
        """Hand on signals that came, and see to the replicas that have ended."""
        for number in received[self._forwarded :]:
            tell(self.running.values(), number)
            self._forwarded += 1
        for replica, process in list(self.running.items()):
            code = process.poll()
            if code is not None:
                del self.running[replica]
                self._take(replica, code, is_stopping=bool(received))
        if self._deadline_s is not None and time.monotonic() > self._deadline_s:
            tell(self.running.values(), signal.SIGKILL)

    def joint_code(self, signal_number: int | None) -> int:
        """Return one exit code for all: that of those who came to the end, if any did."""
        codes = list(self.codes.values())
        if SUCCESS in codes:
            return SUCCESS
        stopped = signal_number is not None and any(is_told(code, signal_number) for code in codes)
        return 128 + signal_number if stopped and signal_number else joint_code(codes, signal_number)

    def _take(self, replica: int, code: int, *, is_stopping: bool) -> None:
        """Note how a replica ended; start it again if that helps."""
        if code == SUCCESS or is_stopping:
            tell(self.running.values(), signal.SIGCONT)  # one that was stopped sees that it was left out
        if code == SUCCESS:
            self.codes[replica] = code
            self._give(END_S)
            return
        self._report_loss(replica)
        lost = self._restarts[replica]
        if is_stopping or self._deadline_s is not None:
            self.codes[replica] = code
        elif code == USER_ERROR:
            self.codes[replica] = code
            if lost == 0:
                tell(self.running.values(), signal.SIGTERM)
                self._give(GRACE_S)
        elif lost < self._max_restarts:
            self._restarts[replica] += 1
            _say(f"replica {replica} ended {_how(code)}; started again ({lost + 1} of {self._max_restarts})")
            self.running[replica] = self._begin(replica, lost + 1)
        else:
            self.codes[replica] = code
            _say(
                f"replica {replica} ended {_how(code)} and is not started again "
                f"({self._setting}={self._max_restarts}); {len(self.running)} go on"
            )

    def _give(self, seconds: float) -> None:
        """Let the others end by themselves, so long."""
        if self._deadline_s is None:
            self._deadline_s = time.monotonic() + seconds


def _say(text: str) -> None:
    print(f"hardy: {text}", file=sys.stderr, flush=True)


def _how(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"


def _begin(arguments: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    # A session of its own: Ctrl-C on a terminal reaches the workers once, through us.
    command = [sys.executable, "-m", "hardy", *arguments]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _end(workers: Iterable[Running]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
        worker.wait()


def worker_environment(
    environment: Mapping[str, str], rank: int, num_workers: int, said: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment of one worker; the cores are shared out unless OMP_NUM_THREADS is set.

    Args:
        environment: ours.
        rank: the worker, from 0.
        num_workers: how many there are.
        said: how it finds the others.
    """
    threads = max(1, (os.cpu_count() or 1) // num_workers)
    return (
        {"OMP_NUM_THREADS": str(threads)}
        | dict(environment)
        | {
            "RANK": str(rank),
            "WORLD_SIZE": str(num_workers),
            "LOCAL_RANK": str(rank),
        }
        | dict(said)
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
    told_to_stop = (
        {SUCCESS, READER_GONE} | {-number for number in stopping} | {128 + number for number in stopping}
    )
    own = [code for code in codes if code not in told_to_stop]
    if own:
        return USER_ERROR if all(code == USER_ERROR for code in own) else FAILURE
    if signal_number:
        return 128 + signal_number
    return READER_GONE if READER_GONE in codes else FAILURE


@contextmanager
def forwarded_signals() -> Iterator[list[int]]:
    """Collect the signals that ask to stop in a list, to be handed on, instead of ending."""
    received: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, remember) for number in stopping_signals()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: Sequence["subprocess.Popen[bytes]"], received: Sequence[int]) -> int:
    """Wait until all have ended; hand signals on, and end the rest when one has failed."""
    forwarded, deadline_s = 0, None
    deaf: list[subprocess.Popen[bytes]] = []
    while any(worker.poll() is None for worker in workers):
        for number in received[forwarded:]:
            tell(workers, number)
            forwarded += 1
        if deadline_s is None and not received and any(worker.poll() for worker in workers):
            tell(workers, signal.SIGTERM)
            deadline_s = time.monotonic() + GRACE_S
        if not deaf and deadline_s is not None and time.monotonic() > deadline_s:
            deaf = [worker for worker in workers if worker.poll() is None]
            tell(deaf, signal.SIGKILL)
        time.sleep(POLL_S)
    # One that we had to kill has not failed of itself: it waited for the one that has.
    codes = [-signal.SIGTERM if worker in deaf else worker.wait() for worker in workers]
    return joint_code(codes, received[0] if received else None)
