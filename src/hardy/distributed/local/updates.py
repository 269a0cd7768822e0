"""Replicas that train alone and meet now and then: the engine of EDiT and its family.

Paper: J. Cheng et al., "EDiT: A Local-SGD-Based Efficient Distributed Training Method for Large Language
Models", ICLR 2025 (arXiv 2412.07210). Letters: theta weights of this replica, A anchor, D = A - theta
pseudo-gradient, G its norm, w weight of a replica, S what the outer optimizer is given, B its momentum, N
replicas, U units, n elements of a unit on this worker. `reference/edit.py` is the same in forty lines.

Every decision of a round follows from one table that all replicas hold alike. Replicas that are left out are
left out by selection: a NaN is never multiplied by zero.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hardy.distributed.comm import Alone, Communicator, WorkerLostError
from hardy.distributed.groups import ExcludedError, OuterGroup
from hardy.distributed.local import inner_state
from hardy.distributed.local import state as local_state
from hardy.distributed.local.anomaly import AnomalyGuard
from hardy.distributed.local.lane import Lane
from hardy.distributed.local.report import Report
from hardy.distributed.local.round import Exchanged, Manner, Parts, Pending, Table
from hardy.distributed.local.triggers import EverySteps
from hardy.distributed.local.units import Units
from hardy.distributed.local.warmup import average_gradients, check_alike
from hardy.distributed.strategy import Strategy

_NEVER = 1 << 62
_EPSILON = 1e-6
"""Added to a norm before it divides, as torch's clipping does."""


class LocalUpdates(Strategy):
    """Train alone, and meet when the trigger says so.

    Args:
        units: the model as it is trained.
        optimizer: the inner optimizer, of any kind.
        inner: the workers of this replica.
        outer: the workers with this one's place in all replicas.
        parts: what it is composed of.
        manner: how rounds are carried out.
        lane: where exchanges run.
    """

    def __init__(
        self,
        units: Units,
        optimizer: Optimizer,
        *,
        inner: Communicator,
        outer: OuterGroup,
        parts: Parts,
        manner: Manner,
        lane: Lane,
    ) -> None:
        self.units, self.optimizer, self.inner, self.outer = units, optimizer, inner, outer
        self.parts, self.manner = parts, manner
        self.step = 0
        """Finished inner steps, warm-up included."""
        self.round = 0
        """Finished rounds."""
        self.steps_since = 0
        """Own steps since the last round."""
        self.rates = [0.0] * manner.fragments
        """By fragment: learning rates of the own steps since its last round, added up."""
        self.total_steps = 0
        """Steps of all replicas together after the warm-up, up to the last round."""
        self.rollbacks = 0
        """Units left as they were because every replica was left out, over all rounds."""
        self.repairs = 0
        """Times this replica's optimizer state was begun anew because it was not finite."""
        self.wait_s = 0.0
        """Seconds spent in rounds while nothing was computed."""
        self.anchors: list[Tensor] = []
        """fp32 [n] by unit; none before local training begins."""
        self._shards: Communicator = inner if units.is_sharded else Alone(clock=inner.clock)
        self.lane = lane
        self.guards = [parts.anomaly(len(self._units_of(f))) for f in range(manner.fragments)]
        """By fragment: who is left out."""
        self.report = Report([len(self._units_of(f)) for f in range(manner.fragments)])
        self.pending: list[Pending] = []
        self._room: dict[str, Any] | None = None
        self._asks_to_stop, self._stop_votes = False, 0
        self._is_wanted, self._has_met = False, False
        self._has_looked, self._sits_out = False, False

    def before_forward(self) -> None:
        """Begin local training once the warm-up is over; begin a round that runs within this forward pass."""
        if not self.anchors and self.step >= self.manner.warmup_steps:
            self.join()
            while not (self.anchors or self._all_can(self._begin_local)):
                self._regroup()
            self._catch_up()
        self._has_met = False
        if self.manner.layerwise and self.steps_since and self._due_fragment() is not None:
            with self._waiting():
                if self._open(self._units_of(0), due_step=self.step):
                    for ahead in range(2):
                        self._launch(self.pending[0], ahead)
                    self._finish(self.pending[0], 0)

    def before_module_forward(self, name: str) -> None:
        """Finish the unit that runs now, and begin the exchange of the next (layer-wise rounds only)."""
        if self.pending and self.manner.layerwise:
            unit = self.units.names.index(name)
            with self._waiting():
                for ahead in range(unit + 2):
                    self._launch(self.pending[0], ahead)
                self._finish(self.pending[0], unit)

    def after_forward(self) -> None:
        """Finish the units that this forward pass left out."""
        if self.pending and self.manner.layerwise:
            with self._waiting():
                self._close(self.pending.pop())

    def reduce_gradients(self) -> None:
        """Average gradients over the replicas during the warm-up; end a layer-wise round before the update.

        One is still open where the units were run by themselves: never `model(...)`.
        """
        self.after_forward()
        if self.anchors or self.outer.size == 1:
            return
        average_gradients(self._all_parameters(), self.outer)

    def after_step(self) -> None:
        """Count the step; hold the rounds that are due and do not wait for the next forward pass."""
        self.step += 1
        if not self.anchors:
            return
        self.steps_since += 1
        rate = self.optimizer.param_groups[0].get("lr", 1.0)
        self.rates = [so_far + rate for so_far in self.rates]
        if not self.manner.layerwise:
            fragment = self._due_fragment()
            if fragment is not None:
                self._hold_round(fragment)
            while self.pending and self.pending[0].due_step <= self.step:
                with self._waiting():
                    self._close(self.pending.pop(0))

    def finish(self) -> None:
        """Settle what is under way and meet once more, so that all replicas end with the same weights."""
        if not self.anchors:
            return
        with self._waiting():
            while self.pending:
                self._close(self.pending.pop(0))
        if not self._agrees():
            with self._waiting():
                for fragment in range(self.manner.fragments):
                    self._meet(self._units_of(fragment), is_last=True)
                for unit, anchor_n in enumerate(self.anchors):  # `mix` left some of each replica's own
                    self.units.write(unit, anchor_n)

    @contextmanager
    def evaluation_parameters(self) -> Iterator[None]:
        """Show the anchor, which is what all replicas agree on; between rounds a replica is only itself."""
        self.after_forward()  # a round that is open would move the anchor meanwhile
        if not self.anchors or self._agrees():
            yield
            return
        kept = [self.units.read(unit) for unit in range(len(self.units))]
        try:
            for unit, anchor_n in enumerate(self.anchors):
                self.units.write(unit, anchor_n)
            yield
        finally:
            for unit, values_n in enumerate(kept):
                self.units.write(unit, values_n)

    def own_steps(self, step: int) -> int:
        """Return the steps that this replica has done itself."""
        return self.step

    def standing(self, step: int) -> int:
        """Return this replica's steps; with rounds by time, the mean over fixed replicas, as far as known."""
        if isinstance(self.parts.trigger, EverySteps) or self.outer.is_elastic or not self.anchors:
            return self.step
        return self.manner.warmup_steps + self.total_steps // self.outer.size + self.steps_since

    @property
    def is_together(self) -> bool:
        """Whether all replicas are at the same point: with rounds by steps always, else after a round."""
        if not self.anchors or (isinstance(self.parts.trigger, EverySteps) and not self.outer.is_elastic):
            return True
        return self._has_met

    def agreed_stop(self, votes: int) -> bool:
        """Remember that this replica was asked to stop; True once a round has told all replicas."""
        self._asks_to_stop |= votes > 0
        if not self.anchors:
            return bool(self.outer.sum(torch.tensor(self._asks_to_stop, dtype=torch.int64)))
        return self._has_met and self._stop_votes > 0

    def take_report(self) -> dict[str, Any]:
        """Return the numbers of the round that ended in this step, if one did."""
        return self.report.take()

    def join(self) -> None:
        """Take over the place of those who train already, if this came to some; the first time only."""
        if self.outer.is_elastic and self.outer.generation > 0 and not self._has_looked:
            self._has_looked = True
            if not self._all_can(self.align):
                self._regroup()
            self._catch_up()
            self._has_met = bool(self.anchors)

    def _catch_up(self) -> None:
        """Where this replica came in the middle of others' round, be there; its own part is left out."""
        if self._sits_out:
            self._meet(self._units_of(0))
            self.report.take()  # it belongs to no step of this replica

    def _begin_local(self) -> None:
        """Make the present weights the anchor, after all replicas were found to have the same."""
        if self.manner.warmup_steps == 0:
            for unit in range(len(self.units)):
                self.units.write(unit, self.outer.broadcast(self.units.read(unit), source=0))
        read = [self.units.read(unit) for unit in range(len(self.units))]
        check_alike(read, self.outer, names=self.units.names)
        self.anchors = [x.cpu() if self.manner.offload else x for x in read]
        self.parts.trigger.reset(self.inner.clock.now())

    def _units_of(self, fragment: int) -> list[int]:
        """Return the units of a fragment; neighbours lie in different ones."""
        return list(range(fragment, len(self.units), self.manner.fragments))

    def _due_fragment(self) -> int | None:
        """Return the fragment whose round is due, the same on all workers of the replica."""
        trigger, step = self.parts.trigger, self.step - self.manner.warmup_steps
        if isinstance(trigger, EverySteps):
            return trigger.fragment_due(step)
        is_due = trigger.due(step, self.inner.clock.now())
        if self.inner.size > 1:
            is_due = bool(self.inner.broadcast(torch.tensor(is_due), source=0))
        return 0 if is_due else None

    def _hold_round(self, fragment: int) -> None:
        """Begin a round, and end it at once unless its result is applied later."""
        units = self._units_of(fragment)
        with self._waiting():
            if not self.manner.delay_steps and not self.manner.delay_rounds:
                self._meet(units)
                return
            for pending in self.pending:
                self.wait_for(pending)
                self._keep_leftovers(pending)
            older = [self.pending.pop(0)] if self.manner.delay_rounds and self.pending else []
            due_step = _NEVER if self.manner.delay_rounds else self.step + self.manner.delay_steps
            opened = self._open(units, due_step=due_step)
            for place in range(len(units) if opened else 0):
                self._launch(self.pending[-1], place)
            for pending in older:
                self._close(pending)
            if opened and self.manner.delay_rounds and not older:
                for unit in units:
                    self.units.write(unit, self.anchors[unit])

    def _agrees(self) -> bool:
        """Whether this replica is at the anchor."""
        return not (self.steps_since or self.pending or self.manner.fragments > 1 or self.manner.mix)

    def _meet(self, units: list[int], *, is_last: bool = False) -> None:
        """Hold a round from beginning to end; where a replica is lost on the way, again without it."""
        round_before = self.round
        while True:
            counted = self.steps_since, self.total_steps, self.rates
            opened = False

            def begin() -> None:
                nonlocal opened
                opened = self._open(units, due_step=self.step, is_last=is_last)
                if opened:
                    for place in range(len(units)):
                        self._launch(self.pending[-1], place)
                    self.wait_for(self.pending[-1])

            settled = self._all_can(begin)
            if settled and opened and self.outer.is_elastic:  # all have it, or none shall move its anchor
                settled = self._all_can(self.outer.barrier)
            if settled:
                break
            self.pending.clear()
            self.parts.compression.rollback()
            self.steps_since, self.total_steps, self.rates = counted
            self._regroup()
            self.report.redone += 1
            if self.round != round_before and not self._sits_out:
                return  # the others had ended this round
        self._sits_out = False  # from here on it takes part
        if opened:
            self._close(self.pending.pop())
            if self._is_wanted and self.outer.is_elastic:
                self._regroup()

    def _all_can(self, act: Callable[[], None]) -> bool:
        """Do what needs other replicas; False if one of this replica's workers lost them on the way."""
        if not self.outer.is_elastic:
            act()
            return True
        done = 1.0
        try:
            act()
        except ExcludedError:
            raise
        except WorkerLostError:
            done = 0.0
        return bool(self.inner.sum(torch.tensor(done)) == self.inner.size)

    def _regroup(self) -> None:
        """Go on with the replicas that live and those that came, all at the same anchor."""
        while not (self._all_can(self.outer.reform) and self._all_can(self.align)):
            pass

    def _open(self, units: list[int], *, due_step: int, is_last: bool = False) -> bool:
        """Exchange norms and begin a round; False if all replicas together did too few steps for one."""
        table, rows_N = self._table(units)
        if not is_last and not self.parts.trigger.enough(int(rows_N[:, 0].sum())):
            self.parts.trigger.reset(self.inner.clock.now())
            return False
        self.total_steps += int(rows_N[:, 0].sum())
        self._stop_votes = int(rows_N[:, 1].sum())
        self._is_wanted = bool(rows_N[:, 2].any())
        if self.outer.is_elastic:  # one that had to take over another's place may be behind it
            self.step = int(rows_N[:, 3].max())
        self._has_met, self.steps_since = True, 0
        met = self._fragment_of(units)
        self.rates = [0.0 if fragment == met else so_far for fragment, so_far in enumerate(self.rates)]
        count = len(units)
        self.pending.append(
            Pending(table=table, due_step=due_step, exchanged=[None] * count, done=[False] * count)
        )
        return True

    def _table(self, units: list[int]) -> tuple[Table, Tensor]:
        """Return what all know of a round, and [N, 4]: steps, wish to stop, who waits, steps in all."""
        squares_U = torch.stack(
            [torch.linalg.vector_norm(self._delta(unit), dtype=torch.float64).square() for unit in units]
        )
        norms_U = self._shards.sum(squares_U).sqrt().cpu()
        rate = float(self.rates[self._fragment_of(units)])
        flags_U = self._guard_of(units).flags(self._judged(norms_U, rate)) | self._sits_out
        control = [self.steps_since, self._asks_to_stop, self.outer.wants_members(), self.step]
        control_C = torch.tensor([*control, rate, self.report.cosine], dtype=torch.float64)
        rows_N = self.outer.all_gather(torch.cat([control_C, norms_U, flags_U.double()]))
        return Table.gathered(units, rows_N, self.parts.aggregation), rows_N[:, :4]

    def _fragment_of(self, units: list[int]) -> int:
        return units[0] % self.manner.fragments

    def _guard_of(self, units: list[int]) -> AnomalyGuard:
        return self.guards[self._fragment_of(units)]

    def _judged(self, norms_U: Tensor, rate: float) -> Tensor:
        """Return norms as the guard sees them: they fall with the learning rate, a bad replica's too."""
        return norms_U / rate if self.manner.judges_per_rate and rate > 0 else norms_U

    def _delta(self, unit: int) -> Tensor:
        """Return D [n], fp32, where the parameters are."""
        return self.anchors[unit].to(self.units.device) - self.units.read(unit)

    def _launch(self, pending: Pending, place: int) -> None:
        """Begin the exchange of a unit, unless that was done or there is no such unit."""
        if place >= len(pending.exchanged) or pending.exchanged[place] is not None:
            return
        unit = pending.table.units[place]
        weight = pending.table.weights_NU[self.outer.rank, place]
        delta_n = self._delta(unit)
        exchange = partial(self._exchange, unit, delta_n, weight)
        pending.exchanged[place] = self.lane.submit(exchange, uses=[delta_n])

    def _exchange(self, unit: int, delta_n: Tensor, weight: Tensor) -> Exchanged:
        """Return S and what its length and direction are read from."""
        sum_n = self.parts.compression.weighted_sum(self.outer, delta_n, weight, unit)
        sum_wide_n, delta_wide_n = sum_n.double(), delta_n.double()
        products = [(sum_wide_n, sum_wide_n), (delta_wide_n, sum_wide_n), (delta_wide_n, delta_wide_n)]
        return sum_n, torch.stack([torch.linalg.vecdot(a, b) for a, b in products])

    def wait_for(self, pending: Pending) -> None:
        """Wait until all exchanges of a round are done."""
        for future in pending.exchanged:
            if future is not None:
                self.lane.result(future)

    def _finish(self, pending: Pending, place: int) -> None:
        """Move the anchor of a unit and give the replica its weights, unless that was done."""
        future = pending.exchanged[place]
        if pending.done[place] or future is None:
            return
        sum_n, products = self.lane.result(future)
        unit, anchor_n = pending.table.units[place], self.anchors[pending.table.units[place]]
        pending.products.append(products)
        pending.done[place] = True
        if pending.table.is_empty[place]:
            self.rollbacks += 1
        else:
            if self.manner.clip_norm is not None:
                norm = self._shards.sum(products[0]).sqrt()
                factor = (self.manner.clip_norm / (norm + _EPSILON)).clamp(max=1.0)
                pending.factors[place] = factor
                sum_n = sum_n * factor.to(sum_n.dtype)
            sum_n = self.parts.aggregation.finish(unit, sum_n.to(anchor_n.device), anchor_n)
            self.parts.outer_optimizer.step(unit, anchor_n, sum_n)
        self.units.write(unit, anchor_n, mix=self.manner.mix)

    def _close(self, pending: Pending) -> None:
        """Finish all units of a round and take its lessons."""
        table, me = pending.table, self.outer.rank
        for place in range(len(table.units)):
            self._launch(pending, place)
            self._finish(pending, place)
        judged_U = self._judged(table.norms_NU[me], float(table.rates_N[me]))
        self._guard_of(table.units).observe(judged_U, table.flags_NU, table.norms_NU)
        self._keep_leftovers(pending)
        if not all(table.is_empty):
            self.parts.aggregation.commit()
        params = [param for unit in table.units for param in self.units.parameters(unit)]
        inner_state.settle(self.manner.inner_state, self.optimizer, params, self.outer)
        if not table.norms_NU[me].isfinite().all():
            self.repairs += inner_state.repair(self.optimizer, params, self._shards)
        self.round += 1
        self.parts.trigger.reset(self.inner.clock.now())
        counters = {key: getattr(self, key) for key in ("round", "rollbacks", "repairs")}
        self.report.note(
            pending,
            fragment=self._fragment_of(table.units),
            shards=self._shards,
            outer=self.outer,
            counters=counters | {"round_wait_s": self.wait_s},
        )

    def _keep_leftovers(self, pending: Pending) -> None:
        """Let compression keep what it left out of a round whose exchanges are done; once."""
        if not pending.has_leftovers_kept:
            pairs = zip(pending.table.units, pending.table.is_empty, strict=True)
            self.parts.compression.commit([unit for unit, empty in pairs if not empty])
            pending.has_leftovers_kept = True

    def align(self) -> None:
        """Take over anchor, momentum and counters of the member that is furthest, where this one is behind.

        All members call it after their group was made anew; one that has just come is behind them all.
        """
        mine = torch.tensor([self.round if self.anchors else -1, self.steps_since > 0 or self._sits_out])
        rounds_N, meeting_N = self.outer.all_gather(mine).unbind(1)
        source = int(rounds_N.argmax())
        if bool((rounds_N == rounds_N[source]).all()):
            return
        self.report.joined += [
            self.outer.members[place] for place in (rounds_N < 0).nonzero().flatten().tolist()
        ]
        mine_if_source = local_state.in_common(self) if self.outer.rank == source else {}
        news = local_state.share(self.outer, mine_if_source, source=source)
        if mine[0] < rounds_N[source]:
            self._sits_out = bool(meeting_N[rounds_N == rounds_N[source]].any())
            local_state.adopt(self, news)
            inner_state.reset(self.optimizer, self._all_parameters())
            self.parts.trigger.reset(self.inner.clock.now())

    def kept(self, values_n: Tensor) -> Tensor:
        """Return a vector where anchors are kept."""
        return values_n.cpu() if self.manner.offload else values_n.to(self.units.device)

    def _all_parameters(self) -> list[Tensor]:
        return [param for unit in range(len(self.units)) for param in self.units.parameters(unit)]

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Count the time of a round in which nothing is computed."""
        started_s = self.inner.clock.now()
        try:
            yield
        finally:
            self.wait_s += self.inner.clock.now() - started_s

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resume needs; waits for exchanges that are under way."""
        return self._room if self._room is not None else local_state.remember(self)

    def expect(self, saved: Mapping[str, Any]) -> None:
        """Make room for what a checkpoint holds: until then `state_dict` returns zeros to be filled."""
        self._room = local_state.room_for(self.units, saved["about"]) if saved else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state back; of another number of replicas only what they had in common, at their anchor."""
        self._room = None
        local_state.recall(self, state_dict)
        self._has_met = self.steps_since == 0
