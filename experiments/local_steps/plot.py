"""A picture of the curves, where matplotlib is installed."""

import importlib.util

from problems import D, M

BYTES_PER_ROUND = 2 * (M - 1) / M * D * 4
"""What a node sends in a ring's all-reduce of d fp32 numbers."""
RULES = (
    "exact solves, mean",
    "exact solves, anchored",
    "local GD, eta 0.02, L = 500",
    "anchored local GD, eta 0.02, L = 500",
    "normalised logistic regression",
)


def draw(runs, path):
    """Write the picture: gaps of local GD for several L against rounds, gaps of rules against bytes sent."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed")
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=80, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name in sorted(runs):
        if name.startswith("local GD"):
            curve = runs[name]["cosgap"]
            scaled = "0.2/L" in name
            left.plot(curve.keys(), curve.values(), "--" if scaled else "-", label=name.partition(", ")[2])
    for name in RULES:
        curve = runs[name]["cosgap"]
        right.plot([k * BYTES_PER_ROUND for k in curve], curve.values(), label=name)
    left.set(xlabel="rounds", ylabel="1 - cos(w, max-margin direction)", title="local GD")
    right.set(xlabel="bytes sent by each node", title="rules")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log")
        axes.legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})
