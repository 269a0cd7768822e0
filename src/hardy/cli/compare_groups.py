"""Runs that differ in their seed alone, as one: means with the interval of Student's t."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hardy.cli.compare_runs import AXES, STEP, Line, Run

CONFIDENCE = 0.95
"""Of the intervals."""
ABSENT = "-"
"""Stands for a setting that a group does not have."""
STRETCHES = 200
"""Pieces into which the steps of runs are cut, so that their noisy training losses can be averaged."""
BESIDE_THE_POINT = ("log.", "data.cache_dir", "train.seed", "run.commit", "run.platform", "run.torch")
"""Settings that do not make two runs different ones; what begins so."""
HIDDEN = ("log.", "data.cache_dir", "train.seed")
"""Settings that the table of differences leaves out."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of equal settings but the seed."""

    label: str
    runs: Sequence[Run]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and how far it may be off."""

    mean: float
    half_width: float | None
    """Half the width of the 95 % interval; None for a single value."""
    count: int


@dataclass(frozen=True, kw_only=True)
class Band:
    """The mean of several runs along their way, with its interval."""

    line: Line
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Settings in which groups differ, with their values by group, `ABSENT` where a group has none."""

    shared: Mapping[str, Sequence[Any]]
    """Of two groups or more."""
    own: Mapping[str, Sequence[Any]]
    """Of one of several groups alone, such as those of the only strategy that has them."""


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Return the groups in the order of their first runs."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        told = {key: value for key, value in run.config.items() if not key.startswith(BESIDE_THE_POINT)}
        found.setdefault(repr(sorted(told.items())), []).append(run)
    labels = [_label([run.name for run in members]) for members in found.values()]
    unique = [
        label if labels.count(label) == 1 else f"{members[0].name} and {len(members) - 1} more"
        if members[1:] else members[0].name
        for label, members in zip(labels, found.values(), strict=True)
    ]  # fmt: skip
    return [Group(label=label, runs=runs) for label, runs in zip(unique, found.values(), strict=True)]


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of some values with its interval.

    Example:
        >>> found = estimate([1.0, 2.0, 3.0])
        >>> found.mean, round(found.half_width, 3), found.count
        (2.0, 2.484, 3)
    """
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return Estimate(mean=mean, half_width=None, count=1)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean=mean, half_width=t_quantile(count - 1) * math.sqrt(variance / count), count=count)


def t_quantile(freedom: int) -> float:
    """Return t with which mean ± t · standard error holds 95 % for `freedom` degrees of freedom.

    Example:
        >>> [round(t_quantile(freedom), 3) for freedom in (1, 2, 4, 9)]
        [12.706, 4.303, 2.776, 2.262]
    """
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """Return how likely Student's t lies within -t to t, by the finite series for whole freedoms."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    is_odd = freedom % 2
    term = cosine if is_odd else 1.0
    total = 0.0
    for k in range(1 + is_odd, freedom, 2):
        total += term
        term *= k / (k + 1) * cosine**2
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total


def estimated(group: Group, measure: str) -> Estimate | None:
    """Return a measure of a group over the runs that have it; None where none has."""
    values = [run.totals[measure] for run in group.runs if measure in run.totals]
    return estimate(values) if values else None


def differences(groups: Sequence[Group]) -> Differences:
    """Return the settings in which groups differ."""
    configs = [group.runs[0].config for group in groups]
    keys = dict.fromkeys(key for config in configs for key in config if not key.startswith(HIDDEN))
    rows = {key: [config.get(key, ABSENT) for config in configs] for key in keys}
    differing = {key: row for key, row in rows.items() if any(value != row[0] for value in row)}
    own = {key for key, row in differing.items() if len(row) - row.count(ABSENT) == 1}
    return Differences(
        shared={key: row for key, row in differing.items() if key not in own or len(groups) == 2},
        own={key: row for key, row in differing.items() if key in own and len(groups) > 2},
    )


def validation_band(group: Group) -> Band | None:
    """Return the mean validation loss at the steps at which all runs of a group were evaluated."""
    return _band([run.validation for run in group.runs], at=lambda step: step)


def training_band(group: Group) -> Band | None:
    """Return the mean training loss over stretches of steps, of those that all runs have."""
    lines = [run.training for run in group.runs]
    last = min((line.x[STEP][-1] for line in lines if line.y), default=0)
    size = max(1, math.ceil(last / STRETCHES))
    return _band(lines, at=lambda step: math.ceil(step / size) * size)


def _band(lines: Sequence[Line], *, at: Callable[[float], float]) -> Band | None:
    """Return the mean of lines over what falls on one place, with its interval; None for less than two."""
    if len(lines) < 2:
        return None
    axes = [axis for axis in AXES if all(axis in line.x for line in lines)]
    means = [_means(line, axes, at=at) for line in lines]
    places = [place for place in means[0] if all(place in other for other in means)]
    if not places:
        return None
    found = [estimate([mean[place]["y"] for mean in means]) for place in places]
    halves = [one.half_width or 0.0 for one in found]
    x = {axis: [sum(mean[p][axis] for mean in means) / len(means) for p in places] for axis in axes}
    return Band(
        line=Line(x=x | {STEP: places}, y=[one.mean for one in found]),
        low=[one.mean - half for one, half in zip(found, halves, strict=True)],
        high=[one.mean + half for one, half in zip(found, halves, strict=True)],
    )


def _means(
    line: Line, axes: Sequence[str], *, at: Callable[[float], float]
) -> Mapping[float, Mapping[str, float]]:
    """Return by place the means of the finite values and of where they stand."""
    sums: dict[float, list[list[float]]] = {}
    for index, value in enumerate(line.y):
        if value is not None:
            row = [value, *(line.x[axis][index] for axis in axes)]
            sums.setdefault(at(line.x[STEP][index]), []).append(row)
    return {
        place: dict(
            zip(["y", *axes], (sum(column) / len(rows) for column in zip(*rows, strict=True)), strict=True)
        )
        for place, rows in sums.items()
    }


def _label(names: Sequence[str]) -> str:
    """Return a name for runs: what their names begin with alike, or the first one.

    Example:
        >>> _label(["adamw-1", "adamw-2"]), _label(["a", "b"]), _label(["edit"])
        ('adamw (2 runs)', 'a and 1 more', 'edit')
    """
    if len(names) == 1:
        return names[0]
    start = os.path.commonprefix(list(names)).rstrip("-_. /0123456789")
    named = start if len(start) > 1 else ""
    return f"{named} ({len(names)} runs)" if named else f"{names[0]} and {len(names) - 1} more"
