"""How a figure of the documentation looks: panels of bars or curves, as an SVG of few bytes.

A panel is plain data, and an SVG holds that of its panels as JSON in its description, so that a test can tell
whether a picture still shows what the result files say.
"""

import io
import json
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch

Panel = dict[str, Any]
STYLE = {
    "svg.hashsalt": "hardy",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
"""Those of Okabe and Ito, which colour-blind people can tell apart."""
LINES, MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v", "P", "X")
PANEL_WIDTH, ALONE_WIDTH, BAR_HEIGHT, LEAST_HEIGHT = 4.6, 6.4, 0.2, 3.0
"""Inches."""
TITLE_LETTERS = 48
"""Of a line."""
SMALL: dict[str, Any] = {"fontsize": "small", "frameon": False, "columnspacing": 1.0, "handlelength": 1.5}
"""How legends look."""
_DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"


def spread(mean: float | None, seeds: Sequence[float | None] = ()) -> dict[str, Any]:
    """Return the length of a bar, and the dots on it; a mean of None is a run that was lost."""
    return {"mean": mean, "seeds": list(seeds)}


def bars(
    title: str,
    series: Mapping[str, Mapping[str, Mapping[str, Any]]],
    *,
    reference: float | None = None,
    scale: str = "linear",
) -> Panel:
    """Return a panel of bars: series by name, each with a `spread` by label.

    Args:
        title: what the lengths are.
        series: of one name: that name is not shown.
        reference: where a vertical line stands.
        scale: `linear`, or `log`, where diamonds stand instead of bars.
    """
    return {"kind": "bars", "title": title, "series": series, "reference": reference, "scale": scale}


def curves(title: str, series: Mapping[str, Sequence[tuple[float, float]]], *, x: str) -> Panel:
    """Return a panel of curves over logarithmic axes: points by name."""
    return {
        "kind": "curves",
        "title": title,
        "x": x,
        "series": {k: [list(p) for p in v] for k, v in series.items()},
    }


def svg(panels: Sequence[Panel]) -> str:
    """Return the picture; the same bytes for the same panels and release of matplotlib."""
    with rc_context(STYLE):
        height = max(LEAST_HEIGHT, *(0.8 + BAR_HEIGHT * _num_bars(panel) for panel in panels))
        size = (PANEL_WIDTH * len(panels) if len(panels) > 1 else ALONE_WIDTH, height)
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            (_draw_bars if panel["kind"] == "bars" else _draw_curves)(axes, panel)
            axes.set_title(textwrap.fill(panel["title"], TITLE_LETTERS))
        out = io.StringIO()
        metadata = {"Date": None, "Description": json.dumps(panels)}
        FigureCanvasSVG(figure).print_svg(out, metadata=metadata)
    lines = [line.strip() for line in out.getvalue().splitlines()]
    return "\n".join(line for line in lines if line and not line.startswith("<!--")) + "\n"


def panels_of(text: str) -> list[Panel]:
    """Return the data that a picture shows."""
    found = ElementTree.fromstring(text).find(f".//{_DESCRIPTION}")
    if found is None or found.text is None:
        raise ValueError("this picture holds no data; it was not drawn by docs/figures.py")
    return json.loads(found.text)


def _num_bars(panel: Panel) -> int:
    return sum(len(labels) + 1 for labels in panel["series"].values()) if panel["kind"] == "bars" else 0


def _draw_bars(axes: Axes, panel: Panel) -> None:
    series = panel["series"]
    labels = list(dict.fromkeys(label for found in series.values() for label in found))
    thickness = 0.8 / len(series)
    axes.set_xscale(panel["scale"])
    for i, found in enumerate(series.values()):
        for row, label in enumerate(labels):
            y = row + thickness * (i - (len(series) - 1) / 2)
            if label in found:
                _draw_bar(axes, found[label], y=y, thickness=thickness, color=COLORS[i])
    axes.set_yticks(range(len(labels)), labels)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.margins(x=0.2)
    if panel["reference"] is not None:
        axes.axvline(panel["reference"], color="black", linewidth=1)
    if len(series) > 1:
        handles = [Patch(color=COLORS[i], label=name) for i, name in enumerate(series)]
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.08), ncols=3, **SMALL)


def _draw_bar(axes: Axes, found: Mapping[str, Any], *, y: float, thickness: float, color: str) -> None:
    mean = found["mean"]
    if mean is None:
        axes.annotate("lost", (0.01, y), xycoords=("axes fraction", "data"), va="center", fontsize="small")
        return
    if axes.get_xscale() == "log":  # where bars have no natural beginning
        axes.plot([mean], [y], "D", color=color, markersize=6)
    else:
        axes.barh(y, mean, height=0.9 * thickness, color=color)
    seeds = [value for value in found["seeds"] if value is not None]
    axes.plot(seeds, [y] * len(seeds), "o", color="black", markersize=3.5, mec="white", mew=0.5)
    at = max([mean, *seeds]) if mean >= 0 else min([mean, *seeds])
    axes.annotate(
        f"{mean:.3g}",
        (at, y),
        xytext=(6 if mean >= 0 else -6, 0),
        textcoords="offset points",
        va="center",
        ha="left" if mean >= 0 else "right",
        fontsize="small",
    )


def _draw_curves(axes: Axes, panel: Panel) -> None:
    for i, (name, points) in enumerate(panel["series"].items()):
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            LINES[i % len(LINES)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=3,
            markevery=max(1, len(points) // 8),
            color=COLORS[i % len(COLORS)],
            label=name,
        )
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel(panel["x"], loc="right", labelpad=0)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=2, **SMALL)
