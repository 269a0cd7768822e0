"""A batch sampler for any data set and loader: global batches that never change, spread over ranks by a plan.

Paper: Hydraulis (arXiv 2412.07894). Which documents make a *global batch* follows from their number, the seed
and the epoch alone (with `delay_steps` also from their predicted times): not from how many ranks there are,
nor from how they are balanced. A *step* is one global batch; each rank computes its part of it in
*micro-batches*. Everything is a function of (epoch, step), so all ranks plan alike without a message, and a
resumed run sees the same batches.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from hardy.balance.ahead import PlanAhead
from hardy.balance.batching import Batching, GlobalBatches
from hardy.balance.cost import Integers, LengthCostModel
from hardy.balance.plan import MicroBatch, Objective, Plan, Scheme
from hardy.balance.planner import Mode, plan
from hardy.clock import Clock
from hardy.config import UserError

KEPT = 8
"""Plans kept for whoever asks again."""


@dataclass(frozen=True, kw_only=True)
class Planning:
    """How a global batch is spread over ranks."""

    cost: LengthCostModel
    """What documents cost, and the most tokens of a micro-batch (`with_cap`)."""
    mode: Mode = "dispatch"
    """pack: as tokens fit; dispatch: by cost; dynamic_cp: besides, groups of ranks share long documents."""
    objective: Objective = "free_running"
    """free_running where ranks meet once a step (DDP), lock_step where they meet in every micro-batch."""
    micro_batches: int | None = None
    """Micro-batches of each rank in a step (gradient accumulation), some of them perhaps empty; none takes as
    many as needed, at least one, and where ranks run freely each has its own number."""
    ahead: int = 2
    """Steps planned ahead in the background; 0 plans when asked."""


class SharedBatch(NamedTuple):
    """What the sampler yields for `dynamic_cp`: the key of one micro-batch that several ranks may share."""

    micro_batch: MicroBatch
    """Documents by their index in the data set, and the group that computes them together."""
    plan_hash: int
    """Of the step's plan, to compare between ranks before a group is used."""


class _Place(NamedTuple):
    """What comes next within an epoch."""

    step: int = 0
    micro_batch: int = 0


class BalancedBatchSampler:
    """Yields this rank's micro-batches, as lists of indices for `DataLoader(batch_sampler=...)`.

    An empty list is a micro-batch of zero weight: ranks that meet must all have one. `PackingCollator` makes
    it a token without label. For `dynamic_cp` it yields one `SharedBatch` in place of indices, which no plain
    data set takes: ranks of a group get the same documents, and without sharing would count them twice.

    Iterating runs through one epoch, from where a loaded state says; run to its end, it goes on to the next
    epoch. State counts micro-batches handed out. A loader with worker processes takes some ahead: save
    `state_at(epoch, step)` there.

    Args:
        lengths: tokens of each document of the data set, as the model will see them.
        batching: what a global batch holds.
        planning: how it is spread.
        world_size: ranks.
        rank: this one.
        clock: measures the wait for plans.

    Raises:
        UserError: no documents, one that is empty or fits nowhere, too few for one batch, or a rank that does
            not exist.

    Example:
        >>> from hardy.balance.cost import SchemeCost
        >>> cost = LengthCostModel(schemes=(SchemeCost(scheme=Scheme(), a=1.0, b=0.0, c=0.0, cap_tokens=9),))
        >>> planning = Planning(cost=cost, micro_batches=1, ahead=0)
        >>> sampler = BalancedBatchSampler(
        ...     [8, 2, 5, 2], batching=Batching(sequences=4), planning=planning, world_size=2, rank=1
        ... )
        >>> [sorted(indices) for indices in sampler]
        [[1, 2, 3]]
    """

    def __init__(
        self,
        lengths: Sequence[int] | Integers,
        *,
        batching: Batching,
        planning: Planning,
        world_size: int,
        rank: int,
        clock: Clock | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UserError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}")
        if planning.micro_batches is not None and planning.micro_batches < 1:
            raise UserError(f"planning.micro_batches must be at least 1, got {planning.micro_batches}")
        if planning.ahead < 0:
            raise UserError(f"planning.ahead must be at least 0, got {planning.ahead}; 0 plans when asked")
        self.batches = GlobalBatches(lengths, batching, times=planning.cost.times(lengths))
        self.planning, self.world_size, self.rank = planning, world_size, rank
        self._check_fit()
        self._clock = clock
        self._epoch, self._next, self._is_loaded = 0, _Place(), False
        self._plans = lru_cache(maxsize=KEPT + planning.ahead)(self._planned)
        self.waited_s: float = 0.0
        """Seconds that iterating waited for plans so far."""

    @property
    def epoch(self) -> int:
        """The epoch that iterating runs through next, or is in."""
        return self._epoch

    def __len__(self) -> int:
        """Return this rank's micro-batches of the present epoch; TypeError where only plans would say."""
        if self.planning.micro_batches is None:
            raise TypeError(
                "the number of micro-batches is known before planning only with micro_batches=..."
            )
        return self.num_steps(self._epoch) * self.planning.micro_batches

    def num_steps(self, epoch: int) -> int:
        """Return the global batches of an epoch."""
        return len(self.batches.of(epoch))

    def documents(self, epoch: int, step: int) -> list[int]:
        """Return the global batch of a step, as indices into the data set."""
        return self.batches.of(epoch)[step].tolist()

    def plan(self, epoch: int, step: int) -> Plan:
        """Return the plan of a step; its sequences count within `documents(epoch, step)`.

        Raises:
            UserError: the global batch does not fit into `micro_batches`.
        """
        return self._plans(epoch, step)

    def plan_hash(self, epoch: int, step: int) -> int:
        """Return 63 bits that differ where ranks would train on other documents, or spread them otherwise."""
        digest = hashlib.blake2b(self.batches.of(epoch)[step].tobytes(), digest_size=8)
        digest.update(str(self.plan(epoch, step).hash()).encode())
        return int.from_bytes(digest.digest(), "big") >> 1

    def hash(self) -> int:
        """Return 63 bits that differ where plans may: by lengths, settings, ranks or the planner."""
        settings = replace(self.planning, ahead=0)  # which changes no plan
        told = repr((self.batches.hash(), settings, self.world_size, self.plan_hash(0, 0)))
        return int.from_bytes(hashlib.blake2b(told.encode(), digest_size=8).digest(), "big") >> 1

    def micro_batches(self, epoch: int, step: int) -> list[MicroBatch]:
        """Return what this rank computes in a step, in order; sequences are indices into the data set."""
        documents, made = self.batches.of(epoch)[step], self.plan(epoch, step)
        own = made.of_rank(self.rank)
        if self.planning.micro_batches is None and made.objective == "free_running":
            own = [batch for batch in own if batch.sequences] or own[:1]
        return [replace(batch, sequences=tuple(documents[list(batch.sequences)].tolist())) for batch in own]

    def __iter__(self) -> Iterator[list[int] | list[SharedBatch]]:
        """Yield the micro-batches of the present epoch."""
        epoch, first, waited_s = self._epoch, self._next if self._is_loaded else _Place(), self.waited_s
        self._is_loaded = False
        plans = PlanAhead(
            lambda step: self.micro_batches(epoch, step),
            range(first.step, self.num_steps(epoch)),
            depth=self.planning.ahead,
            clock=self._clock,
        )
        with closing(plans):
            for step, batches in enumerate(plans, first.step):
                self.waited_s = waited_s + plans.waited_s
                begin = first.micro_batch if step == first.step else 0
                for place, batch in enumerate(batches[begin:], begin + 1):
                    self._next = _Place(step, place) if place < len(batches) else _Place(step + 1)
                    yield self._handed_out(batch, epoch, step)
        self._epoch, self._next = epoch + 1, _Place()

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; where that is the present one, a loaded state keeps its place."""
        if epoch != self._epoch:
            self._epoch, self._next, self._is_loaded = epoch, _Place(), False

    def state_at(self, epoch: int, step: int) -> dict[str, int]:
        """Return the state after so many steps of an epoch."""
        if step == self.num_steps(epoch):
            epoch, step = epoch + 1, 0
        return self._state(epoch, _Place(step))

    def state_dict(self) -> dict[str, int]:
        """Return what a resume needs: whole numbers."""
        if not self._next.micro_batch:
            return self.state_at(self._epoch, self._next.step)
        return self._state(self._epoch, self._next)

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on from a state, on any number of ranks where it was saved between two steps.

        Raises:
            UserError: the state is of other documents or batches, or of the middle of another rank's step.
        """
        told = dict(state_dict)
        if told["batches"] != self.batches.hash():
            raise UserError(
                "this state is of other global batches: their documents, lengths, sequences, tokens, last, "
                "seed, delay_steps or, where that is not 0, costs differ; give the sampler those that it was "
                "saved with, or start an epoch anew"
            )
        place = _Place(told["step"], told["micro_batch"])
        if place.micro_batch and told != self._state(told["epoch"], place):
            raise UserError(
                f"this state was saved in the middle of a step, by rank {told['rank']} of "
                f"{told['world_size']}, and rank {self.rank} of {self.world_size} or its plan differs; load "
                f"one that was saved between steps"
            )
        self._epoch, self._next, self._is_loaded = told["epoch"], place, True

    def _state(self, epoch: int, place: _Place) -> dict[str, int]:
        inside = {}
        if place.micro_batch:
            plan_hash = self.plan_hash(epoch, place.step)
            inside = {"rank": self.rank, "world_size": self.world_size, "plan": plan_hash}
        return {"epoch": epoch, **place._asdict(), "batches": self.batches.hash(), **inside}

    def _handed_out(self, batch: MicroBatch, epoch: int, step: int) -> list[int] | list[SharedBatch]:
        if self.planning.mode == "dynamic_cp":
            return [SharedBatch(batch, self.plan_hash(epoch, step))]
        return list(batch.sequences)

    def _planned(self, epoch: int, step: int) -> Plan:
        own, planning = self.batches.lengths[self.batches.of(epoch)[step]], self.planning
        try:
            return plan(
                own,
                world_size=self.world_size,
                cost=planning.cost,
                mode=planning.mode,
                objective=planning.objective,
                num_slots=planning.micro_batches,
            )
        except UserError as error:
            raise UserError(
                f"step {step} of epoch {epoch}, {own.size} documents of {int(own.sum()):,} tokens with "
                f"planning.micro_batches={planning.micro_batches} on {self.world_size} ranks: {error}"
            ) from error

    def _check_fit(self) -> None:
        """Refuse documents that fit nowhere now rather than at the step that holds them."""
        cost, lengths = self.planning.cost, self.batches.lengths
        shared = self.planning.mode == "dynamic_cp"
        if shared:
            cost.check_groups(self.world_size, source="planning.cost", way_out="take mode='dispatch'")
        allowed = cost.context_schemes(self.world_size) if shared else (cost.of(Scheme()),)
        most, longest = max(each.cap_tokens for each in allowed), int(lengths.argmax())
        if lengths[longest] > most:
            raise UserError(
                f"document {longest} has {int(lengths[longest]):,} tokens, and planning.cost holds at most "
                f"{most:,} in a micro-batch; raise its cap, or give lengths cut by hardy.balance.lengths."
                f"fit_lengths and cut documents with PackingCollator(document_tokens=..., long_documents=...)"
            )
