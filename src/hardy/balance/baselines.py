"""What others do, to compare with: each rule returns a plan of equal groups.

Rules: random and in_order fill packs as sequences come; first_fit and best_fit sort by tokens; karmarkar_karp
and longest_first balance the predicted time without looking for swaps; equal_groups packs for the groups of
one degree, as sequence-parallel systems do. Sources: arXiv 2412.07894, arXiv 2412.01523.
"""

import heapq
from collections.abc import Callable, Sequence

import numpy as np

from hardy.balance.assign import equal_takers, longest_first
from hardy.balance.cost import Floats, Integers, LengthCostModel, SchemeCost
from hardy.balance.plan import Objective, Plan, Scheme, step_time
from hardy.balance.planner import (
    check_fit,
    deal,
    finished,
    lay_out,
    lower_bound,
    sort_lengths,
)
from hardy.balance.replica import best_fit, first_fit
from hardy.config import UserError

FILLED = 0.9
"""Share of a group's cap that equal groups are filled to."""


def random_packs(
    tokens: Integers, cost: SchemeCost, replicas: int, generator: np.random.Generator
) -> list[Integers]:
    """Return packs filled one after the other in a random order, dealt in that order."""
    del replicas
    return _next_fit(tokens, generator.permutation(tokens.size), cost.cap_tokens)


def first_fit_packs(
    tokens: Integers, cost: SchemeCost, replicas: int, generator: np.random.Generator
) -> list[Integers]:
    """Return packs by first fit, longest first."""
    del replicas, generator
    return _packs(first_fit(tokens, capacity_tokens=cost.cap_tokens))


def best_fit_packs(
    tokens: Integers, cost: SchemeCost, replicas: int, generator: np.random.Generator
) -> list[Integers]:
    """Return packs by best fit, longest first."""
    del replicas, generator
    return _packs(best_fit(tokens, capacity_tokens=cost.cap_tokens))


def shuffled_packs(
    tokens: Integers, cost: SchemeCost, replicas: int, generator: np.random.Generator
) -> list[Integers]:
    """Return packs by first fit in a random order."""
    packs = first_fit_packs(tokens, cost, replicas, generator)
    return [packs[place] for place in generator.permutation(len(packs)).tolist()]


def differenced_packs(
    tokens: Integers, cost: SchemeCost, replicas: int, generator: np.random.Generator
) -> list[Integers]:
    """Return packs by Karmarkar and Karp's differencing of predicted times; more of them until all fit."""
    del generator
    times = cost.times(tokens)

    def divide(count: int) -> Integers | None:
        taken_by = karmarkar_karp(times, count)
        used = np.bincount(taken_by, weights=tokens, minlength=count)
        return taken_by if used.max() <= cost.cap_tokens else None

    return _fitting(tokens, cost, replicas, divide)


def longest_first_packs(
    tokens: Integers, cost: SchemeCost, replicas: int, generator: np.random.Generator
) -> list[Integers]:
    """Return packs by the longest-first rule, without swaps; more of them until all fit."""
    del generator
    times = cost.times(tokens)
    return _fitting(
        tokens,
        cost,
        replicas,
        lambda count: longest_first(equal_takers(times, tokens, num_takers=count, room=cost.cap_tokens)),
    )


Rule = Callable[[Integers, SchemeCost, int, np.random.Generator], list[Integers]]
RULES: dict[str, Rule] = {
    "random": random_packs,
    "token_ffd": first_fit_packs,
    "token_ffd_shuffled": shuffled_packs,
    "best_fit": best_fit_packs,
    "karmarkar_karp": differenced_packs,
    "longest_first": longest_first_packs,
}


def baseline(
    name: str,
    lengths: Sequence[int] | Integers,
    *,
    world_size: int,
    cost: LengthCostModel,
    generator: np.random.Generator,
    objective: Objective = "lock_step",
    scheme: Scheme | None = None,
) -> Plan:
    """Return the plan of one rule for equal groups.

    Args:
        name: of `RULES`.
        lengths: tokens of each sequence of the global batch.
        world_size: ranks.
        cost: what sequences cost.
        generator: what draws, where the rule does.
        objective: when ranks meet.
        scheme: of every group; none is one rank each.

    Raises:
        UserError: no such rule, or the batch cannot be planned.
    """
    if name not in RULES:
        raise UserError(f"there is no rule {name!r}; there are {', '.join(RULES)}")
    own = cost.of(scheme or Scheme())
    tokens, order = sort_lengths(lengths)
    check_fit(tokens, order, [own])
    replicas = world_size // own.scheme.ranks
    if not replicas:
        raise UserError(f"a group of {own.scheme} needs {own.scheme.ranks} ranks, the world has {world_size}")
    packs = RULES[name](tokens, own, replicas, generator)
    return _planned(packs, own, tokens, order, world_size=world_size, objective=objective)


def equal_groups(
    lengths: Sequence[int] | Integers, *, world_size: int, cost: LengthCostModel, degree: int
) -> Plan:
    """Return slots of equal groups as sequence-parallel systems fill them.

    Best fit into packs of nine tenths of the cap, or of the longest sequence if that is more; where there are
    fewer packs than groups, the fullest are split until each group has one: tokens are what such systems see.
    Packs are dealt as they come, so in the last slot groups may be empty.
    """
    own = cost.of(Scheme(context=degree))
    tokens, order = sort_lengths(lengths)
    check_fit(tokens, order, [own])
    if world_size % degree:
        raise UserError(
            f"degree={degree} does not divide the world of {world_size} ranks; take one that does"
        )
    replicas = world_size // degree
    capacity = max(int(FILLED * own.cap_tokens), int(tokens[0]))
    packs = _packs(best_fit(tokens, capacity_tokens=capacity))
    while len(packs) < replicas:
        fullest = max(
            (place for place, pack in enumerate(packs) if pack.size > 1),
            key=lambda place: int(tokens[packs[place]].sum()),
            default=None,
        )
        if fullest is None:
            break
        pack = packs[fullest]
        sizes = tokens[pack].astype(np.float64)
        half = longest_first(equal_takers(sizes, tokens[pack], num_takers=2, room=capacity))
        assert half is not None, "half a pack fits where all of it did"
        packs[fullest : fullest + 1] = [pack[half == 0], pack[half == 1]]
    return _planned(packs, own, tokens, order, world_size=world_size, objective="lock_step")


def best_equal_groups(lengths: Sequence[int] | Integers, *, world_size: int, cost: LengthCostModel) -> Plan:
    """Return the best of `equal_groups` over all degrees, chosen anew for each batch (BatchAda)."""
    longest = int(np.max(lengths))
    degrees = [
        own.scheme.context
        for own in cost.context_schemes(world_size)
        if own.cap_tokens >= longest and world_size % own.scheme.context == 0
    ]
    if not degrees:
        raise UserError(f"no degree holds a sequence of {longest:,} tokens; raise cap_tokens")
    plans = [equal_groups(lengths, world_size=world_size, cost=cost, degree=d) for d in degrees]
    return min(plans, key=lambda made: made.cost)


def karmarkar_karp(times: Floats, num_parts: int) -> Integers:
    """Return the part of each value, by differencing: the two most uneven divisions are joined crosswise.

    Example:
        >>> karmarkar_karp(np.array([8.0, 7.0, 6.0, 5.0, 4.0]), 2).tolist()
        [1, 0, 1, 0, 0]
    """
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for i, value in enumerate(times.tolist()):
        parts: list[tuple[float, list[int]]] = [(value, [i]), *((0.0, []) for _ in range(num_parts - 1))]
        heapq.heappush(heap, (-value if num_parts > 1 else 0.0, i, parts))
    number = len(heap)
    while len(heap) > 1:
        _, _, a = heapq.heappop(heap)
        _, _, b = heapq.heappop(heap)
        joined = [(x + y, own + other) for (x, own), (y, other) in zip(a, reversed(b), strict=True)]
        joined.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (joined[-1][0] - joined[0][0], number, joined))
        number += 1
    taken_by = np.empty(times.size, dtype=np.int64)
    for part, (_, own) in enumerate(heap[0][2]):
        taken_by[own] = part
    return taken_by


def _next_fit(tokens: Integers, order: Integers, cap_tokens: int) -> list[Integers]:
    packs: list[list[int]] = []
    left = 0
    for i in order.tolist():
        size = int(tokens[i])
        if not packs or size > left:
            packs.append([])
            left = cap_tokens
        packs[-1].append(i)
        left -= size
    return [np.sort(np.array(pack, dtype=np.int64)) for pack in packs]


def _packs(taken_by: Integers) -> list[Integers]:
    return [np.flatnonzero(taken_by == pack) for pack in range(int(taken_by.max()) + 1)]


def _fitting(
    tokens: Integers, cost: SchemeCost, replicas: int, divide: Callable[[int], Integers | None]
) -> list[Integers]:
    """Return the dearest packs first, of the least number of slots in which the rule fits."""
    times = cost.times(tokens)
    slots = -(-int(tokens.sum()) // (cost.cap_tokens * replicas))
    while True:
        taken_by = divide(slots * replicas)
        if taken_by is not None:
            packs = [np.flatnonzero(taken_by == pack) for pack in range(slots * replicas)]
            return sorted(packs, key=lambda pack: -float(times[pack].sum()))
        slots += 1


def _planned(
    packs: Sequence[Integers],
    own: SchemeCost,
    tokens: Integers,
    order: Integers,
    *,
    world_size: int,
    objective: Objective,
) -> Plan:
    replicas = world_size // own.scheme.ranks
    slots = lay_out(deal(packs, own, replicas), tokens, order)
    bound = lower_bound(tokens, [own], world_size=world_size, objective=objective)
    time = step_time(slots, objective)
    return finished(slots, bound, order, world_size=world_size, objective=objective, cost=time)
