"""How long a strategy takes and what it sends, without a model: the collectives that training makes, counted.

It makes them in the order of `train_step` and `LocalUpdates`, so virtual seconds, bytes and idle time are
those of the simulation with models; a test compares the two. What depends on values is left out: steps and
rounds that find something that is not finite. Where workers join, it is an estimate: of what they are sent,
and, when others die meanwhile, of when they are let in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hardy.config import ConfigError
from hardy.distributed import costs
from hardy.distributed.aggregation.names import NEEDS_GRAM
from hardy.distributed.config import (
    CompressionConfig,
    LocalUpdateConfig,
    OuterSGDConfig,
    StrategyConfig,
    SynchronousConfig,
)
from hardy.distributed.costs import Link, Traffic
from hardy.distributed.local.triggers import EverySteps
from hardy.distributed.robust.config import CombinedConfig
from hardy.train.parameter_memory import decoder_weights
from hardy.train.simulate_config import SimulationConfig, lives_of
from hardy.train.simulate_fleet import Fleet, MemberLostError
from hardy.train.simulate_result import STOPPED, StrategyResult, summarise
from hardy.train.simulate_strategies import Entry
from hardy.train.simulate_times import Ints, StepTimes

BUCKET_BYTES = 25_000_000
"""`hardy.distributed.strategy.BUCKET_BYTES`, which needs torch; a test holds them equal."""
CONTROL_COLUMNS = 6
"""Of a round's table, before norms and flags: steps, wish to stop, members that wait, step reached."""
_NEVER = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Elements of the trained parameters."""

    parameters: tuple[int, ...]
    """In the order of the model."""
    units: tuple[tuple[int, ...], ...]
    """Of the parameters of each unit: what no block owns, then block by block."""

    @classmethod
    def of(cls, config: SimulationConfig) -> "Sizes":
        """Return those of the task's model.

        Example:
            >>> len(Sizes.of(SimulationConfig()).units)
            2
        """
        shape = config.task.shape()
        weights = [(weight.name, math.prod(weight.shape)) for weight in decoder_weights(shape)]
        units: list[list[int]] = [[] for _ in range(shape.num_layers + 1)]
        for name, size in weights:
            parts = name.split(".")
            units[int(parts[1]) + 1 if parts[0] == "blocks" else 0].append(size)
        return cls(parameters=tuple(size for _, size in weights), units=tuple(map(tuple, units)))


def gradient_traffic(sizes: Sequence[int], num_workers: int) -> list[Traffic]:
    """Return what averaging fp32 gradients sends, in buckets of whole parameters.

    Example:
        >>> gradient_traffic([1000], 4)
        [Traffic(bytes_sent=6000, hops=6)]
    """
    return [costs.all_reduce(4 * size, num_workers) for size in bucket_sizes(sizes)]


def bucket_sizes(sizes: Sequence[int]) -> list[int]:
    """Return the elements of each bucket in which whole fp32 parameters travel."""
    buckets, filled = [], 0
    for size in sizes:
        filled += size
        if 4 * filled >= BUCKET_BYTES:
            buckets.append(filled)
            filled = 0
    return [*buckets, *([filled] if filled else [])]


def sum_traffic(compression: CompressionConfig, size: int, num_workers: int) -> list[Traffic]:
    """Return what the weighted sum of one unit's pseudo-gradients sends.

    Args:
        compression: in how many bytes.
        size: elements of the unit.
        num_workers: replicas.
    """
    if compression.name == "topk":
        kept = size if num_workers == 1 else math.ceil(compression.density * size)
        return [costs.all_gather(4 * kept, num_workers)] * 2  # values, then int32 places
    if compression.name == "none" or num_workers == 1:
        return [costs.all_reduce(4 * size, num_workers)]
    chunk = -(-size // num_workers)
    row = 2 * chunk if compression.name == "bf16" else chunk + 4 * -(-chunk // compression.block)
    return [costs.all_to_all(num_workers * row, num_workers), costs.all_gather(row, num_workers)]


def count_costs(config: SimulationConfig, entry: Entry) -> StrategyResult:
    """Return what a strategy takes on the cluster; losses stay open.

    Raises:
        ConfigError: the model's sizes do not fit.
    """
    strategy = entry.config
    is_elastic = isinstance(strategy, LocalUpdateConfig) and strategy.elastic
    fleet = Fleet(
        lives_of(config, with_joins=is_elastic),
        link=Link(bandwidth_bytes_per_s=config.bandwidth, latency_s=config.latency_s),
        times=StepTimes(config),
        detect_s=config.detect_s,
    )
    if isinstance(strategy, LocalUpdateConfig):
        run = _Local(config, strategy, fleet)
        act = run.run
    else:
        every_steps = None
        if isinstance(strategy, CombinedConfig) and strategy.needs_trusted:
            every_steps = strategy.trusted.every_steps
        traffic = step_traffic(config, strategy)
        run, act = None, lambda: _run_together(config, fleet, traffic, trusted_every_steps=every_steps)
    stopped = None
    try:
        act()
    except MemberLostError:
        stopped = STOPPED
    took_part = run.took_part if run is not None else np.arange(config.workers)
    rounds = run.rounds if run is not None else 0
    return summarise(entry, config, fleet.ledger(took_part), rounds=rounds, stopped=stopped)


def step_traffic(config: SimulationConfig, strategy: StrategyConfig) -> list[Traffic]:
    """Return what a step sends in which all workers meet: gradients, the loss, whether anyone wants to stop.

    Raises:
        ConfigError: the strategy has no such step.
    """
    workers, sizes = config.workers, Sizes.of(config).parameters
    if isinstance(strategy, SynchronousConfig):
        return [*gradient_traffic(sizes, workers), costs.all_reduce(16, workers)]
    _check_countable(strategy)
    assert isinstance(strategy, CombinedConfig), "checked"
    parts = [-(-size // workers) for size in bucket_sizes(sizes)]
    judged = costs.all_gather(16, workers)  # the losses, and who wants to stop
    if strategy.exchange == "scalars":
        reports = costs.all_gather(24 if strategy.needs_trusted else 8, workers)
        return [reports, *(costs.all_reduce(4 * workers * part, workers) for part in parts), judged]
    found = [costs.all_to_all(4 * workers * part, workers) for part in parts]
    if strategy.needs_trusted and strategy.trusted.agree == "median":
        found *= 2
    found.append(costs.all_reduce(8 * 2 * (workers + 1), workers))  # norms and dots of all rows
    if {strategy.rule, *(text.partition(":")[0] for text in strategy.pre)} & NEEDS_GRAM:
        found.append(costs.all_reduce(8 * workers**2, workers))
    return [*found, *(costs.all_gather(4 * part, workers) for part in parts), judged]


def _check_countable(strategy: StrategyConfig) -> None:
    what = f"strategy.name={strategy.name!r}"
    if isinstance(strategy, CombinedConfig):
        if strategy.fastest is None and strategy.rule not in ("centered_clip", "aksel", "kardam"):
            return
        what = f"strategy.rule={strategy.rule!r}" if strategy.fastest is None else "strategy.fastest"
    raise ConfigError(f"costs alone are not counted for {what}; leave out --no-train")


def _run_together(
    config: SimulationConfig, fleet: Fleet, traffic: list[Traffic], *, trusted_every_steps: int | None
) -> None:
    """Let all meet at every step; a trusted gradient takes as long as a step's own."""
    everyone = np.arange(config.workers)
    for step in range(config.task.steps):
        fleet.work(everyone)
        if trusted_every_steps is not None and step % trusted_every_steps == 0:
            fleet.work(everyone)
        fleet.meet_often(everyone, traffic)
        fleet.steps[everyone] += 1
        if step % 100 == 0:
            fleet.forget()


class _Local:
    """Replicas that train alone and meet now and then; the shape of `LocalUpdates`."""

    def __init__(self, config: SimulationConfig, strategy: LocalUpdateConfig, fleet: Fleet) -> None:
        self.config, self.strategy, self.fleet = config, strategy, fleet
        self.sizes = Sizes.of(config)
        self.members = np.arange(config.workers)
        self.waiting = np.arange(config.workers, len(fleet.lives))
        """Lives that want to join and have not."""
        self.took_part = self.members
        self.rounds = 0
        self._units_of = [
            list(range(fragment, len(self.sizes.units), strategy.fragments))
            for fragment in range(strategy.fragments)
        ]
        self._own = np.zeros(len(fleet.lives), dtype=np.int64)
        """Where each replica stands by its own count."""
        self._since = np.zeros(len(fleet.lives), dtype=np.int64)
        self._stepping = self.members
        """Lives in the middle of a step."""
        self._started_s = np.zeros(len(fleet.lives))
        self._total_steps = 0
        self._has_begun = self._has_met = False
        self._pending: list[tuple[int, list[int]]] = []
        """Rounds whose result is not applied yet: due step, units."""

    def run(self) -> None:
        """Train to the last step and meet once more."""
        strategy, steps, step = self.strategy, self.config.task.steps, 0
        trigger = EverySteps(strategy.every_steps or 1, fragments=strategy.fragments)
        by_steps = strategy.every_steps is not None
        while step < steps or not (
            self._has_met or not self._has_begun or (by_steps and not strategy.elastic)
        ):
            self._has_met = False
            self._stepping = self.members
            if not self._has_begun and step >= strategy.warmup_steps:
                self._begin()
            if not self._has_begun:
                self.fleet.work(self.members)
                self._meet_all(gradient_traffic(self._in_unit_order(), len(self.members)))
                self._own[self.members] += 1
                step += 1
            elif by_steps:
                self.fleet.work(self.members)
                self._own[self.members] += 1
                self._since[self.members] += 1
                step = self._furthest()
                fragment = trigger.fragment_due(step - strategy.warmup_steps)
                if fragment is not None:
                    self._hold_round(self._units_of[fragment], step)
                while self._pending and self._pending[0][0] <= step:
                    self._close(self._pending.pop(0)[1])
                step = self._furthest()
            else:
                self._work_until_due(self.members)
                self._hold_round(self._units_of[0], step)
                mean = strategy.warmup_steps + self._total_steps // len(self.members)
                step = self._furthest() if strategy.elastic else mean
            self.fleet.steps[self.fleet.alive(self._stepping)] += 1
            self.fleet.forget()
        self._finish()

    def _furthest(self) -> int:
        return int(self._own[self.members].max())

    def _in_unit_order(self) -> list[int]:
        return [size for unit in self.sizes.units for size in unit]

    def _meet_all(self, traffic: Sequence[Traffic]) -> None:
        self.fleet.meet_often(self.members, traffic)

    def _begin(self) -> None:
        """Make the weights the anchor, after a comparison."""
        units = self.sizes.units
        while not self._has_begun:
            count = len(self.members)
            try:
                if self.strategy.warmup_steps == 0:
                    self._meet_all([costs.broadcast(4 * sum(unit), count) for unit in units])
                self._meet_all([costs.all_gather(16 * len(units), count)])
                self._has_begun = True
            except MemberLostError:
                if not self.strategy.elastic:
                    raise
                self._regroup()
        self._stepping = self.members
        self._reset_clocks()

    def _reset_clocks(self) -> None:
        self._started_s[self.members] = self.fleet.now_s[self.members]

    def _work_until_due(self, working: Ints) -> None:
        """Let each replica step until its own time for a round has come; the last step is not over yet."""
        every_s, fleet = self.strategy.every_s or 0.0, self.fleet
        working = fleet.alive(working)
        while True:
            fleet.work(working)
            working = fleet.alive(working)
            self._since[working] += 1
            self._own[working] += 1
            working = working[fleet.now_s[working] - self._started_s[working] < every_s]
            if not len(working):
                return
            fleet.steps[working] += 1

    def _hold_round(self, units: list[int], step: int) -> None:
        strategy = self.strategy
        if not strategy.delay_steps and not strategy.delay_rounds:
            self._meet_for(units)
            return
        older = [self._pending.pop(0)] if strategy.delay_rounds and self._pending else []
        if self._open(units, is_last=False):
            self._add_up(units)
            self._pending.append((_NEVER if strategy.delay_rounds else step + strategy.delay_steps, units))
        for _, its_units in older:
            self._close(its_units)

    def _meet_for(self, units: list[int], *, is_last: bool = False) -> None:
        """Hold a round from beginning to end; without those who die on the way, where that is allowed."""
        while True:
            counted = self._since.copy(), self._total_steps
            try:
                opened = self._open(units, is_last=is_last)
                if opened:
                    self._add_up(units)
                    if self.strategy.elastic:
                        self._meet_all([costs.barrier(len(self.members))])
                break
            except MemberLostError:
                if not self.strategy.elastic:
                    raise
                self._since, self._total_steps = counted
                self._regroup()
        if opened:
            self._close(units)
            if self._is_wanted and self.strategy.elastic:
                self._regroup()

    def _open(self, units: list[int], *, is_last: bool) -> bool:
        """Exchange the table; False where all together did too few steps."""
        born_s = self.fleet.births_s[self.waiting]
        self._is_wanted = bool((born_s < self.fleet.now_s[self.members].max()).any())
        self._meet_all([costs.all_gather(8 * (CONTROL_COLUMNS + 2 * len(units)), len(self.members))])
        total = int(self._since[self.members].sum())
        if self.strategy.every_s is not None and not is_last and total < self.strategy.min_steps:
            self._reset_clocks()
            return False
        self._total_steps += total
        self._since[self.members] = 0
        if self.strategy.elastic:
            self._own[self.members] = self._furthest()
        self._has_met = True
        return True

    def _add_up(self, units: list[int]) -> None:
        """Exchange the units."""
        for unit in units:
            size = sum(self.sizes.units[unit])
            self._meet_all(sum_traffic(self.strategy.compression, size, len(self.members)))

    def _close(self, units: list[int]) -> None:
        """Apply a round; AdamW has two moments to average."""
        if self.strategy.inner_state == "average":
            sizes = [size for unit in units for size in self.sizes.units[unit]]
            for size in sizes:
                self._meet_all([costs.all_reduce(4 * size, len(self.members))] * 2)
        self.rounds += 1
        self._reset_clocks()

    def _regroup(self) -> None:
        """Go on with those who live and those who came; these get anchor and momentum."""
        outer, fleet = self.strategy.outer, self.fleet
        while True:
            try:
                members = fleet.gather_survivors(self.members)
                now_s = float(fleet.now_s[members].max())
                asked = self.waiting[(fleet.births_s[self.waiting] < now_s)]
                joining = asked[fleet.deaths_s[asked] > now_s]
                self.waiting = np.setdiff1d(self.waiting, asked)
                for life in joining.tolist():
                    fleet.wait_until(life, now_s, poll_s=self.config.step_s)
                self.members = np.sort(np.concatenate([members, joining]))
                self.took_part = np.union1d(self.took_part, joining)
                self._meet_all([costs.all_gather(16, len(self.members))])
                if len(joining) and self._has_begun:
                    vectors = 2 if isinstance(outer, OuterSGDConfig) and outer.momentum else 1
                    state = 4 * vectors * sum(self.sizes.parameters)
                    self._meet_all([costs.broadcast(size, len(self.members)) for size in (8, state)])
                    self._started_s[joining] = fleet.now_s[joining]
                    self._own[joining] = self._own[members[0]]
                return
            except MemberLostError:
                if not len(fleet.alive(self.members)):
                    raise

    def _finish(self) -> None:
        """Settle what is under way and meet once more where replicas are not at the anchor."""
        if not self._has_begun:
            return
        while self._pending:
            self._close(self._pending.pop(0)[1])
        by_turns = self.strategy.fragments > 1 or self.strategy.mix > 0
        if self._since[self.members].any() or by_turns:
            for units in self._units_of:
                self._meet_for(units, is_last=True)
