"""The table of a comparison: what is measured, in which words, as Markdown, LaTeX or CSV."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hardy.cli.compare_groups import Estimate, Group, estimated

Kind = Literal["loss", "count", "tokens", "rate", "seconds", "bytes"]
UNITS: Mapping[Kind, Sequence[tuple[float, str]]] = {
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
    "tokens": ((1e9, "billions"), (1e6, "millions"), (1, "")),
    "seconds": ((3600, "h"), (60, "min"), (1, "s")),
}
"""Units to choose from by the largest value of a column, largest first; other kinds have none."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What stands in one column."""

    heading: str
    kind: Kind
    about: str = ""
    """What the heading does not say."""


MEASURES: dict[str, Measure] = {
    "validation_loss": Measure(heading="validation loss, last", kind="loss"),
    "best_validation_loss": Measure(heading="validation loss, best", kind="loss"),
    "training_loss": Measure(heading="training loss, last 5 %", kind="loss"),
    "steps": Measure(heading="steps", kind="count"),
    "tokens": Measure(heading="tokens", kind="tokens"),
    "wall_s": Measure(heading="wall time", kind="seconds"),
    "virtual_s": Measure(heading="virtual time", kind="seconds"),
    "tokens_per_s": Measure(heading="tokens/s", kind="rate"),
    "peak_memory": Measure(heading="peak memory", kind="bytes"),
    "optimizer_state": Measure(heading="optimizer state", kind="bytes"),
    "bytes_sent": Measure(heading="sent per worker", kind="bytes"),
    "wait_s": Measure(heading="waited", kind="seconds"),
    "skipped_steps": Measure(
        heading="skipped steps", kind="count", about="skipped steps: loss or gradient not finite, or a spike"
    ),
    "rejected_rounds": Measure(
        heading="rejected rounds", kind="count", about="rejected rounds: some replica was left out"
    ),
    "rollbacks": Measure(heading="rollbacks", kind="count", about="rollbacks: all replicas were left out"),
    "removed_steps": Measure(
        heading="filtered steps",
        kind="count",
        about="filtered steps: the rule removed some worker's gradient",
    ),
    "lost": Measure(heading="lost", kind="count", about="lost: messages or workers that did not arrive"),
}
"""All columns, from left to right; those that no run has are left out."""
READING = (
    "Mean ± half of the 95 % interval (Student's t) over runs that differ only in their seed; a run that "
    "stands alone has no interval. Losses in nats per token. Wall time is that of steps and evaluations, "
    "without start-up and checkpoints; tokens/s without evaluations."
)


def reading(groups: Sequence[Group]) -> str:
    """Return how the table of some groups is read."""
    about = "; ".join(about for name in measured(groups) if (about := MEASURES[name].about))
    return f"{READING} {about[0].upper()}{about[1:]}." if about else READING


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of words."""

    heading: Sequence[str]
    rows: Sequence[Sequence[str]]


def measured(groups: Sequence[Group]) -> list[str]:
    """Return the measures that some run has."""
    return [name for name in MEASURES if any(name in run.totals for group in groups for run in group.runs)]


def summary(groups: Sequence[Group]) -> Grid:
    """Return one row for each group."""
    columns = [["run", *(group.label for group in groups)]]
    columns.append(["n", *(str(len(group.runs)) for group in groups)])
    if any(run.seed is not None for group in groups for run in group.runs):
        columns.append(["seeds", *(_seeds(group) for group in groups)])
    for name in measured(groups):
        heading, cells = told(MEASURES[name], [estimated(group, name) for group in groups])
        columns.append([heading, *cells])
    heading, *rows = zip(*columns, strict=True)
    return Grid(heading=heading, rows=rows)


def told(measure: Measure, found: Sequence[Estimate | None]) -> tuple[str, list[str]]:
    """Return a column's heading, with its unit, and its cells.

    Example:
        >>> told(Measure(heading="sent", kind="bytes"), [Estimate(mean=2.5e6, half_width=None, count=1)])
        ('sent (MB)', ['2.50'])
        >>> told(Measure(heading="loss", kind="loss"), [Estimate(mean=2.46666, half_width=0.0312, count=3)])
        ('loss', ['2.467 ± 0.031'])
    """
    units = UNITS.get(measure.kind, ())
    largest = max((abs(one.mean) for one in found if one is not None), default=0.0)
    size, unit = next((pair for pair in units if largest >= pair[0]), units[-1] if units else (1, ""))
    cells = ["-" if one is None else _cell(measure.kind, one, size) for one in found]
    return f"{measure.heading} ({unit})" if unit else measure.heading, cells


def differences_grid(groups: Sequence[Group], rows: Mapping[str, Sequence[Any]]) -> Grid:
    """Return the settings in which groups differ, one row each."""
    return Grid(
        heading=["setting", *(group.label for group in groups)],
        rows=[[key, *map(setting_text, values)] for key, values in rows.items()],
    )


def setting_text(value: Any) -> str:
    """Return a setting as it would be given on the command line.

    Example:
        >>> [setting_text(value) for value in (None, True, 0.002, [1, 2], "edit")]
        ['none', 'true', '0.002', '[1, 2]', 'edit']
    """
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def markdown(grid: Grid, *, words: int) -> str:
    """Return a table in Markdown; `words` leading columns stand at the left."""
    lines = [[_in_markdown(cell) for cell in row] for row in (grid.heading, *grid.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = [":" + "-" * (w - 1) if i < words else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    cells = [
        [
            cell.ljust(w) if i < words else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]])


def latex(grid: Grid, *, words: int) -> str:
    """Return a table in LaTeX, for the package booktabs."""
    shape = "l" * words + "r" * (len(grid.heading) - words)
    lines = [" & ".join(map(_in_latex, row)) + r" \\" for row in (grid.heading, *grid.rows)]
    return "\n".join(
        [rf"\begin{{tabular}}{{{shape}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule",
         r"\end{tabular}"]
    )  # fmt: skip


def comma_separated(groups: Sequence[Group]) -> str:
    """Return the table as CSV: full precision, base units (s, B), half widths in columns of their own."""
    names = measured(groups)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "n", "seeds", *(word for name in names for word in (name, f"{name}_ci95"))])
    for group in groups:
        found = [estimated(group, name) for name in names]
        cells = [cell for one in found for cell in ((one.mean, one.half_width) if one else (None, None))]
        writer.writerow([_guarded(group.label), len(group.runs), _seeds(group), *map(_exact, cells)])
    return text.getvalue().rstrip("\n")


FORMATS: dict[str, Callable[[Sequence[Group]], str]] = {
    "markdown": lambda groups: markdown(summary(groups), words=1),
    "latex": lambda groups: latex(summary(groups), words=1),
    "csv": comma_separated,
}
"""The ways to write the table, by the value of --format."""


def _seeds(group: Group) -> str:
    return " ".join("-" if run.seed is None else str(run.seed) for run in group.runs)


def _cell(kind: Kind, one: Estimate, size: float) -> str:
    mean, half = one.mean / size, None if one.half_width is None else one.half_width / size
    decimals = {"loss": 3, "count": 0, "tokens": 0 if size == 1 else 3, "rate": 0, "seconds": 1, "bytes": 2}[
        kind
    ]
    if size == 1 and kind == "bytes":
        decimals = 0
    if kind == "count" and not mean.is_integer():
        decimals = 1
    if not half:
        return f"{mean:,.{decimals}f}" + ("" if half is None or kind in ("count", "tokens") else " ± 0")
    if kind == "loss":
        decimals = min(6, max(0, 1 - math.floor(math.log10(half))))  # two digits of the interval
    elif kind == "count":
        decimals = max(decimals, 1)
    return f"{mean:,.{decimals}f} ± {half:,.{decimals}f}"


def _in_markdown(cell: str) -> str:
    escaped = cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return " ".join(escaped.split())


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%",
    "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
}  # fmt: skip


def _in_latex(cell: str) -> str:
    return " ".join("".join(_LATEX.get(letter, letter) for letter in cell).split())


def _exact(value: float | None) -> str:
    return "" if value is None else repr(value)


def _guarded(label: str) -> str:
    """Return a name that no spreadsheet takes for a formula."""
    return f"'{label}" if label[:1] in ("=", "+", "-", "@") else label
