"""The timeline of a plan as a picture. matplotlib is imported when one is drawn."""

from pathlib import Path
from typing import TYPE_CHECKING

from hardy.balance.timeline import spans
from hardy.config import UserError, reason_of

if TYPE_CHECKING:
    from hardy.balance.plan import Plan


def draw_timeline(made: "Plan", path: Path) -> Path:
    """Draw when each rank works on its micro-batches, and return `path`.

    Raises:
        UserError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, min(2 + 0.2 * made.world_size, 12)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for rank in range(made.world_size):
        for index, (start, stop) in enumerate(spans(made, rank)):
            axes.barh(rank, stop - start, left=start, height=0.8, color=f"C{index % 10}", edgecolor="white")
    axes.axvline(made.lower_bound, color="black", linestyle="--", label="lower bound")
    axes.axvline(made.cost, color="black", label="planned")
    axes.invert_yaxis()
    axes.set(xlabel="predicted time", ylabel="rank", title=f"idle {made.idle_share:.1%}, gap {made.gap:.1%}")
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"the picture {path} could not be written: {reason_of(error)}") from None
    return path
