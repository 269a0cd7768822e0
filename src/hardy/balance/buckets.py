"""Planning by buckets of lengths, as FlexSP does: every sequence counts as long as its bucket's edge.

Paper: FlexSP (arXiv 2412.01523). Fewer different lengths make its integer program small enough to solve. Here
they go to our own planner, so what is left of the difference to `plan` is what the buckets cost.
"""

from collections.abc import Sequence

import numpy as np

from hardy.balance.cost import Integers, LengthCostModel
from hardy.balance.plan import Objective, Plan, step_time
from hardy.balance.planner import finished, lay_out, lower_bound, plan, sort_lengths
from hardy.config import UserError

BUCKETS = 16
"""Of FlexSP's solver."""


def bucketed_groups(
    lengths: Sequence[int] | Integers,
    *,
    world_size: int,
    cost: LengthCostModel,
    objective: Objective = "lock_step",
    num_buckets: int = BUCKETS,
) -> Plan:
    """Return the plan that `plan` makes where it sees bucket edges only; its times are those of the lengths.

    Args:
        lengths: tokens of each sequence of the global batch, in any order.
        world_size: ranks.
        cost: what sequences cost; its context-parallel schemes are what groups may be.
        objective: whether ranks meet in every slot or once a step.
        num_buckets: different lengths that the planner sees.

    Raises:
        UserError: as `plan` and `bucket_edges`.
    """
    tokens, order = sort_lengths(lengths)
    given = np.asarray(lengths, dtype=np.int64)
    edges = bucket_edges(given, num_buckets)
    seen = edges[np.searchsorted(edges, given)]
    made = plan(seen, world_size=world_size, cost=cost, objective=objective)

    place = np.argsort(order)
    work = [
        [(cost.of(batch.group.scheme), np.sort(place[list(batch.sequences)])) for batch in slot]
        for slot in made.slots
    ]
    slots = lay_out(work, tokens, order)
    bound = lower_bound(tokens, cost.context_schemes(world_size), world_size=world_size, objective=objective)
    time = step_time(slots, objective)
    return finished(slots, bound, order, world_size=world_size, objective=objective, cost=time)


def bucket_edges(lengths: Integers, num_buckets: int) -> Integers:
    """Return the upper edges, rising, of the buckets that lengthen sequences least if all take their edge.

    Each edge is one of the lengths; where there are no more different ones than buckets, these are the edges.

    Raises:
        UserError: fewer than one bucket.

    Example:
        >>> bucket_edges(np.array([1, 2, 9, 10, 10]), 2).tolist()
        [2, 10]
    """
    if num_buckets < 1:
        raise UserError(f"num_buckets={num_buckets} must be at least 1")
    different, counts = np.unique(lengths, return_counts=True)
    if different.size <= num_buckets:
        return different
    number = np.concatenate(([0], np.cumsum(counts)))
    total = np.concatenate(([0], np.cumsum(counts * different)))
    # added[i, j]: tokens that lengths i to j gain in one bucket, whose edge is length j; inf where i > j
    added = different * (number[1:] - number[:-1, None]) - (total[1:] - total[:-1, None])
    added = np.where(np.arange(different.size)[:, None] <= np.arange(different.size), added, np.inf)
    best = added[0]
    cuts: list[Integers] = []
    for _ in range(num_buckets - 1):
        whole = best[:-1, None] + added[1:]  # the last bucket begins at length i + 1
        cuts.append(whole.argmin(axis=0))
        best = whole.min(axis=0)
    edges, end = [different.size - 1], different.size - 1
    for cut in reversed(cuts):
        end = int(cut[end])
        edges.append(end)
    return different[edges[::-1]]
