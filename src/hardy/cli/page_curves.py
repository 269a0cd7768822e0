"""Curves of a page: the points it carries, how they are packed, a table for browsers without JavaScript.

A page carries at most `MOST_POINTS` points in a section of curves. Longer curves are cut into stretches of
which the lowest and the highest point stay, so that no spike is lost. Numbers are rounded to what a screen
can show.
"""

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

MOST_POINTS = 110_000
"""Of all curves of a section together: about 1.5 MB."""
LEAST_POINTS = 500
"""That a curve may keep however many there are."""
TABLE_ROWS = 12
"""Points of each curve in the table that stands in for the picture."""

Numbers = Sequence[float]
Gappy = Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something that happened at one place of a curve."""

    x: Mapping[str, float]
    """Where, by the name of the axis."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One curve."""

    name: str
    """Whose it is: curves of one name are shown and hidden together."""
    group: str
    """Curves of one group share a colour and a button."""
    kind: str
    """What it shows, such as "training"; each kind has a switch."""
    x: Mapping[str, Numbers]
    """Where the points stand, by the name of the axis; rising."""
    y: Gappy
    """None is a gap."""
    style: Literal["line", "dots"] = "line"
    """Only lines are smoothed, and of these only those without a band."""
    low: Gappy | None = None
    """Lower edge of a band around it."""
    high: Gappy | None = None
    """Upper edge of that band."""
    marks: Sequence[Mark] = ()


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Curves to be zoomed, smoothed, shown and hidden."""

    title: str
    curves: Sequence[Curve]
    axes: Sequence[str]
    """Names of the x axes to choose from, the first one to begin with."""
    y_label: str
    off: Sequence[str] = ()
    """Kinds that are not shown at first."""
    note: str = ""


def curves_html(section: Curves, *, name: str) -> str:
    """Return the section's data, the place for its picture, and its table; `name` is its id on the page."""
    kept = thinned(section.curves)
    note = " ".join([section.note, _thinning_note(section.curves, kept)]).strip()
    data = {
        "axes": list(section.axes),
        "yLabel": section.y_label,
        "title": section.title,
        "off": list(section.off),
        "curves": [_plain(curve) for curve in kept],
    }
    return (
        f'<div class="chart" data-from="{name}"></div>'
        f'<script type="application/json" id="{name}">{embedded_json(data)}</script>'
        f"<noscript>{_table_html(section)}</noscript>"
        f'<p class="note">{html.escape(note)}</p>'
    )


def embedded_json(value: Any) -> str:
    """Return JSON that can stand inside a script element, whatever words it holds.

    Example:
        >>> embedded_json("</script>")
        '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def thinned(curves: Sequence[Curve], *, most_points: int = MOST_POINTS) -> list[Curve]:
    """Return the curves with at most about `most_points` points together; short curves stay whole.

    Raises:
        ValueError: a curve has not as many places as values.
    """
    for curve in curves:
        if {len(places) for places in curve.x.values()} != {len(curve.y)}:
            raise ValueError(f"curve {curve.name!r} ({curve.kind}) has not as many places as values")
    room, each = most_points, math.inf
    for place, length in enumerate(sorted(len(curve.y) for curve in curves)):
        each = room / (len(curves) - place)  # what is left, shared by all that are at least as long
        if length > each:
            break
        room -= length
        each = math.inf
    limit = max(LEAST_POINTS, each)
    return [_picked(curve, kept_points(curve.y, most=int(limit))) if len(curve.y) > limit else curve
            for curve in curves]  # fmt: skip


def kept_points(y: Gappy, *, most: int) -> list[int]:
    """Return which points stay: the lowest and the highest of each of `most` / 2 stretches, first and last.

    Example:
        >>> kept_points([0, 1, 9, 1, 1, 1, -9, 0], most=4)
        [0, 2, 5, 6, 7]
    """
    buckets = max(1, most // 2)
    kept = {0, len(y) - 1}
    for bucket in range(buckets):
        stretch = range(bucket * len(y) // buckets, (bucket + 1) * len(y) // buckets)
        there = [
            (value, index) for index in stretch if (value := y[index]) is not None and math.isfinite(value)
        ]
        if there:
            kept |= {min(there)[1], max(there)[1]}
        elif stretch:
            kept.add(stretch[0])  # the gap stays
    return sorted(kept)


def encode(values: Gappy, *, decimals: int) -> dict[str, Any]:
    """Return numbers as steps from neighbour to neighbour in units of the last decimal; "_" is a gap.

    Example:
        >>> encode([1.5, 1.75, 2.0, None, 1.0], decimals=2)
        {'decimals': 2, 'steps': '150,25*2,_,-100'}
    """
    words: list[list[Any]] = []
    before = 0
    for value in values:
        word = "_"
        if value is not None:
            now = round(value * 10.0**decimals)
            word, before = str(now - before), now
        if words and words[-1][0] == word:
            words[-1][1] += 1
        else:
            words.append([word, 1])
    steps = ",".join(word if times == 1 else f"{word}*{times}" for word, times in words)
    return {"decimals": decimals, "steps": steps}


def decimals_of(values: Gappy, *, relative: bool) -> int:
    """Return how many decimals show values to 1/10,000 of their span; if relative, each to 1/1,000 of itself.

    Example:
        >>> decimals_of([2.5, 5.0], relative=True), decimals_of([0.0, 3600.5], relative=False)
        (4, 1)
        >>> decimals_of([4096, 8192], relative=False)
        0
    """
    finite = [value for value in values if value is not None]
    if all(float(value).is_integer() for value in finite):
        return 0
    sizes = [(max(finite) - min(finite)) / 1e4]
    if relative:
        sizes += [min(abs(value) for value in finite if value) / 1e3]
    finest = min((size for size in sizes if size > 0), default=1e-4)
    largest = max(abs(value) for value in finite)
    return min(-math.floor(math.log10(finest)), 12 - math.floor(math.log10(largest)))


def _picked(curve: Curve, kept: Sequence[int]) -> Curve:
    def some(values: Any) -> Any:
        return None if values is None else [values[index] for index in kept]

    x = {axis: some(places) for axis, places in curve.x.items()}
    return Curve(
        name=curve.name,
        group=curve.group,
        kind=curve.kind,
        style=curve.style,
        x=x,
        y=some(curve.y),
        low=some(curve.low),
        high=some(curve.high),
        marks=curve.marks,
    )


def _plain(curve: Curve) -> dict[str, Any]:
    """Return a curve as the page's program reads it."""

    def packed(values: Gappy, *, relative: bool) -> dict[str, Any]:
        values = [None if value is None or not math.isfinite(value) else value for value in values]
        return encode(values, decimals=decimals_of(values, relative=relative))

    return {
        "name": curve.name,
        "group": curve.group,
        "kind": curve.kind,
        "style": curve.style,
        "x": {axis: packed(places, relative=False) for axis, places in curve.x.items()},
        "y": packed(curve.y, relative=True),
        "low": None if curve.low is None else packed(curve.low, relative=True),
        "high": None if curve.high is None else packed(curve.high, relative=True),
        "marks": [{"x": dict(mark.x), "text": mark.text} for mark in curve.marks],
    }


def _thinning_note(curves: Sequence[Curve], kept: Sequence[Curve]) -> str:
    whole, left = (sum(len(curve.y) for curve in some) for some in (curves, kept))
    if whole == left:
        return (
            f"All {whole:,} points are here, rounded; a screenful shows up to 2,000 of a curve, the lowest "
            f"and the highest of each stretch."
        )
    return (
        f"{left:,} of {whole:,} points are here, rounded: of each stretch of a long curve the lowest and the "
        f"highest."
    )


def _table_html(section: Curves) -> str:
    """Return a table of some points of each curve."""
    axis = section.axes[0]
    rows = []
    for curve in section.curves:
        if axis not in curve.x:
            continue
        count = len(curve.y)
        for place in (
            sorted({round(i * (count - 1) / (TABLE_ROWS - 1)) for i in range(TABLE_ROWS)}) if count else ()
        ):
            value = curve.y[place]
            shown = "-" if value is None else f"{value:.4g}"
            cells = "".join(f"<td>{cell}</td>" for cell in (f"{curve.x[axis][place]:,g}", shown))
            name, kind = html.escape(curve.name), html.escape(curve.kind)
            rows.append(
                f'<tr><th scope="row" class="word">{name}</th><td class="word">{kind}</td>{cells}</tr>'
            )
    heading = "".join(f"<th>{html.escape(cell)}</th>" for cell in ("curve", "kind", axis, section.y_label))
    return (
        '<p>The picture needs JavaScript; these are some of its points.</p><div class="scroll"><table>'
        f"<thead><tr>{heading}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
