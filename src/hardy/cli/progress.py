"""How a run shows itself: a moving display on a terminal, plain lines elsewhere and in log.txt."""

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from hardy.train.hooks import Hook, RunFacts, Summary

_NOBODY_READS = (errno.EPIPE, errno.EIO)
"""What the system says of a pipe without a reader, and of a terminal that was closed."""


def progress_hooks(
    kind: str,
    run_dir: Path,
    *,
    every_steps: int,
    stream: TextIO = sys.stdout,
    reader_gone: Callable[[], None] = lambda: None,
) -> list[Hook]:
    """Return the displays that `log.progress` asks for; log.txt is always written.

    Args:
        kind: "live", "plain", "none", or "auto": live on a terminal.
        run_dir: where log.txt lies.
        every_steps: steps from line to line.
        stream: where the run shows itself.
        reader_gone: called when nothing can be written there any more.
    """
    if kind == "auto":
        kind = "live" if stream.isatty() else "plain"
    hooks: list[Hook] = [PlainLines(_append_to(run_dir / "log.txt"), every_steps=every_steps)]
    if kind == "live":
        hooks.append(WhileRead(LiveDisplay(Console(file=stream)), reader_gone))
    elif kind == "plain":
        lines = PlainLines(lambda line: print(line, file=stream, flush=True), every_steps=every_steps)
        hooks.append(WhileRead(lines, reader_gone))
    return hooks


def _append_to(path: Path) -> Callable[[str], None]:
    def write(line: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    return write


class WhileRead(Hook):
    """A display as long as somebody reads: a pipe or terminal that was closed ends it, and not the run."""

    def __init__(self, display: Hook, reader_gone: Callable[[], None]) -> None:
        self._display = display
        self._reader_gone = reader_gone

    def on_phase(self, name: str, fraction: float) -> None:
        """Pass it on."""
        self._show(lambda display: display.on_phase(name, fraction))

    def on_start(self, facts: RunFacts) -> None:
        """Pass it on."""
        self._show(lambda display: display.on_start(facts))

    def on_step(self, record: dict[str, Any]) -> None:
        """Pass it on."""
        self._show(lambda display: display.on_step(record))

    def on_end(self, summary: Summary) -> None:
        """Pass it on."""
        self._show(lambda display: display.on_end(summary))

    def close(self) -> None:
        """Pass it on."""
        self._show(lambda display: display.close())

    def _show(self, what: Callable[[Hook], None]) -> None:
        try:
            what(self._display)
        except (OSError, SystemExit) as error:  # rich makes the second of a broken pipe
            if isinstance(error, OSError) and error.errno not in _NOBODY_READS:
                raise
            self._display = Hook()
            self._reader_gone()


class PlainLines(Hook):
    """A line every so many steps, readable in a file."""

    def __init__(self, write: Callable[[str], None], *, every_steps: int) -> None:
        self.write = write
        self.every_steps = every_steps
        self.speed = Speed()
        self.total_steps = 0
        self._phase = ""

    def on_phase(self, name: str, fraction: float) -> None:
        """Name each phase once."""
        if name != self._phase:
            self._phase = name
            self.write(f"{name} ...")

    def on_start(self, facts: RunFacts) -> None:
        """Say what runs."""
        self.total_steps = facts.total_steps
        self.write(describe(facts))

    def on_step(self, record: dict[str, Any]) -> None:
        """Write the line when it is time, or when there is a validation loss."""
        self.speed.update(record)
        step = record["step"]
        if step % self.every_steps and "validation_loss" not in record and step != self.total_steps:
            return
        validation = f"  validation {record['validation_loss']:.4f}" if "validation_loss" in record else ""
        remaining_s = (self.total_steps - step) * self.speed.step_s
        self.write(
            f"step {step}/{self.total_steps}  loss {record['loss']:.4f}{validation}  lr {record['lr']:.2e}  "
            f"{self.speed.tokens_per_s:,.0f} tokens/s  {short(record['tokens'])} tokens  "
            f"{record['peak_memory_mb']:,.0f} MB  {clock_time(remaining_s)} left"
        )


class LiveDisplay(Hook):
    """A progress bar with loss, speed, tokens seen, memory and time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.speed = Speed()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._phase = ""
        self._validation = ""

    def on_phase(self, name: str, fraction: float) -> None:
        """Show the phase's own bar."""
        if name != self._phase:
            self._begin(name, total=1.0, text="")
            self._phase = name
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=fraction)

    def on_start(self, facts: RunFacts) -> None:
        """Turn to the bar of the training itself."""
        self._stop()
        self.console.print(describe(facts))
        self._begin("training", total=facts.total_steps, text="")

    def on_step(self, record: dict[str, Any]) -> None:
        """Move the bar."""
        self.speed.update(record)
        if "validation_loss" in record:
            self._validation = f"  val {record['validation_loss']:.3f}"
        text = (
            f"loss {record['loss']:.3f}{self._validation}  {self.speed.tokens_per_s:,.0f} tok/s  "
            f"{short(record['tokens'])} tokens  {record['peak_memory_mb']:,.0f} MB"
        )
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=record["step"], text=text)

    def on_end(self, summary: Summary) -> None:
        """Leave the last state of the bar on the screen."""
        self._stop()

    def close(self) -> None:
        """Give the terminal back, also after a failure."""
        self._stop()

    def _begin(self, name: str, *, total: float, text: str) -> None:
        self._stop()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(name, total=total, text=text)
        self._bar.start()

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
        self._bar = None


class Speed:
    """Smoothed seconds per step and tokens per second."""

    def __init__(self) -> None:
        self.step_s = 0.0
        self.tokens_per_s = 0.0
        self._last_tokens: int | None = None

    def update(self, record: dict[str, Any]) -> None:
        """Take in a step; the first one (warm-up of kernels) counts only until the second."""
        step_s = record["step_time_s"]
        self.step_s = step_s if self._last_tokens is None else 0.9 * self.step_s + 0.1 * step_s
        if self._last_tokens is not None:
            self.tokens_per_s = (record["tokens"] - self._last_tokens) / max(self.step_s, 1e-9)
        self._last_tokens = record["tokens"]


def describe(facts: RunFacts) -> str:
    """Return one line on what is about to run."""
    resumed = f", going on after step {facts.first_step}" if facts.first_step else ""
    workers = "1 worker" if facts.num_workers == 1 else f"{facts.num_workers} workers"
    return (
        f"{short(facts.num_parameters)} parameters on {workers} ({facts.device}), {facts.total_steps} steps "
        f"of {facts.tokens_per_step:,} tokens{resumed}; run folder {facts.run_dir}"
    )


def summary_table(summary: Summary, *, plot: Path | None) -> Table:
    """Return the summary that ends a run."""
    table = Table(title="run stopped" if summary.stopped_by else "run finished", show_header=False)
    validation, unigram = summary.validation_loss, summary.unigram_entropy
    against = (
        "" if validation is None else f" ({validation / unigram:.0%} of the unigram entropy {unigram:.3f})"
    )
    rows = {
        "steps": f"{summary.steps}" + (f" (stopped by {summary.stopped_by})" if summary.stopped_by else ""),
        "training loss": f"{summary.first_loss:.3f} first, {summary.last_loss:.3f} last",
        "validation loss": "no held-out pack" if validation is None else f"{validation:.3f}{against}",
        "tokens": f"{summary.tokens:,}, {summary.tokens_per_s:,.0f} a second",
        "peak memory": f"{summary.peak_memory_mb:,.0f} MB",
        "skipped steps": f"{summary.skipped_steps}",
        "run folder": summary.run_dir,
        "plot": str(plot) if plot else "none",
        "sample": "".join(c if c.isprintable() or c == "\n" else "�" for c in summary.sample),
    }
    rows |= {} if summary.note is None else {"note": summary.note}
    table.add_column("what", style="bold")
    table.add_column("value", overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def short(count: float) -> str:
    """Return a count in three digits.

    Example:
        >>> short(1_234_567)
        '1.23M'
    """
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def clock_time(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss.

    Example:
        >>> clock_time(3725)
        '1:02:05'
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
