"""A strategy on a simulated cluster, with real models: the trainer's own step on `SimWorld`'s virtual clock.

All strategies get the same initial weights, the same text and the same time for each step. Working takes
virtual time where the forward pass begins, so what a strategy does before it, after the backward pass and
after the step happens when it would. Nothing overlaps: an exchange that real workers would hide behind a step
takes its full time here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hardy.config import ConfigError
from hardy.data.config import DataConfig
from hardy.data.corpus import prepare
from hardy.data.stream import PackStream
from hardy.distributed.build import Trained, build_strategy
from hardy.distributed.comm import Alone, WorkerLostError
from hardy.distributed.config import ClusterConfig, LocalUpdateConfig
from hardy.distributed.groups import Grid, SimGroup, split
from hardy.distributed.local.updates import LocalUpdates
from hardy.distributed.robust.config import CombinedConfig
from hardy.distributed.robust.election import rules_of
from hardy.distributed.robust.fastest import FastestGroup
from hardy.distributed.robust.fastest_simulated import SimWire
from hardy.distributed.simulation import SimComm, SimWorld
from hardy.model.build import build_model
from hardy.model.decoder import unit_names
from hardy.model.init import initialise
from hardy.ops.packed import PackedBatch
from hardy.optim.build import build_optimizer
from hardy.optim.config import AdamWConfig, ScheduleConfig
from hardy.optim.schedules import Schedule, build_schedule
from hardy.rng import generator_for
from hardy.train.device import denormals_flushed
from hardy.train.evaluate import evaluate
from hardy.train.simulate_config import EventConfig, Life, SimulationConfig, lives_of
from hardy.train.simulate_result import STOPPED, Ledger, Point, StrategyResult, summarise
from hardy.train.simulate_strategies import Entry
from hardy.train.simulate_times import StepTimes
from hardy.train.step import AutocastSetting, Worker, train_step
from hardy.train.trusted import trusted_draw

MOST_BYTES = 48e9
"""What all replicas together may take of this machine's memory, by estimate."""
_BYTES_PER_PARAMETER = 28
"""Weight, gradient, two moments, anchor, momentum, an exchange: fp32 each."""
_VALIDATION_SHARE = 0.05
_WARMUP_STEPS = 10
_PATIENCE = 20
"""How many times as long as the run one who wants to join waits at most."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained: the same for all strategies."""

    model: nn.Module
    """With the initial weights; never trained itself."""
    train: PackStream
    validation: PackStream
    validation_packs: int
    unigram_entropy: float
    """Loss of a model that knows only how frequent each token is, in nats per token."""


def prepare_task(config: SimulationConfig, *, cache_dir: Path) -> Task:
    """Make the initial weights and tokenise the text.

    Raises:
        UserError: the text cannot be read or is too short, or the replicas would not fit in memory.
    """
    task = config.task
    model = build_model(task.model_config(), vocab_size=258, device="cpu")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    needed = num_parameters * _BYTES_PER_PARAMETER * config.workers
    if needed > MOST_BYTES:
        raise ConfigError(
            f"workers={config.workers} replicas of task.model={task.model} ({num_parameters:,} parameters) "
            f"would take about {needed / 1e9:.0f} GB here; take a smaller model or fewer workers, or count "
            f"costs alone (--no-train)"
        )
    initialise(model, seed=task.seed)
    data = DataConfig(source=task.source, pack_tokens=task.tokens, validation_fraction=_VALIDATION_SHARE)
    corpus = prepare(data, cache_dir=cache_dir)
    make = partial(
        PackStream,
        pack_tokens=task.tokens,
        document_tokens=None,
        packing="stream",
        seed=task.seed,
        end_id=corpus.tokenizer.end_id,
    )
    train, held_out = make(corpus.train), make(corpus.validation, num_epochs=1)
    train.check_size(config.workers)
    return Task(
        model=model,
        train=train,
        validation=held_out,
        validation_packs=min(task.evaluate_packs, held_out.num_packs or 0),
        unigram_entropy=corpus.unigram_entropy,
    )


def train_strategy(config: SimulationConfig, entry: Entry, task: Task) -> StrategyResult:
    """Train with one strategy on the cluster, and return what came of it; the same on every machine.

    Args:
        config: the cluster.
        entry: the strategy.
        task: from `prepare_task` of the same settings.
    """
    is_elastic = isinstance(entry.config, LocalUpdateConfig) and entry.config.elastic
    lives = lives_of(config, with_joins=is_elastic)
    world = SimWorld(
        len(lives),
        cluster=ClusterConfig(bandwidth_bytes_per_s=config.bandwidth, latency_s=config.latency_s),
        births={life: spec.birth_s for life, spec in enumerate(lives)},
        deaths={life: spec.death_s for life, spec in enumerate(lives) if spec.death_s < float("inf")},
        detect_s=config.detect_s,
    )
    log = _Log(config=config, lives=lives, world=world, task=task, times=StepTimes(config))
    with _one_thread(), denormals_flushed():
        world.run(lambda comm: _live(comm, entry, log))
        return log.result(entry)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute in one thread: the steps are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(kw_only=True)
class _Log:
    """What all lives write to; one of them runs at a time."""

    config: SimulationConfig
    lives: list[Life]
    world: SimWorld
    task: Task
    times: StepTimes
    begun: dict[int, int] = field(default_factory=dict)
    """Steps begun, by worker."""
    steps: dict[int, int] = field(default_factory=dict)
    """Steps finished, by life."""
    losses: list[float] = field(default_factory=list)
    """Training losses since the last point."""
    flagged: dict[int, list[int]] = field(default_factory=dict)
    """Workers left out, by round."""
    drifts: dict[int, list[float]] = field(default_factory=dict)
    """Drift cosine of each replica, by round."""
    curve: list[Point] = field(default_factory=list)
    stopped: str | None = None
    last: Worker | None = None
    """Of the first life that came to its end."""

    @property
    def total_steps(self) -> int:
        """Of all lives."""
        return sum(self.steps.values())

    def ledger(self) -> Ledger:
        """Return where the time of those who took part went so far."""
        lives = sorted(self.steps)
        reports = self.world.report()
        births_s = np.array([self.lives[life].birth_s for life in lives])
        ends_s = np.array([reports[life].virtual_s for life in lives])
        return Ledger(
            workers=np.array([self.lives[life].worker for life in lives]),
            spans_s=ends_s - births_s,
            ends_s=ends_s,
            idle_s=np.array([reports[life].idle_s for life in lives]) - births_s,
            exchange_s=np.array([reports[life].transfer_s for life in lives]),
            bytes_sent=np.array([reports[life].bytes_sent for life in lives]),
            steps=np.array([self.steps[life] for life in lives]),
        )

    def note_step(self, life: int, loss: float | None) -> bool:
        """Count a step; True where it is time for a point of the curve."""
        self.steps[life] += 1
        self.losses += [loss] if loss is not None else []
        return self.total_steps % (self.config.task.evaluate_every_steps * self.config.workers) == 0

    def note_round(self, report: dict[str, Any]) -> None:
        """Take down what a replica says of a round, if one ended, or of a step."""
        if "believed_workers" in report:
            believed = report["believed_workers"]
            left_out = [life for life in range(self.config.workers) if life not in believed]
            self.flagged.setdefault(report["combined_steps"], left_out)
        if "flagged_replicas" not in report:
            return
        number, members = report["round"], report.get("members", range(report["replicas"]))
        left_out = [self.lives[members[rank]].worker for rank in report["flagged_replicas"]]
        self.flagged.setdefault(number, left_out)
        if report["drift_cosine"] is not None:
            self.drifts.setdefault(number, []).append(report["drift_cosine"])

    def note_point(self, worker: Worker, *, now_s: float) -> None:
        """Evaluate, and add a point to the curve; one of the same step gives way."""
        packs = self.task.validation_packs
        found = evaluate(worker, self.task.validation, num_packs=packs, micro_packs=packs)
        ledger, losses = self.ledger(), self.losses
        kept_loss = sum(losses) / len(losses) if losses else None
        if self.curve and self.curve[-1].steps == self.total_steps:
            kept_loss = self.curve.pop().train_loss if kept_loss is None else kept_loss
        drifts = self.drifts[max(self.drifts)] if self.drifts else []
        self.curve.append(
            Point(
                virtual_s=now_s,
                steps=self.total_steps,
                tokens=self.total_steps * self.config.task.tokens,
                train_loss=kept_loss,
                validation_loss=found.loss,
                accuracy=found.accuracy,
                bytes_sent=int(ledger.bytes_sent.max()),
                idle_share=ledger.idle_share,
                exchange_share=ledger.exchange_share,
                rounds=getattr(worker.strategy, "round", 0),
                flagged=sum(map(len, self.flagged.values())),
                drift_cosine=sum(drifts) / len(drifts) if drifts else None,
            )
        )
        self.losses = []

    def result(self, entry: Entry) -> StrategyResult:
        """Return what came of it, after the last life ended."""
        assert self.last is not None, "not all workers fail"
        strategy = self.last.strategy
        result = summarise(
            entry, self.config, self.ledger(), rounds=getattr(strategy, "round", 0), stopped=self.stopped
        )
        self.note_point(self.last, now_s=result.virtual_s)
        last = self.curve[-1]
        left_out = [worker for workers in self.flagged.values() for worker in workers]
        result.flagged = len(left_out)
        result.flagged_workers = {str(w): left_out.count(w) for w in sorted(set(left_out))}
        result.rollbacks = getattr(strategy, "rollbacks", 0)
        result.train_loss, result.drift_cosine = last.train_loss, last.drift_cosine
        result.validation_loss, result.accuracy = last.validation_loss, last.accuracy
        result.curve = self.curve
        return result


def _live(comm: SimComm, entry: Entry, log: _Log) -> None:
    """Be one life: train to the end of the run, or until a loss ends it."""
    life, config = comm.world_rank, log.config
    is_first = life < config.workers
    if is_first:
        log.steps[life] = 0
    member: _Member | None = None
    try:
        member = _Member(comm, entry, log)
        log.steps[life] = 0
        member.train()
    except WorkerLostError:
        if is_first or member is not None:  # who was never admitted took no part
            log.stopped = STOPPED
    if member is not None and log.last is None:
        log.last = member.worker


class _Member:
    """One life's replica and how it trains."""

    def __init__(self, comm: SimComm, entry: Entry, log: _Log) -> None:
        self.comm, self.log, self.life = comm, log, comm.world_rank
        self.number = log.lives[self.life].worker
        """Which worker this is."""
        self.corrupted = log.config.of_worker(self.number, "corrupt")
        self.corruption: EventConfig | None = None
        """What spoils the step that is being made."""
        task = log.config.task
        self.model = build_model(task.model_config(), vocab_size=258, device="cpu")
        self.model.load_state_dict(log.task.model.state_dict())
        warmup_steps = min(_WARMUP_STEPS, task.steps // 10)
        schedule = ScheduleConfig(warmup_steps=warmup_steps)
        optim = AdamWConfig(lr=task.lr, beta1=task.beta1, schedule=schedule)
        optimizer = build_optimizer(optim, self.model)
        self.schedule: Schedule = build_schedule(schedule, peak=task.lr, total_steps=task.steps)
        grid = _grid(comm, is_local=entry.config.replicas_step_alone)
        trained = Trained(
            model=self.model,
            optimizer=optimizer,
            unit_names=unit_names(self.model),
            comm=comm,
            grid=grid,
            outer=_group(comm, entry, log.config),
            draw_trusted=_draw_trusted(self.model, entry, log.task),
            seed=task.seed,
            elect=_elect(comm, entry),
        )
        self.strategy = build_strategy(entry.config, trained)
        self.worker = Worker(
            model=self.model,
            optimizer=optimizer,
            strategy=self.strategy,
            comm=grid.inner,
            everyone=Alone(clock=comm.clock),  # who evaluates does so alone
            device=torch.device("cpu"),
            clip_norm=optim.clip_norm,
        )
        self._watch_steps()

    def _watch_steps(self) -> None:
        """Let work take its time where the forward pass begins; spoil gradients where an event says so."""

        def work(module: nn.Module, _inputs: object) -> None:
            if module.training:
                now_s, begun = self.comm.clock.now(), self.log.begun
                index = begun.get(self.number, 0)
                begun[self.number] = index + 1
                self.comm.spend(self.log.times.seconds(self.number, index=index, now_s=now_s))

        def spoil(parameter: Tensor) -> None:
            if self.corruption is not None and self.corruption.factor is not None:
                assert parameter.grad is not None, "it was just accumulated"
                parameter.grad.mul_(self.corruption.factor)

        self.model.register_forward_pre_hook(work)
        if self.corrupted:
            for parameter in self.model.parameters():
                parameter.register_post_accumulate_grad_hook(spoil)

    def train(self) -> None:
        """Train to the end of the run."""
        strategy, steps, step = self.strategy, self.log.config.task.steps, 0
        if self.life == 0:
            self.log.note_point(self.worker, now_s=self.comm.clock.now())
        if isinstance(strategy, LocalUpdates) and self.life >= self.log.config.workers:
            strategy.join()
            step = strategy.own_steps(step)
        while step < steps or not strategy.is_together:
            step = self._step(step)
        strategy.finish()
        self.log.note_round(strategy.take_report())

    def _step(self, step: int) -> int:
        """Make one step where the run stands at `step`, and return where it stands then."""
        strategy, log, steps = self.strategy, self.log, self.log.config.task.steps
        now_s = self.comm.clock.now()
        self.corruption = next((event for event in self.corrupted if event.covers(now_s)), None)
        batch = self._batch(strategy.own_steps(step))
        result = train_step(
            self.worker,
            [batch],
            num_targets=batch.num_targets * self.worker.comm.size,
            lr=self.schedule.rate(min(step, steps - 1)),
            wants_stop=False,
        )
        log.note_round(strategy.take_report())
        if log.note_step(self.life, result.loss if self.corruption is None else None):
            log.note_point(self.worker, now_s=self.comm.clock.now())
        return strategy.standing(step + 1)

    def _batch(self, own_step: int) -> PackedBatch:
        """Return this worker's pack of a step, or noise of the same size."""
        config = self.log.config
        batch = self.log.task.train.batch([own_step * config.workers + self.number])
        if self.corruption is None or self.corruption.factor is not None:
            return batch
        generator = generator_for(config.task.seed, "noise", self.number, own_step)
        noise_2T = torch.randint(256, (2, len(batch.tokens_T)), generator=generator)
        return PackedBatch(
            tokens_T=noise_2T[0], labels_T=noise_2T[1], layout=batch.layout, num_targets=batch.num_targets
        )


def _grid(comm: SimComm, *, is_local: bool) -> Grid:
    """Return who steps together: everyone, or each replica alone."""
    if is_local:
        return split(comm, replicas=comm.size, shards=1)
    alone = Alone(clock=comm.clock)
    return Grid(inner=comm, outer=alone, replica=0, replicas=1, shard=comm.rank, shards=comm.size)


def _elect(comm: SimComm, entry: Entry) -> Callable[[int], FastestGroup] | None:
    """Return what brings a replica to the others, where the first k make each step."""
    strategy = entry.config
    if not isinstance(strategy, CombinedConfig) or strategy.fastest is None:
        return None
    rules = rules_of(strategy.fastest, num_faulty=strategy.f)
    return lambda step: FastestGroup(SimWire(comm, rules=rules), replicas=comm.size, step=step)


def _draw_trusted(model: nn.Module, entry: Entry, task: Task) -> Callable[[int], None] | None:
    """Return what gives the gradient on trusted text, where the strategy leans on it."""
    if not isinstance(entry.config, CombinedConfig) or not entry.config.needs_trusted:
        return None
    return trusted_draw(
        model,
        task.validation,
        entry.config.trusted,
        device=torch.device("cpu"),
        autocast=AutocastSetting(),
    )


def _group(comm: SimComm, entry: Entry, config: SimulationConfig) -> SimGroup | None:
    """Return the group of replicas that come and go; one who comes late waits here until it is let in."""
    if not isinstance(entry.config, LocalUpdateConfig) or not entry.config.elastic:
        return None
    timeout_s = _PATIENCE * config.task.steps * config.step_s
    return SimGroup(comm, founders=config.workers, timeout_s=timeout_s, poll_s=config.step_s)
