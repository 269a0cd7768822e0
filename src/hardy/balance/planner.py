"""The planner: from the lengths of a global batch to who computes what, with a lower bound beside it.

Paper: Hydraulis (arXiv 2412.07894). `plan` is a pure function: no clock, no draw, no process. Lengths are
sorted first (longest first, then by index) and only the sorted lengths are looked at.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from hardy.balance.assign import Problem, equal_takers, improve, longest_first
from hardy.balance.bounds import Bound, charged, fewest_slots, groups_bound, replicas_bound
from hardy.balance.cost import Floats, Integers, LengthCostModel, SchemeCost
from hardy.balance.partitions import GroupChooser, cut_evenly
from hardy.balance.plan import Group, MicroBatch, Objective, Plan, Scheme, Slot, step_time
from hardy.balance.replica import first_fit, pack_replica
from hardy.config import UserError

Mode = Literal["pack", "dispatch", "dynamic_cp"]
"""pack: as tokens fit, dealt in order; dispatch: by cost, equal groups; dynamic_cp: groups by the lengths."""
EXTRA_SLOTS = 3
"""Slots beyond the fewest that are tried."""
PROMISING = 8
"""Partitions of a free-running step that are planned to the end."""
Work = list[tuple[SchemeCost, Integers]]
"""One slot: each group's cost and the positions it takes, large groups first."""


class SequenceTooLongError(UserError):
    """A sequence fits under no scheme."""

    def __init__(self, index: int, length: int, cap_tokens: int) -> None:
        super().__init__(
            f"sequence {index} has {length:,} tokens, but no allowed group holds more than {cap_tokens:,}; "
            f"raise cap_tokens or the largest degree, or split, truncate or drop long sequences "
            f"(hardy.balance.lengths.fit_lengths)"
        )
        self.index, self.length, self.cap_tokens = index, length, cap_tokens


def plan(
    lengths: Sequence[int] | Integers,
    *,
    world_size: int,
    cost: LengthCostModel,
    mode: Mode = "dynamic_cp",
    objective: Objective = "lock_step",
    degree: int = 1,
    num_slots: int | None = None,
) -> Plan:
    """Return who computes which sequences, in which groups, in which slot.

    Args:
        lengths: tokens of each sequence of the global batch, in any order.
        world_size: ranks.
        cost: what sequences cost; its context-parallel schemes are what groups may be.
        mode: how much is balanced.
        objective: whether ranks meet in every slot or once a step.
        degree: ranks of every group in `pack` and `dispatch`.
        num_slots: exactly so many micro-batches for each group, some perhaps empty; none chooses.

    Returns:
        The plan. Where several are as good, the one with fewer slots.

    Raises:
        UserError: the batch is empty, a length is not positive, a sequence fits nowhere
            (`SequenceTooLongError`), or groups cannot make up the world.

    Example:
        >>> from hardy.balance.cost import SchemeCost
        >>> alone = SchemeCost(scheme=Scheme(), a=1.0, b=0.0, c=0.0, cap_tokens=8)
        >>> both = SchemeCost(scheme=Scheme(context=2), a=0.5, b=0.0, c=0.0, cap_tokens=16)
        >>> made = plan([2, 8, 2], world_size=2, cost=LengthCostModel(schemes=(alone, both)))
        >>> [(str(batch.group.scheme), batch.sequences) for batch in made.of_rank(0)], made.cost
        ([('cp2', (1, 0, 2))], 36.0)
    """
    tokens, order = sort_lengths(lengths)
    if world_size < 1:
        raise UserError(f"world_size must be at least 1, got {world_size}")
    if num_slots is not None and num_slots < 1:
        raise UserError(f"num_slots must be at least 1, got {num_slots}")
    free = mode == "dynamic_cp"
    schemes = cost.context_schemes(world_size) if free else (_equal_scheme(cost, degree, world_size),)
    check_fit(tokens, order, schemes)
    bound = lower_bound(tokens, schemes, world_size=world_size, objective=objective)
    best: tuple[float, list[Slot]] | None = None
    for work in _candidates(tokens, schemes, world_size, mode, objective, num_slots):
        slots = lay_out(work, tokens, order)
        time = step_time(slots, objective)
        if best is None or time < best[0] * (1 - 1e-12):
            best = (time, slots)
        if best[0] <= bound.time * (1 + 1e-9):
            break
    if best is None:
        raise UserError(
            f"{tokens.size} sequences of {int(tokens.sum()):,} tokens do not fit into num_slots={num_slots} "
            f"micro-batches on {world_size} ranks; take more of them, or raise cap_tokens"
        )
    return finished(best[1], bound, order, world_size=world_size, objective=objective, cost=best[0])


def sort_lengths(lengths: Sequence[int] | Integers) -> tuple[Integers, Integers]:
    """Return the lengths, longest first, and the index of each; equal ones by index.

    Raises:
        UserError: there are none, or one is not positive.
    """
    given = np.asarray(lengths, dtype=np.int64)
    if given.size == 0:
        raise UserError("an empty batch cannot be planned; give at least one sequence")
    if given.ndim != 1 or int(given.min()) < 1:
        index = int(given.reshape(-1).argmin())
        raise UserError(
            f"sequence {index} has {int(given.reshape(-1)[index])} tokens; every length must be at least 1: "
            f"leave empty sequences out of the batch"
        )
    order = np.argsort(-given, kind="stable")
    return given[order], order


def check_fit(tokens: Integers, order: Integers, schemes: Sequence[SchemeCost]) -> None:
    """Refuse a batch whose longest sequence no scheme holds."""
    largest = max(cost.cap_tokens for cost in schemes)
    if int(tokens[0]) > largest:
        raise SequenceTooLongError(int(order[0]), int(tokens[0]), largest)


def lower_bound(
    tokens: Integers, schemes: Sequence[SchemeCost], *, world_size: int, objective: Objective
) -> Bound:
    """Return a time that no groups of these schemes beat; with one scheme all groups are alike."""
    bound = groups_bound(tokens, schemes, world_size=world_size, objective=objective)
    if len(schemes) == 1 and objective == "free_running":
        number = world_size // schemes[0].scheme.ranks
        other = replicas_bound(tokens, [schemes[0]] * number)
        return other if other.time > bound.time else bound
    return bound


def finished(
    slots: Sequence[Slot],
    bound: Bound,
    order: Integers,
    *,
    world_size: int,
    objective: Objective,
    cost: float,
) -> Plan:
    """Return the plan of these slots."""
    return Plan(
        slots=tuple(slots),
        world_size=world_size,
        objective=objective,
        cost=cost,
        lower_bound=min(bound.time, cost),  # sums in another order may differ in the last bits
        bound_by=None if bound.alone is None else int(order[bound.alone]),
    )


def lay_out(work: Sequence[Work], tokens: Integers, order: Integers) -> list[Slot]:
    """Return slots with ranks: groups stand on consecutive ranks in the order given."""
    return [tuple(_batches(groups, tokens, order)) for groups in work]


def _batches(groups: Work, tokens: Integers, order: Integers) -> Iterator[MicroBatch]:
    first_rank = 0
    for cost, taken in groups:
        own = tokens[taken]
        indices: list[int] = order[taken].tolist()
        yield MicroBatch(
            group=Group(first_rank=first_rank, scheme=cost.scheme),
            sequences=tuple(indices),
            tokens=int(own.sum()),
            cost=float(cost.times(own).sum()) + cost.c if taken.size else 0.0,
        )
        first_rank += cost.scheme.ranks


def _equal_scheme(cost: LengthCostModel, degree: int, world_size: int) -> SchemeCost:
    if degree < 1 or world_size % degree:
        raise UserError(
            f"degree={degree} does not divide the world of {world_size} ranks; take one that does"
        )
    return cost.of(Scheme(context=degree))


def _candidates(
    tokens: Integers,
    schemes: Sequence[SchemeCost],
    world_size: int,
    mode: Mode,
    objective: Objective,
    num_slots: int | None,
) -> Iterator[list[Work]]:
    """Yield what to choose from, fewer slots first where it matters."""
    if mode == "pack":
        yield from _as_tokens_fit(tokens, schemes[0], world_size, num_slots)
        return
    longest = int(tokens[0])
    for cost in schemes:
        if cost.cap_tokens >= longest and world_size % cost.scheme.ranks == 0:
            replicas = world_size // cost.scheme.ranks
            make: Callable[[Integers, SchemeCost, int, int | None], Iterator[list[Work]]] = (
                _lock_step_equal if objective == "lock_step" else _free_running_equal
            )
            yield from make(tokens, cost, replicas, num_slots)
    if mode == "dynamic_cp" and len(schemes) > 1:
        if objective == "lock_step":
            yield from _groups_per_slot(tokens, schemes, world_size, num_slots)
        else:
            yield from _groups_per_step(tokens, schemes, world_size, num_slots)


def _as_tokens_fit(
    tokens: Integers, cost: SchemeCost, world_size: int, num_slots: int | None
) -> Iterator[list[Work]]:
    """Yield packs by first fit, dealt to the groups in the order in which they were opened."""
    replicas = world_size // cost.scheme.ranks
    taken_by = first_fit(tokens, capacity_tokens=cost.cap_tokens)
    packs = [np.flatnonzero(taken_by == pack) for pack in range(int(taken_by.max()) + 1)]
    if num_slots is None or len(packs) <= num_slots * replicas:
        yield deal(packs, cost, replicas, num_slots=num_slots)


def deal(
    packs: Sequence[Integers], cost: SchemeCost, replicas: int, *, num_slots: int | None = None
) -> list[Work]:
    """Return slots with the packs in order, one for each replica; what is missing at the end is empty."""
    nothing = np.empty(0, dtype=np.int64)
    count = num_slots or -(-len(packs) // replicas)
    filled = [*packs, *([nothing] * (count * replicas - len(packs)))]
    return [
        [(cost, pack) for pack in filled[slot * replicas : (slot + 1) * replicas]] for slot in range(count)
    ]


def _slot_counts(
    tokens: Integers, schemes: Sequence[SchemeCost], world_size: int, num_slots: int | None
) -> Iterator[int]:
    """Yield numbers of slots to try, and after those ever more; whoever finds enough stops asking."""
    if num_slots is not None:
        yield num_slots
        return
    count = fewest_slots(tokens, schemes, world_size=world_size)
    while count <= 2 * tokens.size:
        yield count
        count += 1


def _lock_step_equal(
    tokens: Integers, cost: SchemeCost, replicas: int, num_slots: int | None
) -> Iterator[list[Work]]:
    """Yield equal groups that meet in each slot: packs of equal time, the dearest together in a slot.

    And, since long sequences set the pace, runs of like lengths for each slot.
    """
    times, found = cost.times(tokens), 0
    world_size = replicas * cost.scheme.ranks
    for count in _slot_counts(tokens, [cost], world_size, num_slots):
        problem = equal_takers(times, tokens, num_takers=count * replicas, room=cost.cap_tokens)
        taken_by = longest_first(problem)
        if taken_by is not None:
            taken_by = improve(problem, taken_by, good_enough=_least(times, count * replicas))
            packs = [np.flatnonzero(taken_by == pack) for pack in range(count * replicas)]
            packs.sort(key=lambda pack: -float(times[pack].sum()))
            yield deal(packs, cost, replicas, num_slots=count)
            found += 1
        runs = _runs_of_like_length(tokens, times, cost, replicas, count)
        if runs is not None:
            yield runs
        if found > 1:  # more packs of equal time only cost more constants
            return


def _runs_of_like_length(
    tokens: Integers, times: Floats, cost: SchemeCost, replicas: int, count: int
) -> list[Work] | None:
    """Return slots of like lengths, each balanced by itself; None where one overflows."""
    work: list[Work] = []
    for run in cut_evenly(tokens, count):
        problem = equal_takers(times[run], tokens[run], num_takers=replicas, room=cost.cap_tokens)
        taken_by = longest_first(problem)
        if taken_by is None:
            return None
        taken_by = improve(problem, taken_by, good_enough=_least(times[run], replicas))
        work.append([(cost, np.flatnonzero(taken_by == r) + run.start) for r in range(replicas)])
    return _filled(work, count)


def _filled(work: list[Work], num_slots: int) -> list[Work]:
    """Return the slots with empty ones after them, up to `num_slots`."""
    nothing = np.empty(0, dtype=np.int64)
    return work + [[(cost, nothing) for cost, _ in work[-1]]] * (num_slots - len(work))


def _least(times: Floats, takers: int) -> float:
    """Return a time that no assignment to equal takers beats."""
    return max(float(times.max()), float(times.sum()) / takers)


def _free_running_equal(
    tokens: Integers, cost: SchemeCost, replicas: int, num_slots: int | None
) -> Iterator[list[Work]]:
    """Yield equal groups that meet once a step."""
    yield from replicas_work(tokens, [cost] * replicas, num_slots=num_slots)


def replicas_work(
    tokens: Integers, replicas: Sequence[SchemeCost], *, num_slots: int | None = None
) -> Iterator[list[Work]]:
    """Yield the two-stage plan of free-running replicas: who takes what, then how each packs it.

    Args:
        tokens: longest first.
        replicas: the cost of each, in the order of their ranks.
        num_slots: exactly so many packs for each; none chooses for each by itself.
    """
    order = sorted(range(len(replicas)), key=lambda j: (-replicas[j].cap_tokens, j))
    kinds = [replicas[j] for j in order]
    once = {cost: charged(cost, tokens) for cost in dict.fromkeys(kinds)}
    room = [int(tokens.sum()) if num_slots is None else num_slots * cost.cap_tokens for cost in kinds]
    problem = Problem(
        times=np.stack([once[cost] for cost in kinds], axis=1),
        tokens=tokens,
        room=np.array(room, dtype=np.int64),
        bubbles=np.array([cost.scheme.pipeline - 1 for cost in kinds], dtype=np.int64),
    )
    taken_by = longest_first(problem)
    if taken_by is None:
        return
    taken_by = improve(problem, taken_by, good_enough=replicas_bound(tokens, kinds).time)
    packs: list[list[Integers]] = [[] for _ in replicas]
    for place, j in enumerate(order):
        own = np.flatnonzero(taken_by == place)
        if own.size:
            try:
                made = pack_replica(tokens[own], replicas[j], num_packs=num_slots)
            except UserError:  # exactly so many packs do not hold it; the caller says so if nothing else does
                return
            packs[j] = [own[pack] for pack in made]
    nothing = np.empty(0, dtype=np.int64)
    count = num_slots or max(map(len, packs))
    yield [
        [(cost, own[slot] if slot < len(own) else nothing) for cost, own in zip(replicas, packs, strict=True)]
        for slot in range(count)
    ]


def _groups_per_slot(
    tokens: Integers, schemes: Sequence[SchemeCost], world_size: int, num_slots: int | None
) -> Iterator[list[Work]]:
    """Yield slots of like lengths, each with the groups that suit it."""
    chooser = GroupChooser(schemes, num_ranks=world_size)
    found = 0
    for count in _slot_counts(tokens, schemes, world_size, num_slots):
        work: list[Work] = []
        for run in cut_evenly(tokens, count):
            chosen = chooser.choose(tokens[run])
            if chosen is None:
                break
            work.append([(cost, taken + run.start) for cost, taken in chosen])
        else:
            yield _filled(work, count)
            found += 1
            if found > EXTRA_SLOTS:
                return


def _groups_per_step(
    tokens: Integers, schemes: Sequence[SchemeCost], world_size: int, num_slots: int | None
) -> Iterator[list[Work]]:
    """Yield groups that stay for the step, for the partitions that are soonest done before packing."""
    uncapped = GroupChooser(schemes, num_ranks=world_size)
    for partition in uncapped.promising(tokens, keep=PROMISING):
        yield from replicas_work(tokens, partition, num_slots=num_slots)
