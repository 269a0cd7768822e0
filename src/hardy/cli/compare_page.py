"""The page of a comparison: table, curves, bars, what went wrong, and how the settings differ."""

from collections.abc import Iterator, Sequence

from hardy.cli.compare_groups import (
    ABSENT,
    Band,
    Group,
    differences,
    estimated,
    training_band,
    validation_band,
)
from hardy.cli.compare_runs import AXES, STEP, Line, Run
from hardy.cli.compare_table import MEASURES, differences_grid, measured, reading, setting_text, summary, told
from hardy.cli.page import Bar, Bars, Section, Table, Text
from hardy.cli.page_curves import Curve, Curves, Mark

MEMORY = ("peak_memory", "optimizer_state")
COMMUNICATION = ("bytes_sent", "wait_s")
NOTES = {
    "peak_memory": "The most that a worker's process held at once, on its device; on a CPU all of it.",
    "optimizer_state": "Of the newest checkpoint: the state of one replica, its shards added up.",
    "bytes_sent": "What the worker that writes metrics.jsonl sent to exchange models or gradients.",
    "wait_s": "Time that this worker spent waiting for the others' rounds.",
}
MOST_EVENTS = 100
"""Rows of one run in the table of anomalies, and marks on its curve."""
MEAN_KINDS = ("mean of validation", "mean of training")


def sections_of(groups: Sequence[Group], notes: Sequence[str]) -> list[Section]:
    """Return what stands on the page; sections without content are left out."""
    sections: list[Section] = []
    if notes:
        sections.append(Text(title="Read this first", paragraphs=notes, is_warning=True))
    grid = summary(groups)
    sections.append(Table(title="Summary", heading=grid.heading, rows=grid.rows, note=reading(groups)))
    curves = list(_curves(groups))
    if curves:
        note = "Losses in nats per token. Bands are 95 % intervals over the seeds of a group. " * any(
            curve.low for curve in curves
        )
        sections.append(
            Curves(
                title="Loss",
                curves=curves,
                axes=_axes(curves),
                y_label="loss (nats per token)",
                off=MEAN_KINDS[1:],
                note=note,
            )
        )
    there = measured(groups)
    sections += [_bars(groups, name) for name in (*MEMORY, *COMMUNICATION) if name in there]
    sections.append(_anomalies(groups))
    return sections + list(_differences(groups))


def _axes(curves: Sequence[Curve]) -> list[str]:
    return [axis for axis in AXES if any(axis in curve.x for curve in curves)]


def _curves(groups: Sequence[Group]) -> Iterator[Curve]:
    for group in groups:
        for run in group.runs:
            if any(value is not None for value in run.training.y):
                yield _curve(group, run, "training", run.training)
            if any(value is not None for value in run.validation.y):
                yield _curve(group, run, "validation", run.validation)
        bands = (validation_band(group), training_band(group))
        for kind, band in zip(MEAN_KINDS, bands, strict=True):
            if band is not None:
                yield _mean(group, kind, band)


def _curve(group: Group, run: Run, kind: str, line: Line) -> Curve:
    is_marked = kind == "training" or not run.training.y
    return Curve(
        name=run.name,
        group=group.label,
        kind=kind,
        x=line.x,
        y=line.y,
        style="line" if kind == "training" else "dots",
        marks=_marks(run, line) if is_marked else (),
    )


def _mean(group: Group, kind: str, band: Band) -> Curve:
    return Curve(
        name=group.label,
        group=group.label,
        kind=kind,
        x=band.line.x,
        y=band.line.y,
        low=band.low,
        high=band.high,
    )


def _marks(run: Run, line: Line) -> list[Mark]:
    """Return the run's events where they stand on each axis: at the first record that is not before them."""
    marks = []
    for event in run.events[:MOST_EVENTS]:
        place = next(
            (i for i, step in enumerate(line.x[STEP]) if event.step is not None and step >= event.step), -1
        )
        if place >= 0:
            times = f" ({event.times:,} times)" if event.times > 1 else ""
            x = {axis: places[place] for axis, places in line.x.items()}
            marks.append(Mark(x=x, text=f"step {event.when()}: {event.text}{times}"))
    return marks


def _bars(groups: Sequence[Group], name: str) -> Bars:
    found = [estimated(group, name) for group in groups]
    heading, cells = told(MEASURES[name], found)
    bars = [
        Bar(label=group.label, value=one.mean, text=cell, colour=place, spread=one.half_width)
        for place, (group, one, cell) in enumerate(zip(groups, found, cells, strict=True))
        if one is not None
    ]
    return Bars(title=heading[0].upper() + heading[1:], bars=bars, note=NOTES[name])


def _anomalies(groups: Sequence[Group]) -> Section:
    title = "Anomalies"
    rows, left_out = [], 0
    for run in (run for group in groups for run in group.runs):
        left_out += max(0, len(run.events) - MOST_EVENTS)
        rows += [
            (run.name, event.when(), event.text, f"{event.times:,}") for event in run.events[:MOST_EVENTS]
        ]
    if not rows:
        return Text(
            title=title, paragraphs=["None: no step was left out, no worker left out or lost, no resume."]
        )
    note = "The same again within a hundredth of a run is told once. Each stands as ▾ on its curve above."
    note += f" {left_out:,} further ones are not listed (at most {MOST_EVENTS} a run)." if left_out else ""
    return Table(title=title, heading=["run", "step", "what", "times"], rows=rows, words=3, note=note)


def _differences(groups: Sequence[Group]) -> Iterator[Section]:
    title = "Settings that differ"
    found = differences(groups)
    if not found.shared:
        nothing = (
            "There is one group of runs." if len(groups) == 1 else "No setting that two groups have differs."
        )
        yield Text(title=title, paragraphs=[nothing])
    else:
        grid = differences_grid(groups, found.shared)
        note = "run.* is where and with what a run was started last. Seeds and log.* are left out."
        yield Table(title=title, heading=grid.heading, rows=grid.rows, words=len(grid.heading), note=note)
    if found.own:
        rows = [
            (group.label, key, setting_text(values[place]))
            for place, group in enumerate(groups)
            for key, values in found.own.items()
            if values[place] != ABSENT
        ]
        title = f"Settings that one group alone has ({len(rows)})"
        yield Table(title=title, heading=["run", "setting", "value"], rows=rows, words=3, is_folded=True)
