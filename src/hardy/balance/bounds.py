"""Lower bounds: times that no plan can beat, to stand beside every plan.

Paper: Hydraulis (arXiv 2412.07894). Letters: s tokens, g ranks of a scheme, tau = a s^2 + b s, c constant of
a micro-batch. A micro-batch holds at most `cap_tokens`, so its constant is at least c / cap_tokens a token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hardy.balance.cost import Floats, Integers, SchemeCost
from hardy.balance.plan import Objective


class Bound(NamedTuple):
    """A time that no plan can beat."""

    time: float
    alone: int | None
    """Position of the one sequence that is the bound, if it is one."""


def charged(cost: SchemeCost, lengths: Integers) -> Floats:
    """Return time of each sequence with its share of the constants of micro-batches; inf where too long."""
    times = cost.times(lengths) + lengths * (cost.c / cost.cap_tokens)
    return np.where(lengths <= cost.cap_tokens, times, np.inf)


def alone(cost: SchemeCost, lengths: Integers) -> Floats:
    """Return time of each sequence with nothing beside it; inf where too long."""
    times = cost.scheme.pipeline * (cost.c + cost.times(lengths))
    return np.where(lengths <= cost.cap_tokens, times, np.inf)


def replicas_bound(lengths: Integers, replicas: Sequence[SchemeCost]) -> Bound:
    """Return the bound of free-running replicas.

    The largest of: the dearest sequence on the replica that suits it best; the weighted time of all sequences
    above a length over the weights of the replicas that can hold those, for every length at which a replica
    drops out; and, where those are fewer replicas than sequences, the two that must share one.

    Args:
        lengths: longest first.
        replicas: the cost of each.
    """
    kinds = list(dict.fromkeys(replicas))
    fastest = np.minimum.reduce([alone(cost, lengths) for cost in kinds])
    times = {cost: charged(cost, lengths) for cost in kinds}
    shared = 0.0
    for threshold in sorted({0, *(cost.cap_tokens for cost in kinds)}):
        count = int(np.count_nonzero(lengths > threshold))
        shortest = int(lengths[count - 1]) if count else 0
        holders = [cost for cost in replicas if cost.cap_tokens >= shortest]
        if count and holders:
            held = {cost: times[cost][:count] for cost in dict.fromkeys(holders)}
            pair = _two_in_one(lengths[:count], list(held), len(holders))
            shared = max(shared, pair, *_weighted(held, holders))
    return _larger(fastest, shared)


def _weighted(held: dict[SchemeCost, Floats], holders: Sequence[SchemeCost]) -> tuple[float, float]:
    """Return sum_i min_j w_j tau_ij / sum_j w_j, which any weights make a bound, for two choices of them.

    A replica weighs as many ranks as it has; or as much as it is fast, which is exact where all sequences are
    as much slower on one replica as on another.
    """
    ranks = {cost: float(cost.scheme.ranks) for cost in held}
    speeds = {cost: 1 / float(times[np.isfinite(times)].sum()) for cost, times in held.items()}

    def bound(weights: dict[SchemeCost, float]) -> float:
        least = np.minimum.reduce([weights[cost] * times for cost, times in held.items()])
        return float(least.sum()) / sum(weights[cost] for cost in holders)

    return bound(ranks), bound(speeds)


def groups_bound(
    lengths: Integers, schemes: Sequence[SchemeCost], *, world_size: int, objective: Objective
) -> Bound:
    """Return the bound where ranks may form any groups of these schemes.

    Args:
        lengths: longest first.
        schemes: what groups may be, each once.
        world_size: ranks there are.
        objective: in lock-step every slot has one constant, and there are as many as the caps ask for.
    """
    if objective == "free_running":
        fastest = np.minimum.reduce([alone(cost, lengths) for cost in schemes])
        ranks_time = np.minimum.reduce([cost.scheme.ranks * charged(cost, lengths) for cost in schemes])
        shared = max(float(ranks_time.sum()) / world_size, _two_in_one(lengths, schemes, world_size))
        return _larger(fastest, shared)
    fits = {cost: lengths <= cost.cap_tokens for cost in schemes}
    times = {cost: np.where(fits[cost], cost.times(lengths), np.inf) for cost in schemes}
    constant = min(cost.c for cost in schemes)
    slots = fewest_slots(lengths, schemes, world_size=world_size)
    fastest = np.minimum.reduce(list(times.values()))
    ranks_time = np.minimum.reduce([cost.scheme.ranks * times[cost] for cost in schemes])
    most_groups = world_size // min(cost.scheme.ranks for cost in schemes)
    pair = float(fastest[most_groups - 1 : most_groups + 1].sum()) if lengths.size > most_groups else 0.0
    found = _larger(fastest, max(float(ranks_time.sum()) / world_size, pair))
    return Bound(found.time + slots * constant, found.alone)


def fewest_slots(lengths: Integers, schemes: Sequence[SchemeCost], *, world_size: int) -> int:
    """Return slots below which the tokens cannot fit."""
    per_rank = max(cost.cap_tokens / cost.scheme.ranks for cost in schemes)
    return max(1, int(np.ceil(int(lengths.sum()) / (per_rank * world_size) - 1e-9)))


def _two_in_one(lengths: Integers, schemes: Sequence[SchemeCost], num_replicas: int) -> float:
    """Return time of the two shortest of the sequences of which, being one too many, two share a replica."""
    if lengths.size <= num_replicas:
        return 0.0
    pair = lengths[num_replicas - 1 : num_replicas + 1]
    return min(float(charged(cost, pair).sum()) for cost in schemes)


def _larger(fastest: Floats, shared: float) -> Bound:
    dearest = int(fastest.argmax())
    value = float(fastest[dearest])
    return Bound(value, dearest) if value > shared else Bound(shared, None)
