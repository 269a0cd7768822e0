"""A plan: which ranks form a group in each slot of a step, and which sequences each group takes together.

Paper: Hydraulis (arXiv 2412.07894). A *group* is consecutive ranks that share every sequence given to them,
by a *scheme*: so many ways of tensor, pipeline and context parallelism. A *micro-batch* is what one group
computes in one forward and backward pass; it may be empty, and then its ranks run one of zero weight. A
*slot* is one micro-batch of each group. Groups may change from slot to slot where ranks go in lock-step;
where they run freely, until the end of the step, they are the same in all slots.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Objective = Literal["lock_step", "free_running"]
"""lock_step: ranks meet in every slot (ZeRO-3), so a step takes the sum over slots of the slowest group;
free_running: they meet once a step (DDP without sync, FSDP2 without resharding): the slowest group's sum."""
GAP_WARNING = 0.05
"""Share over the lower bound from which a plan says so."""
LOOSE_BELOW = 5
"""Sequences for each group under which the lower bound itself is far from what can be had."""


@dataclass(frozen=True, kw_only=True, order=True)
class Scheme:
    """How the ranks of a group share a micro-batch; the number of ranks is the product."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        """Refuse degrees below one."""
        if min(self.tensor, self.pipeline, self.context) < 1:
            raise ValueError(f"every degree of a scheme must be at least 1, got {self}")

    @property
    def ranks(self) -> int:
        """Ranks of a group."""
        return self.tensor * self.pipeline * self.context

    def __str__(self) -> str:
        """Return such as `cp4` or `tp8 pp2`; `cp1` for a rank alone."""
        degrees = (("tp", self.tensor), ("pp", self.pipeline), ("cp", self.context))
        return " ".join(f"{name}{degree}" for name, degree in degrees if degree > 1) or "cp1"


@dataclass(frozen=True, kw_only=True, order=True)
class Group:
    """Consecutive ranks: `first_rank` and so many after it as its scheme has."""

    first_rank: int
    scheme: Scheme

    @property
    def ranks(self) -> range:
        """All ranks, in order."""
        return range(self.first_rank, self.first_rank + self.scheme.ranks)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What a group computes at once."""

    group: Group
    sequences: tuple[int, ...]
    """Indices into the lengths that were planned, longest first; none is a micro-batch of zero weight."""
    tokens: int
    """Their tokens together, without padding."""
    cost: float
    """Predicted time, forward and backward, of one pipeline stage; 0 where empty."""


Slot = tuple[MicroBatch, ...]
"""One micro-batch for each group, in the order of first ranks."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One step's work; equal arguments of the planner give equal plans, on every machine.

    Example:
        >>> both = Group(first_rank=0, scheme=Scheme(context=2))
        >>> batch = MicroBatch(group=both, sequences=(1, 0), tokens=7, cost=3.0)
        >>> plan = Plan(slots=((batch,),), world_size=2, objective="lock_step", cost=3.0, lower_bound=2.0)
        >>> plan.gap, plan.of_rank(1)[0].sequences, plan.idle_share
        (0.5, (1, 0), 0.0)
    """

    slots: tuple[Slot, ...]
    world_size: int
    objective: Objective
    cost: float
    """Predicted time of the step, in the cost model's unit; what moving weights and changing groups costs
    included."""
    lower_bound: float
    """No plan for the same lengths, ranks and allowed schemes is faster."""
    bound_by: int | None = None
    """The one sequence that alone is the lower bound, if it is one; only more ranks for it would help."""

    @property
    def gap(self) -> float:
        """How far over the lower bound, as a share of it; never negative."""
        return max(self.cost / self.lower_bound - 1, 0.0) if self.lower_bound else 0.0

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All groups of all slots, small before large, then by first rank: the order to create them in."""
        found = {batch.group for slot in self.slots for batch in slot}
        return tuple(sorted(found, key=lambda group: (group.scheme.ranks, group.first_rank, group.scheme)))

    @cached_property
    def micro_batches(self) -> dict[Group, tuple[MicroBatch, ...]]:
        """The micro-batches of every group, in the order of slots, empty ones included."""
        found: dict[Group, list[MicroBatch]] = {group: [] for group in self.groups}
        for slot in self.slots:
            for batch in slot:
                found[batch.group].append(batch)
        return {group: tuple(batches) for group, batches in found.items()}

    def mine(self, slot: int, rank: int) -> MicroBatch | None:
        """Return what `rank` computes in `slot`; none where no group has it (strategies may leave ranks)."""
        found = (batch for batch in self.slots[slot] if rank in batch.group.ranks)
        return next(found, None)

    def of_rank(self, rank: int) -> tuple[MicroBatch, ...]:
        """Return the micro-batches of `rank`, one for each slot that has a group with it."""
        own = (self.mine(slot, rank) for slot in range(len(self.slots)))
        return tuple(batch for batch in own if batch is not None)

    @cached_property
    def rank_times(self) -> tuple[float, ...]:
        """Predicted time that each rank works, bubbles of its pipeline included, waiting for others not."""
        times = [0.0] * self.world_size
        for group, batches in self.micro_batches.items():
            own = stage_time([batch.cost for batch in batches], pipeline=group.scheme.pipeline)
            for rank in group.ranks:
                times[rank] += own
        return tuple(times)

    @property
    def idle_share(self) -> float:
        """Share of the ranks' time together in which they wait for others."""
        worked = sum(self.rank_times) / (self.world_size * self.cost) if self.cost else 1.0
        return max(1 - worked, 0.0)

    def hash(self) -> int:
        """Return 63 bits that differ where who computes what differs; costs, which are floats, do not count.

        To be compared between ranks: ranks with different plans would wait for each other for ever.
        """
        told: list[object] = [self.world_size, self.objective]
        for slot in self.slots:
            for batch in slot:
                scheme = batch.group.scheme
                degrees = (scheme.tensor, scheme.pipeline, scheme.context)
                told.append((batch.group.first_rank, degrees, batch.sequences))
            told.append("slot")
        digest = hashlib.blake2b(repr(told).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1

    def warning(self) -> str | None:
        """Return what to know where the plan is far over its lower bound, else none."""
        if self.gap <= GAP_WARNING:
            return None
        text = f"the plan is {self.gap:.1%} above its lower bound"
        taken = sum(len(batch.sequences) for slot in self.slots for batch in slot)
        if taken < LOOSE_BELOW * len(self.slots[0]):
            return f"{text}; with so few sequences for each group the bound itself is loose"
        if self.bound_by is not None:
            return f"{text}; sequence {self.bound_by} alone is the bound: only more ranks for it would help"
        return text


def stage_time(costs: Sequence[float], *, pipeline: int) -> float:
    """Return the time of a replica's micro-batches (E1): their sum, and the slowest for each further stage.

    Exact where every stage takes as long for a micro-batch, in any order.

    Example:
        >>> stage_time([2.0, 3.0], pipeline=3)
        11.0
    """
    return sum(costs) + (pipeline - 1) * max(costs, default=0.0)


def step_time(slots: Sequence[Slot], objective: Objective) -> float:
    """Return the predicted time of a step by its objective, without what changing groups costs."""
    if objective == "lock_step":
        return sum(max((batch.cost for batch in slot), default=0.0) for slot in slots)
    own: dict[Group, list[float]] = {}
    for slot in slots:
        for batch in slot:
            own.setdefault(batch.group, []).append(batch.cost)
    return max(
        (stage_time(costs, pipeline=group.scheme.pipeline) for group, costs in own.items()), default=0.0
    )
