"""What a simulated strategy came to. Free of torch."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hardy.config import to_dict
from hardy.train.simulate_config import SimulationConfig
from hardy.train.simulate_strategies import Entry
from hardy.train.simulate_times import Floats, Ints

STOPPED = "a worker died, and the strategy cannot go on without it"
"""Why a run ended before its time."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where a run stood at one moment."""

    virtual_s: float
    """Virtual time."""
    steps: int
    """Steps of all workers together."""
    tokens: int
    """Tokens of all workers together."""
    train_loss: float | None
    """Mean over the steps since the last point, corrupt workers left out, in nats per token."""
    validation_loss: float
    """Of what all agree on (the anchor), on held-out text."""
    accuracy: float
    """Share of held-out tokens whose next one was the most likely."""
    bytes_sent: int
    """By the busiest worker so far."""
    idle_share: float
    """Of all workers' time so far: waiting for others."""
    exchange_share: float
    """Of all workers' time so far: sending, once all were there."""
    rounds: int
    """Finished so far."""
    flagged: int
    """Times a replica was left out of a round."""
    drift_cosine: float | None
    """Of a replica's pseudo-gradient with what was applied: mean over replicas in the last round."""


@dataclass(kw_only=True)
class StrategyResult:
    """One strategy on the cluster."""

    label: str
    settings: dict[str, Any]
    """All settings of the strategy."""
    virtual_s: float
    """When the last worker ended."""
    steps: int
    """Finished by all workers together."""
    tokens: int
    bytes_sent: int
    """By the busiest worker."""
    idle_share: float
    """Of all workers' time: waiting for others."""
    exchange_share: float
    """Of all workers' time: sending, once all were there."""
    rounds: int
    worker_steps: list[int]
    """Finished by each worker."""
    stopped: str | None = None
    """Why the run ended before its time."""
    flagged: int = 0
    flagged_workers: dict[str, int] = field(default_factory=dict)
    """How often each worker was left out of a round; those never left out are not listed."""
    rollbacks: int = 0
    """Units that stayed as they were because every replica was left out."""
    train_loss: float | None = None
    validation_loss: float | None = None
    accuracy: float | None = None
    drift_cosine: float | None = None
    curve: list[Point] = field(default_factory=list)
    """Empty where no model was trained."""

    @property
    def steps_per_s(self) -> float:
        """Steps of all workers per virtual second."""
        return self.steps / self.virtual_s if self.virtual_s > 0 else 0.0

    def plain(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self) | {"steps_per_s": self.steps_per_s}


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Where the virtual time of the lives that took part went; all arrays by life."""

    workers: Ints
    spans_s: Floats
    """From birth to end."""
    ends_s: Floats
    idle_s: Floats
    """Waited between birth and end."""
    exchange_s: Floats
    """In meetings, after everyone had arrived."""
    bytes_sent: Ints
    steps: Ints
    """Finished steps."""

    @property
    def idle_share(self) -> float:
        """Share of all time that was waited."""
        return self._share(self.idle_s)

    @property
    def exchange_share(self) -> float:
        """Share of all time that went into exchanges."""
        return self._share(self.exchange_s)

    def _share(self, seconds: Floats) -> float:
        whole_s = float(self.spans_s.sum())
        return float(seconds.sum()) / whole_s if whole_s > 0 else 0.0


def summarise(
    entry: Entry, config: SimulationConfig, ledger: Ledger, *, rounds: int, stopped: str | None
) -> StrategyResult:
    """Return the result of a strategy, losses left open."""
    worker_steps = np.zeros(config.workers, dtype=np.int64)
    np.add.at(worker_steps, ledger.workers, ledger.steps)
    steps = int(worker_steps.sum())
    return StrategyResult(
        label=entry.label,
        settings=to_dict(entry.config),
        virtual_s=float(ledger.ends_s.max()),
        steps=steps,
        tokens=steps * config.task.tokens,
        bytes_sent=int(ledger.bytes_sent.max()),
        idle_share=ledger.idle_share,
        exchange_share=ledger.exchange_share,
        rounds=rounds,
        worker_steps=worker_steps.tolist(),
        stopped=stopped,
    )
