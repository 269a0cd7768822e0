"""Pictures: the losses of a run, the lengths of documents. matplotlib is imported when one is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hardy.config import UserError, reason_of

if TYPE_CHECKING:
    from hardy.data.inspect import SplitSummary

SMOOTHING = 0.95
"""Share of the old average that each step of the smoothed line keeps."""


def plot_losses(run_dir: Path) -> Path:
    """Draw RUN/loss.png from RUN/metrics.jsonl and return its path.

    Training loss, its running average, the validation loss, and as a line the loss of a model that knows only
    how frequent each token is.

    Raises:
        UserError: the run has no step yet.
    """
    import json

    from hardy.train.metrics import SmoothedLoss, read_metrics

    metrics = run_dir / "metrics.jsonl"
    records = list(read_metrics(metrics)) if metrics.exists() else []
    if not records:
        raise UserError(f"{run_dir} has no step to draw yet (no lines in metrics.jsonl)")
    smoothed = SmoothedLoss(decay=SMOOTHING)
    losses = [(r["step"], r["loss"]) for r in records if r["loss"] is not None]
    running = [(step, smoothed.update(loss)) for step, loss in losses]
    validation = [(r["step"], r["validation_loss"]) for r in records if r.get("validation_loss") is not None]
    summary_file = run_dir / "summary.json"
    summary = json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.exists() else {}
    figure, axes = _figure()
    axes.plot(*_columns(losses), color="0.8", linewidth=0.8, label="training")
    axes.plot(*_columns(running), color="C0", label="training, running average")
    axes.plot(*_columns(validation), color="C1", marker="o", markersize=3, label="validation")
    if summary.get("unigram_entropy"):
        axes.axhline(summary["unigram_entropy"], color="C2", linestyle="--", label="token frequencies alone")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run_dir.resolve().name)
    axes.legend()
    return _save(figure, run_dir / "loss.png")


def plot_lengths(summary: "SplitSummary", path: Path, *, title: str) -> Path:
    """Draw how long documents are, and which lengths hold the tokens, and return `path`."""
    if summary.histogram is None:
        raise UserError("the split is empty; there are no lengths to draw")
    edges = summary.histogram.edges
    figure, axes = _figure()
    widths = [right - left for left, right in zip(edges, edges[1:], strict=False)]
    for counts, color, label in (
        (summary.histogram.documents, "C0", "documents"),
        (summary.histogram.tokens, "C1", "tokens"),
    ):
        shares = [count / max(sum(counts), 1) for count in counts]
        axes.bar(edges[:-1], shares, width=widths, align="edge", alpha=0.5, color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens in the document", ylabel="share", title=title)
    axes.legend()
    return _save(figure, path)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _figure() -> tuple[Any, Any]:
    """Return a figure that needs no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> Path:
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"the picture {path} could not be written: {reason_of(error)}") from None
    return path
