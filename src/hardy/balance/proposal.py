"""Which strategies to keep ready: a dynamic program over the lengths' distribution, then simulate and select.

Paper: Hydraulis (arXiv 2412.07894). Letters: N ranks, n some of them, s a length, k a scheme of g_k ranks, r
replicas, t[n][s] the least time in which n ranks do all work up to length s. The program minimises work over
the whole data, not the time of a batch, and alone proposes worse strategies than simulation selects.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from hardy.balance.bounds import replicas_bound
from hardy.balance.cost import Floats, Integers, LengthCostModel, SchemeCost
from hardy.balance.plan import Scheme
from hardy.balance.strategies import Bridge, Strategy, no_bridge, plan_strategies
from hardy.config import UserError

MOST_KEPT = 8
"""Strategies kept ready at most."""
LEAST_GAIN = 0.005
"""Share by which another strategy must shorten the mean step."""
BIG, MIDDLE = 2, 4
"""Most replicas of a big and of a middle scheme in a candidate."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Strategies worth keeping ready, in the order in which they were added."""

    strategies: tuple[Strategy, ...]
    times: tuple[float, ...]
    """Mean time of a step with the first, the first two, ... of them."""
    num_candidates: int


def trace_strategies(
    lengths: Integers, *, world_size: int, cost: LengthCostModel, length_step: int, rank_step: int = 1
) -> list[Strategy]:
    """Return the strategies of the dynamic program, one for each longest length, each once.

    Args:
        lengths: a sample of the data.
        world_size: N.
        cost: of all schemes that may be used.
        length_step: lengths are rounded up to multiples of this.
        rank_step: ranks are given out in multiples of this.
    """
    times, choices = trace_table(
        lengths, world_size=world_size, cost=cost, length_step=length_step, rank_step=rank_step
    )
    found: dict[Strategy, None] = {}
    for s in range(1, times.shape[1]):
        if times[-1, s] < np.inf:
            found.setdefault(_traced(choices, times.shape[0] - 1, s, cost.schemes, rank_step))
    return [strategy for strategy in found if strategy]


Choice = tuple[int, int, int]
"""(scheme, replicas, s0); scheme -1 leaves `rank_step` ranks without work."""


def trace_table(
    lengths: Integers, *, world_size: int, cost: LengthCostModel, length_step: int, rank_step: int = 1
) -> tuple[Floats, dict[tuple[int, int], Choice]]:
    """Return t [ranks / rank_step + 1, lengths / length_step + 1], and what was chosen at each place."""
    if world_size % rank_step:
        raise UserError(f"rank_step={rank_step} does not divide the world of {world_size} ranks")
    steps = -(-int(lengths.max()) // length_step)
    ranks = world_size // rank_step
    ranges = [_range_cost(own, lengths, length_step, steps) for own in cost.schemes]
    t = np.full((ranks + 1, steps + 1), np.inf)
    t[:, 0] = 0.0
    choices: dict[tuple[int, int], Choice] = {}
    for n in range(1, ranks + 1):
        for s in range(1, steps + 1):
            best, chosen = float(t[n - 1, s]), (-1, 0, s)
            for k, own in enumerate(cost.schemes):
                g = own.scheme.ranks
                if min(s * length_step, int(lengths.max())) > own.cap_tokens:
                    continue
                for r in range(1, n * rank_step // g + 1):
                    if r * g % rank_step:
                        continue
                    below = t[n - r * g // rank_step, :s]
                    ends = np.maximum(below, ranges[k][:s, s] / r)
                    s0 = int(ends.argmin())
                    if ends[s0] < best * (1 - 1e-12):
                        best, chosen = float(ends[s0]), (k, r, s0)
            t[n, s] = best
            choices[n, s] = chosen
    return t, choices


def _range_cost(own: SchemeCost, lengths: Integers, length_step: int, steps: int) -> Floats:
    """Return [s0, s]: time of all sequences in (s0, s], and the longest of them for every further stage."""
    place = -(-lengths // length_step)
    each = own.times(lengths) + own.c
    work = np.concatenate(([0.0], np.cumsum(np.bincount(place, weights=each, minlength=steps + 1)[1:])))
    longest = np.zeros(steps + 1, dtype=np.int64)
    np.maximum.at(longest, place, lengths)
    table = np.zeros((steps + 1, steps + 1))
    for s in range(1, steps + 1):
        # Longest length that is present in (s0, s]: running maximum from s downwards.
        m = np.maximum.accumulate(longest[s:0:-1])[::-1]
        bubble = np.where(m > 0, own.times(m) + own.c, 0.0) * (own.scheme.pipeline - 1)
        table[:s, s] = work[s] - work[:s] + bubble
    return table


def _traced(
    choices: dict[tuple[int, int], Choice], n: int, s: int, schemes: Sequence[SchemeCost], rank_step: int
) -> Strategy:
    found: list[Scheme] = []
    while s > 0 and n > 0:
        k, r, s0 = choices[n, s]
        if k < 0:
            n -= 1
            continue
        found += [schemes[k].scheme] * r
        n, s = n - r * schemes[k].scheme.ranks // rank_step, s0
    return _sorted(found, schemes)


def _sorted(schemes: Sequence[Scheme], costs: Sequence[SchemeCost]) -> Strategy:
    caps = {own.scheme: own.cap_tokens for own in costs}
    return tuple(sorted(schemes, key=lambda scheme: (-caps[scheme], scheme)))


def candidate_strategies(cost: LengthCostModel, *, world_size: int, longest: int) -> list[Strategy]:
    """Return strategies of all ranks: up to two big replicas, up to four middle ones, else small ones.

    A big scheme holds the longest sequence; a strategy has at least one such replica.
    """
    found: dict[Strategy, None] = {}
    schemes = sorted(cost.schemes, key=lambda own: (-own.cap_tokens, own.scheme))
    for i, big in enumerate(schemes):
        for j, middle in enumerate(schemes[i:], start=i):
            for small in schemes[j:]:
                for num_big in range(BIG + 1):
                    for num_middle in range(MIDDLE + 1):
                        used = num_big * big.scheme.ranks + num_middle * middle.scheme.ranks
                        rest = world_size - used
                        if rest < 0 or rest % small.scheme.ranks:
                            continue
                        strategy = (
                            *[big.scheme] * num_big,
                            *[middle.scheme] * num_middle,
                            *[small.scheme] * (rest // small.scheme.ranks),
                        )
                        if max(cost.of(scheme).cap_tokens for scheme in strategy) >= longest:
                            found.setdefault(_sorted(strategy, cost.schemes))
    return list(found)


def propose(
    batches: Sequence[Integers],
    *,
    world_size: int,
    cost: LengthCostModel,
    candidates: Sequence[Strategy],
    first: Strategy | None = None,
    most: int = MOST_KEPT,
    bridge: Bridge = no_bridge,
) -> Proposal:
    """Return strategies selected by planning sampled batches: each added one shortens the mean step most.

    Args:
        batches: lengths of sampled global batches, about a dozen.
        world_size: ranks.
        cost: of all schemes.
        candidates: to select from.
        first: the strategy to begin with, the optimizer's own; none begins with the best single one.
        most: strategies at most.
        bridge: time that moving weights and gradients takes in each step, as in `plan_strategies`.

    Raises:
        UserError: no candidate holds all batches.
    """
    pool: list[Strategy] = [*([] if first is None else [first]), *candidates]
    every: list[Strategy] = list(dict.fromkeys(pool))
    if not every or not batches:
        raise UserError("a proposal needs candidates and batches; give at least one of each")
    longest = max(int(batch.max()) for batch in batches)
    if all(max(cost.of(scheme).cap_tokens for scheme in each) < longest for each in every):
        raise UserError(f"no candidate strategy holds the longest sequence of {longest:,} tokens")

    @cache
    def time(strategy: int, batch: int) -> float:
        given = batches[batch]
        if max(cost.of(scheme).cap_tokens for scheme in every[strategy]) < int(given.max()):
            return float("inf")
        return plan_strategies(
            given, world_size=world_size, cost=cost, strategies=[every[strategy]], bridge=bridge
        ).plan.cost

    bounds = np.stack([_bounds(strategy, batches, cost) + bridge(strategy) for strategy in every])
    best = np.full(len(batches), np.inf)
    kept: list[int] = []
    means: list[float] = []
    while len(kept) < min(most, len(every)):
        chosen = 0 if first is not None and not kept else _best_addition(best, bounds, time)
        together = np.minimum(best, [time(chosen, b) for b in range(len(batches))])
        if kept and float(together.mean()) > float(best.mean()) * (1 - LEAST_GAIN):
            break
        kept.append(chosen)
        means.append(float(together.mean()))
        best = together
    return Proposal(strategies=tuple(every[k] for k in kept), times=tuple(means), num_candidates=len(every))


def _bounds(strategy: Strategy, batches: Sequence[Integers], cost: LengthCostModel) -> Floats:
    """Return the lower bound of each batch, inf where it does not fit."""
    replicas = [cost.of(scheme) for scheme in strategy]
    most = max(own.cap_tokens for own in replicas)
    return np.array(
        [
            replicas_bound(np.sort(batch)[::-1], replicas).time if int(batch.max()) <= most else np.inf
            for batch in batches
        ]
    )


def _best_addition(best: Floats, bounds: Floats, time: Callable[[int, int], float]) -> int:
    """Return the candidate with the least mean of per-batch minima; bounds spare most of the planning."""
    hoped = np.minimum(best, bounds).mean(axis=1)
    chosen, least = int(hoped.argmin()), float("inf")
    for candidate in np.argsort(hoped, kind="stable").tolist():
        if hoped[candidate] >= least:
            break
        times = [
            time(candidate, b) if bounds[candidate, b] < best[b] else float("inf") for b in range(best.size)
        ]
        mean = float(np.minimum(best, times).mean())
        if mean < least:
            chosen, least = candidate, mean
    return chosen
