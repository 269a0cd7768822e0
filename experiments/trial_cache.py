"""Many trials on some processes; what came out is kept, so that an interrupted run goes on where it was."""

import json
import multiprocessing
import time
from collections.abc import Callable, Hashable, Iterable
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T", bound=Hashable)
Work = Callable[[Any], Any]
_WAITING: list[tuple[Work, Any]] = []
"""What is to be done; forked processes inherit what could not be sent to them."""


class Trials:
    """Runs trials and remembers results, a line of JSON for each.

    Args:
        file: where results are kept; None keeps none.
        num_processes: how many run at once, of one thread each; 1 runs them in this process.
        version: hash of all that decides results; lines of another version are not looked at.
    """

    def __init__(self, file: Path | None, *, num_processes: int, version: str = "") -> None:
        self.file, self.num_processes, self.version = file, num_processes, version
        self.call, self.began = datetime.now(UTC).isoformat(), time.perf_counter()
        self._held, self.earlier_s = self._read()

    def run(self, work: Work, trials: Iterable[T], *, label: Callable[[T], str]) -> dict[T, Any]:
        """Return what `work` makes of each trial, as JSON would hold it, in the given order.

        Args:
            work: a function of one trial.
            trials: told apart by their `repr`; one that stands there twice is run once.
            label: names a trial in the lines that are printed.
        """
        wanted = {trial: self._key(label, trial) for trial in trials}
        missing = [trial for trial, key in wanted.items() if key not in self._held]
        for count, (place, result) in enumerate(self._each(work, missing), start=1):
            self._keep(wanted[missing[place]], label(missing[place]), result)
            print(f"[{count}/{len(missing)}] {label(missing[place])}", flush=True)
        return {trial: self._held[key] for trial, key in wanted.items()}

    @property
    def duration_s(self) -> float:
        """Seconds since this began, and those of earlier calls whose results are still used."""
        return self.earlier_s + time.perf_counter() - self.began

    def _each(self, work: Work, trials: list[Any]) -> Iterable[tuple[int, Any]]:
        if self.num_processes == 1 or len(trials) < 2:
            yield from ((place, work(trial)) for place, trial in enumerate(trials))
            return
        _WAITING[:] = [(work, trial) for trial in trials]
        with multiprocessing.get_context("fork").Pool(self.num_processes, initializer=_one_thread) as pool:
            yield from pool.imap_unordered(_do, range(len(trials)))

    def _key(self, label: Callable[[Any], str], trial: Any) -> str:
        text = f"{self.version}\n{label(trial)}\n{trial!r}"
        return blake2b(text.encode(), digest_size=12).hexdigest()

    def _keep(self, key: str, label: str, result: Any) -> None:
        elapsed_s = time.perf_counter() - self.began
        line = {"key": key, "trial": label, "call": self.call, "elapsed_s": elapsed_s, "result": result}
        text = json.dumps(line)
        self._held[key] = json.loads(text)["result"]
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"\n{self.version} {text}\n")  # half a line may stand before it

    def _read(self) -> tuple[dict[str, Any], float]:
        """Return results by key, and the seconds of the calls that made them."""
        if self.file is None or not self.file.exists():
            return {}, 0.0
        held: dict[str, Any] = {}
        calls: dict[str, float] = {}
        for text in self.file.read_text(encoding="utf-8").splitlines():
            version, _, rest = text.partition(" ")
            if version != self.version:
                continue
            try:
                line = json.loads(rest)
            except ValueError:  # a run that was killed may leave half a line
                continue
            held[line["key"]] = line["result"]
            calls[line["call"]] = max(line["elapsed_s"], calls.get(line["call"], 0.0))
        return held, sum(calls.values())


def _one_thread() -> None:
    """A forked process must not wake the threads of its parent."""
    torch.set_num_threads(1)


def _do(place: int) -> tuple[int, Any]:
    work, trial = _WAITING[place]
    return place, work(trial)
