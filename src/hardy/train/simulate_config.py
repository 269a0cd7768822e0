"""What `hardy simulate` plays: a cluster, what happens to it, a small task. Free of torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from hardy.config import (
    Config,
    ConfigError,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    from_dict,
    unknown_name,
)
from hardy.model.config import ModelConfig, ShapeConfig
from hardy.model.presets import PRESETS, DecoderShape, check_context, resolve_shape
from hardy.optim.config import Beta

MODELS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        name="1m", shape=ShapeConfig(hidden_size=64, intermediate_size=160, num_layers=2, num_heads=2)
    ),
    "1m_wide": ModelConfig(
        name="1m", shape=ShapeConfig(hidden_size=256, intermediate_size=768, num_layers=1, num_heads=4)
    ),
}
"""Beside the presets of the decoder: 0.1 M parameters, and 0.9 M in one block, quick to step on a CPU."""
VOCABULARY = 258
"""Of the tokenizer `bytes`."""


@dataclass(frozen=True, kw_only=True)
class EventConfig(Config):
    """Something that happens to one worker."""

    section: ClassVar[str] = "events"
    at_s: NonNegativeFloat
    """When, in virtual seconds."""
    worker: NonNegativeInt
    """To whom, from 0."""
    kind: Literal["fail", "join", "slow", "corrupt"]
    """fail ends the worker, join brings it back, slow makes its steps longer, corrupt spoils them."""
    factor: float | None = None
    """Of slow: how many times as long its steps take. Of corrupt: what multiplies its gradients; none makes
    its data noise instead."""
    until_s: PositiveFloat | None = None
    """Of slow and corrupt: when it ends; none means never. Steps that begin in between are concerned."""

    def covers(self, now_s: float) -> bool:
        """Whether a step that begins now is concerned."""
        return self.at_s <= now_s < (math.inf if self.until_s is None else self.until_s)


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Config):
    """What is trained, the same for all strategies."""

    section: ClassVar[str] = "task"
    model: str = "1m_wide"
    """tiny (0.1 M parameters), 1m_wide (0.9 M, one block), or a preset of the decoder."""
    steps: PositiveInt = 200
    """Steps of each worker; with rounds by time the mean over workers."""
    tokens: PositiveInt = 32
    """Tokens of one worker's step."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate of AdamW, the inner optimizer."""
    beta1: Beta = 0.9
    """AdamW's decay of the first moment; 0 for workers that send momenta (strategy.worker_momentum)."""
    seed: NonNegativeInt = 0
    """Of initial weights, order of data, and how long steps take."""
    source: str = "synthetic:constant,documents=2000,mean=255"
    """Text, as data.source has it."""
    evaluate_every_steps: PositiveInt = 10
    """Steps of all workers, on average, between two points of the curve."""
    evaluate_packs: PositiveInt = 16
    """Held-out packs of `tokens` tokens at each point."""

    def model_config(self) -> ModelConfig:
        """Return the settings of the model.

        Raises:
            ConfigError: no such model.
        """
        if self.model in MODELS:
            return MODELS[self.model]
        if self.model not in PRESETS:
            raise ConfigError(f"task.model: {unknown_name(self.model, 'model', [*MODELS, *PRESETS])}")
        return ModelConfig(name=self.model)

    def shape(self) -> DecoderShape:
        """Return every size of the model; refuse what does not fit."""
        shape = resolve_shape(self.model_config(), vocab_size=VOCABULARY)
        check_context(shape.context_tokens, document_tokens=self.tokens)
        return shape


@dataclass(frozen=True, kw_only=True)
class SimulationConfig(Config):
    """The cluster and the task. The default costs no time but the steps themselves."""

    workers: PositiveInt = 4
    """How many."""
    step_s: PositiveFloat = 0.5
    """What one step costs an ordinary worker on average, in virtual seconds."""
    slow_factors: tuple[PositiveFloat, ...] = ()
    """Worker r's steps take slow_factors[r] times as long; not listed is 1. A table by worker will do."""
    variation_sigma: NonNegativeFloat = 0.0
    """Spread of the natural logarithm of the time that equal steps take (lognormal around the same mean)."""
    bandwidth_bytes_per_s: PositiveFloat | None = None
    """Bytes a worker's link sends per second; none means infinitely many."""
    bandwidth_mbit_per_s: PositiveFloat | None = None
    """The same in 10^6 bits per second; only one of the two."""
    latency_s: NonNegativeFloat = 0.0
    """Seconds before a message arrives, whatever its size."""
    detect_s: NonNegativeFloat = 1.0
    """Seconds until the others notice that a worker they wait for is dead."""
    events: tuple[EventConfig, ...] = ()
    """What happens to single workers."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """What is trained."""

    def __post_init__(self) -> None:
        """Refuse what cannot be or contradicts itself."""
        super().__post_init__()
        if len(self.slow_factors) > self.workers:
            raise ConfigError(
                f"slow_factors lists {len(self.slow_factors)} workers, but workers={self.workers}; shorten "
                f"the list or raise workers"
            )
        if self.bandwidth_bytes_per_s is not None and self.bandwidth_mbit_per_s is not None:
            raise ConfigError(
                f"bandwidth_bytes_per_s={self.bandwidth_bytes_per_s:g} and bandwidth_mbit_per_s="
                f"{self.bandwidth_mbit_per_s:g} say the same thing twice; leave one out"
            )
        self.task.shape()
        _check_events(self.events, num_workers=self.workers)

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second of a link; None means infinitely many."""
        if self.bandwidth_mbit_per_s is not None:
            return self.bandwidth_mbit_per_s * 1e6 / 8
        return self.bandwidth_bytes_per_s

    def of_worker(self, worker: int, kind: str) -> list[EventConfig]:
        """Return one worker's events of a kind."""
        return [event for event in self.events if (event.worker, event.kind) == (worker, kind)]


@dataclass(frozen=True, kw_only=True)
class Life:
    """One worker from when it begins until it dies; a worker that comes back begins a new one."""

    worker: int
    birth_s: float = 0.0
    death_s: float = math.inf


def lives_of(config: SimulationConfig, *, with_joins: bool) -> list[Life]:
    """Return the workers' first lives in their order, then those that join later, by when they do.

    Example:
        >>> fail, join = (EventConfig(at_s=t, worker=0, kind=k) for t, k in ((3.0, "fail"), (5.0, "join")))
        >>> config = SimulationConfig(workers=2, events=(fail, join))
        >>> [(life.worker, life.birth_s, life.death_s) for life in lives_of(config, with_joins=True)]
        [(0, 0.0, 3.0), (1, 0.0, inf), (0, 5.0, inf)]
    """
    births = [(0.0, worker) for worker in range(config.workers)]
    if with_joins:
        births += sorted((event.at_s, event.worker) for event in config.events if event.kind == "join")
    return [
        Life(worker=worker, birth_s=birth_s, death_s=_next_failure(config, worker, after_s=birth_s))
        for birth_s, worker in births
    ]


def _next_failure(config: SimulationConfig, worker: int, *, after_s: float) -> float:
    moments = [event.at_s for event in config.of_worker(worker, "fail") if event.at_s >= after_s]
    return min(moments, default=math.inf)


def _check_events(events: Sequence[EventConfig], *, num_workers: int) -> None:
    """Refuse events that name nobody, contradict each other, or leave nobody."""
    for index, event in enumerate(events):
        _check_event(f"events[{index}]", event, num_workers=num_workers)
    _check_presence(events, num_workers=num_workers)


def _check_event(here: str, event: EventConfig, *, num_workers: int) -> None:
    if event.worker >= num_workers:
        raise ConfigError(
            f"{here}.worker={event.worker} does not exist: workers={num_workers}, counted from 0; name "
            f"one of 0 to {num_workers - 1}, or raise workers"
        )
    if event.kind in ("fail", "join"):
        given = [name for name in ("factor", "until_s") if getattr(event, name) is not None]
        if given:
            raise ConfigError(f"{here}.{given[0]} means nothing for kind={event.kind!r}; leave it out")
    elif event.until_s is not None and event.until_s <= event.at_s:
        raise ConfigError(f"{here}.until_s={event.until_s:g} must be after at_s={event.at_s:g}")
    if event.kind == "slow" and not (event.factor is not None and 0 < event.factor < math.inf):
        raise ConfigError(
            f"{here}.factor={event.factor} must be above 0 and finite for kind='slow'; 3 triples the time"
        )


def _check_presence(events: Sequence[EventConfig], *, num_workers: int) -> None:
    """Refuse failures of those who are gone, joins of those who are there, and a cluster of nobody."""
    gone: set[int] = set()
    moments: dict[int, float] = {}
    numbered = [(event.at_s, index) for index, event in enumerate(events) if event.kind in ("fail", "join")]
    for at_s, index in sorted(numbered):
        worker, kind = events[index].worker, events[index].kind
        if (kind == "join") != (worker in gone):
            why = "never left" if kind == "join" and worker not in moments else "is there"
            why = why if kind == "join" else "has already failed"
            raise ConfigError(
                f"events[{index}] lets worker {worker} {kind} at at_s={at_s:g}, but it {why} then; "
                + ("let it fail before" if kind == "join" else "let it join before")
            )
        if moments.get(worker) == at_s:
            raise ConfigError(f"events[{index}] lets worker {worker} fail and join both at at_s={at_s:g}")
        moments[worker] = at_s
        gone ^= {worker}
        if len(gone) == num_workers:
            raise ConfigError(
                f"events[{index}] fails the last of workers={num_workers} at at_s={at_s:g}, and then nobody "
                f"is left; leave out one of these events"
            )


def read_config(data: Mapping[str, Any]) -> SimulationConfig:
    """Build the cluster and the task from the plain values of a file, without its strategies."""
    data = dict(data)
    events = data.pop("events", [])
    if not isinstance(events, list | tuple):
        raise ConfigError(f"events must be a list of tables, [[events]] in TOML, got {events!r}")
    read = [from_dict(EventConfig, event, path=f"events[{index}]") for index, event in enumerate(events)]
    slow = data.get("slow_factors")
    if isinstance(slow, Mapping):
        data["slow_factors"] = _listed(slow, num_workers=data.get("workers", SimulationConfig.workers))
    return from_dict(SimulationConfig, {**data, "events": tuple(read)})


def _listed(factors: Mapping[str, Any], *, num_workers: Any) -> list[Any]:
    """Return a table of factors by worker as a list."""
    result: dict[int, Any] = {}
    for worker, factor in factors.items():
        if not worker.isdecimal() or (isinstance(num_workers, int) and int(worker) >= num_workers):
            raise ConfigError(
                f"slow_factors.{worker} names no worker: they are numbered from 0, and workers={num_workers}"
            )
        result[int(worker)] = factor
    return [result.get(worker, 1.0) for worker in range(max(result, default=-1) + 1)]
