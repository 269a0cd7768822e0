"""metrics.jsonl: one JSON object per optimizer step, the record that plots, comparisons and resumes read."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hardy.config import UserError


class MetricsFile:
    """Appends records; on resume forgets those after the checkpoint, and a line cut short by a crash."""

    def __init__(self, path: Path, *, after_step: int) -> None:
        self.path = path
        kept = (
            [record for record in read_metrics(path) if record["step"] <= after_step] if path.exists() else []
        )
        text = "".join(_line(record) for record in kept)
        beside = path.with_suffix(".tmp")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; non-finite numbers are written as null, which JSON can hold."""
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self.path} could not be written ({error.strerror}); free some space, then `hardy resume`"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics file; a last line without its end is left out.

    Raises:
        UserError: another line is none.
    """
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                return
            yield _record(line, where=f"line {number} of {path}")


def _record(line: str, *, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError("it says nothing of a step")
    except ValueError as error:
        raise UserError(
            f"{where} cannot be used: {error}; put the file back, or delete the line, then `hardy resume`"
        ) from None
    return record


def _line(record: dict[str, Any]) -> str:
    plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
    return json.dumps(plain) + "\n"


class SmoothedLoss:
    """Exponential average of the loss with bias correction, and its best value so far.

    Example:
        >>> smoothed = SmoothedLoss(decay=0.9)
        >>> smoothed.update(4.0)
        4.0
    """

    def __init__(self, *, decay: float) -> None:
        self.decay = decay
        self.best = math.inf
        self._sum = 0.0
        self._weight = 0.0

    def update(self, loss: float) -> float:
        """Take in one loss and return the average; a non-finite loss is left out."""
        if math.isfinite(loss):
            self._sum = self.decay * self._sum + (1 - self.decay) * loss
            self._weight = self.decay * self._weight + (1 - self.decay)
            self.best = min(self.best, self.value)
        return self.value

    @property
    def value(self) -> float:
        """The average, infinite before the first loss."""
        return self._sum / self._weight if self._weight else math.inf

    def state_dict(self) -> dict[str, float | None]:
        """Return plain values; None stands for a best that does not exist yet."""
        best = self.best if math.isfinite(self.best) else None
        return {"sum": self._sum, "weight": self._weight, "best": best}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Take them back."""
        self._sum, self._weight = state["sum"] or 0.0, state["weight"] or 0.0
        self.best = math.inf if state["best"] is None else state["best"]
