"""Where lengths come from: named distributions, a histogram, a file; and what becomes of those too long."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from hardy.balance.cost import Floats, Integers
from hardy.balance.length_tables import WIKIPEDIA
from hardy.config import UserError, reason_of, unknown_name

Overlong = Literal["error", "truncate", "split", "drop"]
"""What becomes of a sequence above the most tokens that are allowed."""


class LogNormal(NamedTuple):
    """int(exp(normal)) + 1 tokens, a share of the documents."""

    share: float
    mu: float
    sigma: float


class Pareto(NamedTuple):
    """int(least * (1 + pareto)) tokens, a share of the documents."""

    share: float
    least: float
    alpha: float


class HistogramBin(NamedTuple):
    """Documents of `low` to `high` tokens, both inclusive, `tokens` together."""

    low: int
    high: int
    documents: int
    tokens: int


MIXTURES: dict[str, tuple[LogNormal | Pareto, ...]] = {
    "wikipedia-fit": (LogNormal(0.3765, 5.072, 0.684), LogNormal(0.6235, 6.480, 1.229)),
    "commoncrawl-like": (LogNormal(0.97, 6.8, 1.2), Pareto(0.03, 20000, 1.0)),
    "github-like": (LogNormal(0.96, 7.0, 1.2), Pareto(0.04, 20000, 1.0)),
    "web-32k": (LogNormal(0.995, 5.95, 1.05), Pareto(0.005, 8000, 1.3)),
    "sft-mix": (LogNormal(0.9989, 6.408, 1.0), LogNormal(0.0011, 10.394, 0.5)),
}
"""wikipedia-fit is too light beyond 99.9%; -like ones are calibrated on FlexSP's results, not data; web-32k
and sft-mix (99.89% of mean 1K, 0.11% of mean 37K; spreads ours) are assumed."""
SOURCES: tuple[str, ...] = ("wikipedia", *MIXTURES)
"""wikipedia has real counts."""


class Fitted(NamedTuple):
    """Lengths that fit, whom they came from, and how many were changed."""

    lengths: Integers
    origin: Integers
    """Index of the given sequence that each is, or is a part of."""
    changed: int
    """Sequences truncated, split or dropped."""


def draw_lengths(source: str, count: int, generator: np.random.Generator) -> Integers:
    """Return lengths drawn from a named distribution, or from the histogram of a file.

    Args:
        source: a name of `SOURCES`, or a path: .csv with columns lo, hi, documents, tokens is a histogram,
            anything else has one length in a line, used in order, again from the start if they do not do.
        count: how many.
        generator: what draws.

    Raises:
        UserError: no such source, or a file that cannot be read so.

    Example:
        >>> draw_lengths("web-32k", 3, np.random.default_rng(0)).tolist()
        [438, 335, 752]
    """
    if source == "wikipedia":
        return from_histogram([HistogramBin(*row) for row in WIKIPEDIA], count, generator)
    if source in MIXTURES:
        return _from_mixture(MIXTURES[source], count, generator)
    path = Path(source)
    if not path.exists():
        raise UserError(unknown_name(source, "distribution", SOURCES) + ", or the path of a file")
    if path.suffix == ".csv":
        return from_histogram(read_histogram(path), count, generator)
    return np.resize(read_lengths(path), count)


def from_histogram(bins: Sequence[HistogramBin], count: int, generator: np.random.Generator) -> Integers:
    """Return lengths drawn from a histogram; within a bin by a power law that keeps the bin's mean."""
    shares = np.array([each.documents for each in bins], dtype=np.float64)
    chosen = generator.choice(len(bins), size=count, p=shares / shares.sum())
    low = np.array([each.low for each in bins], dtype=np.float64)
    width = np.array([each.high + 1 - each.low for each in bins], dtype=np.float64)
    mean = np.array([each.tokens / max(each.documents, 1) for each in bins])
    gamma = np.maximum(width / np.maximum(mean + 0.5 - low, 1e-9) - 1, 0.0)
    drawn = low[chosen] + width[chosen] * generator.random(count) ** gamma[chosen]
    highest = (low + width - 1)[chosen]
    return np.minimum(drawn, highest).astype(np.int64)


def _from_mixture(
    parts: Sequence[LogNormal | Pareto], count: int, generator: np.random.Generator
) -> Integers:
    """Return lengths of the first part, replaced by those of each next where a draw says so."""
    lengths = _draw(parts[0], count, generator)
    for part in parts[1:]:
        mask = generator.random(count) < part.share
        lengths = np.where(mask, _draw(part, count, generator), lengths)
    return lengths.astype(np.int64)


def _draw(part: LogNormal | Pareto, count: int, generator: np.random.Generator) -> Floats:
    if isinstance(part, LogNormal):
        return np.floor(np.exp(generator.normal(part.mu, part.sigma, count))) + 1
    return np.floor(part.least * (1 + generator.pareto(part.alpha, count)))


def read_histogram(path: Path) -> list[HistogramBin]:
    """Read a histogram: lines lo,hi,documents,tokens; lines of # and the heading are skipped."""
    bins: list[HistogramBin] = []
    for number, line in enumerate(_lines(path), start=1):
        if not line or line.startswith(("#", "lo,")):
            continue
        try:
            found = HistogramBin(*(int(cell) for cell in line.split(",")))
        except (TypeError, ValueError):
            raise UserError(f"{path}, line {number}: expected lo,hi,documents,tokens, got {line!r}") from None
        if not 1 <= found.low <= found.high or found.documents < 0:
            raise UserError(f"{path}, line {number}: a bin needs 1 <= lo <= hi and documents of 0 or more")
        bins.append(found)
    if not sum(each.documents for each in bins):
        raise UserError(f"{path} has no documents")
    return bins


def read_lengths(path: Path) -> Integers:
    """Read one length a line; lines of # are skipped."""
    found: list[int] = []
    for number, line in enumerate(_lines(path), start=1):
        if not line or line.startswith("#"):
            continue
        if not line.isdigit() or int(line) < 1:
            raise UserError(f"{path}, line {number}: expected a length of at least 1, got {line!r}")
        found.append(int(line))
    if not found:
        raise UserError(f"{path} has no lengths; give one a line")
    return np.array(found, dtype=np.int64)


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as lengths: {reason_of(error)}") from None


def fit_lengths(lengths: Sequence[int] | Integers, *, most_tokens: int, overlong: Overlong) -> Fitted:
    """Return lengths of at most `most_tokens`, never silently: the number of those changed stands beside.

    Raises:
        UserError: `overlong` is error and one is too long.

    Example:
        >>> fitted = fit_lengths([3, 9], most_tokens=4, overlong="split")
        >>> fitted.lengths.tolist(), fitted.origin.tolist(), fitted.changed
        ([3, 4, 4, 1], [0, 1, 1, 1], 1)
    """
    given = np.asarray(lengths, dtype=np.int64)
    if most_tokens < 1:
        raise UserError(f"most_tokens must be at least 1, got {most_tokens}")
    long = given > most_tokens
    changed, every = int(long.sum()), np.arange(given.size, dtype=np.int64)
    if changed and overlong == "error":
        index = int(long.argmax())
        raise UserError(
            f"{changed} sequences are longer than {most_tokens:,} tokens, the first is {index} with "
            f"{int(given[index]):,}; raise the limit, or choose overlong truncate, split or drop"
        )
    if overlong == "drop":
        return Fitted(given[~long], every[~long], changed)
    if overlong == "split":
        parts = np.maximum(-(-given // most_tokens), 1)
        origin = np.repeat(every, parts)
        place = np.arange(origin.size) - np.repeat(np.cumsum(parts) - parts, parts)
        return Fitted(np.minimum(given[origin] - place * most_tokens, most_tokens), origin, changed)
    return Fitted(np.minimum(given, most_tokens), every, changed)


def token_batches(lengths: Integers, *, budget_tokens: int) -> list[Integers]:
    """Return positions of global batches: in order, each as many sequences as the budget holds, one at least.

    A sequence that would go over the budget opens the next batch; what is left at the end is no batch.

    Example:
        >>> [batch.tolist() for batch in token_batches(np.array([3, 3, 3, 2]), budget_tokens=6)]
        [[0, 1]]
    """
    batches: list[Integers] = []
    start, taken = 0, 0
    for index, size in enumerate(lengths.tolist()):
        if index > start and taken + size > budget_tokens:
            batches.append(np.arange(start, index, dtype=np.int64))
            start, taken = index, 0
        taken += size
    return batches
