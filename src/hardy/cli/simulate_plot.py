"""Loss against virtual time, as a picture and in letters. matplotlib is imported when a picture is drawn."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING

from hardy.config import UserError, reason_of

if TYPE_CHECKING:
    from hardy.train.simulate_result import StrategyResult

WIDTH, HEIGHT = 72, 14


def chart(results: Sequence["StrategyResult"], *, width: int = WIDTH, height: int = HEIGHT) -> Iterator[str]:
    """Yield the lines of a chart of validation loss against virtual time, one letter for each strategy.

    Where two strategies fall on one place, the one listed first is shown.
    """
    points = {
        letter: [(point.virtual_s, point.validation_loss) for point in result.curve]
        for letter, result in zip(ascii_lowercase, results, strict=False)
    }
    every = [point for curve in points.values() for point in curve if point[1] == point[1]]
    if not every:
        return
    last_s = max(time_s for time_s, _ in every) or 1.0
    low, high = min(loss for _, loss in every), max(loss for _, loss in every)
    span = (high - low) or 1.0
    rows = [[" "] * width for _ in range(height)]
    for letter, curve in reversed(points.items()):
        for time_s, loss in curve:
            if loss == loss:  # not NaN
                row = round((high - loss) / span * (height - 1))
                rows[row][round(time_s / last_s * (width - 1))] = letter
    labels = {0: f"{high:.2f}", height - 1: f"{low:.2f}"}
    margin = max(map(len, labels.values()))
    for index, row in enumerate(rows):
        yield f"{labels.get(index, ''):>{margin}} |{''.join(row)}".rstrip()
    yield " " * margin + " +" + "-" * width
    yield " " * margin + f"  0{f'{last_s:,.1f} s':>{width - 1}}"
    yield "  ".join(f"{letter} {result.label}" for letter, result in zip(points, results, strict=False))


def draw_curves(results: Sequence["StrategyResult"], path: Path) -> Path:
    """Draw validation loss against virtual time and against tokens, and return `path`.

    Raises:
        UserError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    by_time, by_tokens = figure.subplots(1, 2, sharey=True)
    for result in results:
        losses = [point.validation_loss for point in result.curve]
        by_time.plot([point.virtual_s for point in result.curve], losses, label=result.label)
        by_tokens.plot([point.tokens for point in result.curve], losses)
    by_time.set(xlabel="virtual seconds", ylabel="validation loss (nats per token)")
    by_tokens.set(xlabel="tokens of all workers")
    by_time.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"the picture {path} could not be written: {reason_of(error)}") from None
    return path
