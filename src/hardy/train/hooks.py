"""What may listen to a run: progress displays, trackers. A hook only reads; it never changes the run."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known before the first step."""

    run_dir: str
    num_parameters: int
    total_steps: int
    first_step: int
    """Steps already done: 0, or the step of the checkpoint."""
    tokens_per_step: int
    num_workers: int
    device: str
    unigram_entropy: float
    """Nats per token that a model without context needs on the held-out documents."""
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a run ended; also written to summary.json."""

    run_dir: str
    steps: int
    first_loss: float
    last_loss: float
    validation_loss: float | None
    unigram_entropy: float
    tokens: int
    tokens_per_s: float
    peak_memory_mb: float
    skipped_steps: int
    sample: str
    stopped_by: str | None
    """None for a finished run, else the signal's name."""
    note: str | None = None
    """What to know of how batches were planned, such as that no group of workers was ever formed."""


class Hook:
    """Listener of a run; called on rank 0 only, each method empty until a listener needs it."""

    def on_phase(self, name: str, fraction: float) -> None:
        """Before the first step: a phase such as reading the data is `fraction` done (0 to 1)."""

    def on_start(self, facts: RunFacts) -> None:
        """Everything is built; the first step comes next."""

    def on_step(self, record: dict[str, Any]) -> None:
        """One step is done; `record` is what metrics.jsonl holds."""

    def on_end(self, summary: Summary) -> None:
        """The run is over and saved."""

    def close(self) -> None:
        """Nothing more comes, also after a failure."""
