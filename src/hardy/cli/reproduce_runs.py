"""Runs experiments as processes of their own, shows how far they are, and judges what came out."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hardy.cli.failure import CommandFailedError
from hardy.cli.reproduce_results import RESULT_FILE, Experiment, Result, library_hash, load_result
from hardy.config import UserError, reason_of

PROGRESS = re.compile(r"\[(\d+)/(\d+)\] (.*)")
"""How `run.py` says that one more trial is done."""
LAST_LINES = 15
"""Of an experiment that failed, shown."""
Show = Callable[[int, int, str], None]
"""Takes the number of trials that are done, of all, and the name of the last."""


@dataclass(frozen=True, kw_only=True)
class Runner:
    """How experiments are run."""

    out: Path
    """A folder for results, with a folder for each experiment."""
    jobs: int
    """Trials at once, of one thread each."""
    is_smoke: bool = False
    """Whether runs take seconds and prove nothing."""
    force: bool = False
    """Whether what is there already is thrown away."""
    write: bool = False
    """Whether the experiment's own result files and page are written too."""

    def finished(self, experiment: Experiment) -> Result | None:
        """Return the result in the out folder if it was made with the present scripts and library."""
        result = load_result(self.out / experiment.name / RESULT_FILE.name)
        if result is None or result.settings_hash != experiment.settings_hash:
            return None
        return result if result.circumstances.get("library_hash") == library_hash() else None

    def run(self, experiment: Experiment, show: Show) -> Result | None:
        """Run one experiment and return its result; none of a smoke run.

        Raises:
            CommandFailedError: the script failed; the text holds its last lines.
        """
        if self.is_smoke:
            with tempfile.TemporaryDirectory() as folder:
                self._call(experiment, Path(folder), show)
            return None
        folder = self.out.absolute() / experiment.name
        if self.force and folder.exists():
            for name in ("trials.jsonl", RESULT_FILE.name):
                (folder / name).unlink(missing_ok=True)
        held = None if self.write else self.finished(experiment)
        if held is not None:
            return held
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.out} cannot be written: {reason_of(error)}") from None
        self._call(experiment, folder, show)
        result = load_result(folder / RESULT_FILE.name)
        if result is None:
            raise CommandFailedError(f"{experiment.name} ended well but wrote no {folder / RESULT_FILE.name}")
        return result

    def _call(self, experiment: Experiment, folder: Path, show: Show) -> None:
        words = [sys.executable, "-u", str(experiment.folder / "run.py"), "--out", str(folder)]
        words += ["--processes", str(self.jobs)]
        words += ["--smoke"] if self.is_smoke else ["--write"] if self.write else []
        with (folder / "log.txt").open("w", encoding="utf-8") as log, _process(words) as lines:
            code = lines.follow(lambda line: _tell(line, log.write, show))
        if code:
            last = (folder / "log.txt").read_text(encoding="utf-8").splitlines()[-LAST_LINES:]
            raise CommandFailedError(f"{experiment.name} failed with exit code {code}:\n" + "\n".join(last))


@dataclass(frozen=True)
class _Lines:
    """The output of a process."""

    process: subprocess.Popen[str]

    def follow(self, take: Callable[[str], None]) -> int:
        """Hand on every line; return the exit code."""
        for line in self.process.stdout or ():
            take(line)
        return self.process.wait()


@contextmanager
def _process(words: list[str]) -> Iterator[_Lines]:
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
    ) as process:
        try:
            yield _Lines(process)
        except BaseException:
            process.terminate()  # its finished trials are kept
            raise


def _tell(line: str, write: Callable[[str], object], show: Show) -> None:
    write(line)
    if found := PROGRESS.fullmatch(line.rstrip()):
        show(int(found[1]), int(found[2]), found[3])


class PlainProgress:
    """A line now and then.

    Args:
        name: of the experiment.
        say: takes a line.
        every_s: seconds between two lines.
        now: a clock in seconds.
    """

    def __init__(
        self,
        name: str,
        say: Callable[[str], None],
        *,
        every_s: float = 30.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.say, self.every_s, self.now = name, say, every_s, now
        self.last_s = now()

    def __call__(self, done: int, total: int, label: str) -> None:
        """Say how far it is, if that was not said a moment ago."""
        if self.now() - self.last_s >= self.every_s:
            self.last_s = self.now()
            self.say(f"{self.name}: {done} of {total}, {label}")


@contextmanager
def progress(name: str) -> Iterator[Show]:
    """Show a bar on a terminal, lines elsewhere."""
    if not sys.stdout.isatty():
        yield PlainProgress(name, lambda line: print(line, flush=True))
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        "{task.fields[name]}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        "{task.fields[label]}",
    )
    with Progress(*(TextColumn(c) if isinstance(c, str) else c for c in columns), transient=True) as bar:
        task = bar.add_task("", total=None, name=name, label="")
        yield lambda done, total, label: bar.update(task, completed=done, total=total, label=label)


def said(experiment: Experiment, result: Result, *, committed: Result | None) -> list[str]:
    """Return claim, expected, got and verdict, with what the repository's result says, in lines."""
    before = {o.claim.name: o for o in experiment.outcomes(committed)} if committed else {}
    lines = []
    for outcome in experiment.outcomes(result):
        lines.append(f"  {outcome.verdict:6}  {outcome.claim.text}")
        old = before.get(outcome.claim.name)
        told = f"; in the repository {old.got_text}, {old.verdict}" if old else ""
        lines.append(f"          expected {outcome.claim.expected}, got {outcome.got_text}{told}")
    return lines


def lost(experiment: Experiment, result: Result, *, committed: Result | None) -> list[str]:
    """Return the claims that hold in the repository's result and were missed now."""
    if committed is None:
        return []
    held = {o.claim.name for o in experiment.outcomes(committed) if o.holds}
    return [o.claim.text for o in experiment.outcomes(result) if o.claim.name in held and not o.holds]
