"""Pictures: accuracies as a heat map of attacks x rules; accuracy against simulated time."""

import statistics

from cells import TRUSTED_ALONE
from grid import COLUMNS, DEFAULT, mean
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_grid(found, path):
    """Write both splits side by side, training on the trusted gradient alone as the last column."""
    figure = Figure(figsize=(14, 4.6), dpi=80, layout="constrained")
    alone = mean(found["trusted"]["gaussian"][TRUSTED_ALONE])
    columns = (*COLUMNS, TRUSTED_ALONE)
    for axes, name in zip(figure.subplots(1, 2), ("iid", "non-iid"), strict=True):
        values = [[mean(row[rule]) for rule in COLUMNS] + [alone] for row in found[name].values()]
        axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize="small")
        axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize="small")
        axes.set_yticks(range(len(values)), list(found[name]), fontsize="small")
        axes.set_title(f"{name}: test accuracy, 8 of 20 workers attack")
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})


def draw_waiting(found, path):
    """Write the mean accuracy of the seeds against the time that steps took, for each k."""
    figure = Figure(figsize=(10, 4.2), dpi=80, layout="constrained")
    for axes, rule in zip(figure.subplots(1, 2, sharey=True), ("mean", DEFAULT), strict=True):
        for name, columns in found["stragglers"].items():
            curves = [result["curve"] for result in columns[rule]]
            points = [
                [statistics.fmean(values) for values in zip(*at, strict=True)]
                for at in zip(*curves, strict=True)
            ]
            axes.plot([time for time, _ in points], [value for _, value in points], label=f"{name} of 20")
        axes.set(
            xlabel="time, in mean gradients of one worker", ylabel="test accuracy", title=rule, xlim=(0, 400)
        )
        axes.legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})
