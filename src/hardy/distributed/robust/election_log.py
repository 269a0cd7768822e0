"""A log of elections, one line of JSON a step, and its replay: the same sets give the same run.

Paper: none.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hardy.config import UserError, reason_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Elected:
    """One line: what was agreed about one step."""

    step: int
    elected: tuple[int, ...]
    offsets_s: dict[int, float] = field(default_factory=dict)
    """When each replica that came was there, from the beginning of the step, in the order of arrival."""
    attempts: int = 1
    """Elections of this step; more than one when somebody was lost."""
    late: int = 0
    """Late announcements so far."""
    duplicates: int = 0
    """Repeated announcements so far."""
    refused: int = 0
    """Messages that were not what they should be, so far."""


class ElectionLog:
    """Writes the log. A disk that is full ends the log, not the run.

    Args:
        path: a file, which grows.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._is_good = path, True

    def write(self, line: Elected) -> None:
        """Add one line."""
        if not self._is_good:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(line)) + "\n")
        except OSError as error:
            self._is_good = False
            logger.error(
                "the log of elections ends before step %d, and cannot be replayed: %s", line.step, error
            )


def read_log(path: Path) -> dict[int, tuple[int, ...]]:
    """Return who was elected at each step.

    Raises:
        UserError: the file is not a log of elections.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "elections.jsonl"
        >>> ElectionLog(path).write(Elected(step=0, elected=(0, 2)))
        >>> read_log(path)
        {0: (0, 2)}
    """
    found: dict[int, tuple[int, ...]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the log of elections {path}: {reason_of(error)}") from error
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            found[_whole(line["step"])] = _ranks(line["elected"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"line {number} of {path} is no line of a log of elections: {error}") from error
    return found


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no whole number from 0")
    return value


def _ranks(value: Sequence[object]) -> tuple[int, ...]:
    ranks = tuple(_whole(rank) for rank in value)
    if not ranks or len(set(ranks)) < len(ranks):
        raise ValueError(f"{list(value)} names nobody, or somebody twice")
    return ranks
