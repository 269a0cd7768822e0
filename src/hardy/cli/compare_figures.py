"""Pictures of a comparison for papers and slides. matplotlib is imported when they are drawn."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hardy.cli.compare_groups import Band, Group, estimated, training_band, validation_band
from hardy.cli.compare_runs import AXES, Line
from hardy.cli.compare_table import MEASURES, UNITS, measured
from hardy.config import UserError

SUFFIXES = (".png", ".svg")
"""Each picture is written in both ways."""
COLOURS = ("#2136b1", "#ec6800", "#829772", "#633868", "#7e2e00", "#019be0")
"""Those of page.css in the light."""
DASHES = ("-", "--", ":", "-.")
BARS = ("peak_memory", "optimizer_state", "bytes_sent", "wait_s")


def draw_figures(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Draw the losses against each axis and a bar for each amount, and return the files.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for name, figure in _figures(groups):
            for suffix in SUFFIXES:
                written.append(folder / f"{name}{suffix}")
                metadata = {"Date": None} if suffix == ".svg" else None  # the same runs, the same file
                figure.savefig(written[-1], dpi=150, metadata=metadata)
    except OSError as error:
        raise UserError(f"the figures could not be written into {folder}: {error.strerror}") from None
    return written


def _figures(groups: Sequence[Group]) -> Iterator[tuple[str, Any]]:
    """Yield names and figures."""
    runs = [run for group in groups for run in group.runs]
    for kind, label in (("validation", "validation loss"), ("training", "training loss")):
        for axis in AXES:
            if any(getattr(run, kind).y and axis in getattr(run, kind).x for run in runs):
                yield f"{kind}_loss_by_{axis.split()[0]}", _losses(groups, kind, axis, label)
    for name in BARS:
        if name in measured(groups):
            yield name, _bars(groups, name)


def _losses(groups: Sequence[Group], kind: str, axis: str, label: str) -> Any:
    figure, axes = _figure(height=4.2)
    for place, group in enumerate(groups):
        look = {
            "color": COLOURS[place % len(COLOURS)],
            "linestyle": DASHES[place // len(COLOURS) % len(DASHES)],
        }
        band = (validation_band if kind == "validation" else training_band)(group)
        if band is not None and axis in band.line.x:
            _draw_band(axes, band, axis, look, label=group.label)
            continue
        for run in group.runs:
            line: Line = getattr(run, kind)
            if axis in line.x:
                y = [float("nan") if value is None else value for value in line.y]
                axes.plot(line.x[axis], y, linewidth=1.2, label=run.name, **look)
    axes.set(xlabel=axis, ylabel=f"{label} (nats per token)")
    axes.legend(fontsize="small")
    return figure


def _draw_band(axes: Any, band: Band, axis: str, look: dict[str, str], *, label: str) -> None:
    axes.plot(band.line.x[axis], band.line.y, linewidth=1.8, label=label, **look)
    axes.fill_between(band.line.x[axis], band.low, band.high, color=look["color"], alpha=0.2, linewidth=0)


def _bars(groups: Sequence[Group], name: str) -> Any:
    found = [(place, group, one) for place, group in enumerate(groups) if (one := estimated(group, name))]
    measure = MEASURES[name]
    largest = max(one.mean for _, _, one in found)
    size, unit = next((pair for pair in UNITS[measure.kind] if largest >= pair[0]), UNITS[measure.kind][-1])
    figure, axes = _figure(height=1.2 + 0.4 * len(found))
    axes.barh(
        [group.label for _, group, _ in found],
        [one.mean / size for _, _, one in found],
        xerr=[(one.half_width or 0.0) / size for _, _, one in found],
        color=[COLOURS[place % len(COLOURS)] for place, _, _ in found],
    )
    axes.invert_yaxis()
    axes.set(xlabel=f"{measure.heading} ({unit})", xlim=(0, None))
    return figure


def _figure(*, height: float) -> tuple[Any, Any]:
    """Return a figure that needs no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()
