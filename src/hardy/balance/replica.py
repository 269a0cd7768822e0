"""Packing inside a replica: how many micro-batches, and which sequence goes into which.

Paper: Hydraulis (arXiv 2412.07894), the second of its two stages. Letters: v micro-batches; T(v) = sum of all
+ (stages - 1) x the slowest (E1).
"""

from collections.abc import Iterator

import numpy as np

from hardy.balance.assign import Problem, equal_takers, finish_times, improve, longest_first
from hardy.balance.cost import Floats, Integers, SchemeCost
from hardy.balance.plan import stage_time
from hardy.config import UserError

TRIED = 16
"""Numbers of micro-batches that are tried."""


def pack_replica(lengths: Integers, cost: SchemeCost, *, num_packs: int | None = None) -> list[Integers]:
    """Return the micro-batches of one replica as positions in `lengths`, most tokens first.

    Among several numbers of packs the one with the least time is taken; without a pipeline that is the least
    number that is found, since every pack costs its constant and balance between packs gains nothing. In a
    pipeline the smallest packs stand at both ends.

    Args:
        lengths: longest first; each at most the cap.
        cost: of the replica's scheme.
        num_packs: exactly so many, some perhaps empty; none chooses.

    Raises:
        UserError: the sequences do not fit into `num_packs`.
    """
    times = cost.times(lengths)
    if num_packs is not None:
        taken_by = _packed(lengths, times, cost, num_packs)
        if taken_by is None:
            enough = -(-int(lengths.sum()) // num_packs) + int(lengths[0])
            raise UserError(
                f"{lengths.size} sequences of {int(lengths.sum())} tokens do not fit into {num_packs} "
                f"micro-batches of {cost.cap_tokens} tokens; take more of them, or a cap of {enough} tokens"
            )
        return _ordered(lengths, taken_by, num_packs, pipeline=cost.scheme.pipeline)
    best: tuple[float, int, Integers] | None = None
    for count in _counts(lengths, cost):
        taken_by = _packed(lengths, times, cost, count)
        if taken_by is None:
            continue
        loads = np.bincount(taken_by, weights=times, minlength=count) + cost.c
        total = stage_time(loads.tolist(), pipeline=cost.scheme.pipeline)
        if best is None or total < best[0]:
            best = (total, count, taken_by)
        if cost.scheme.pipeline == 1:
            break
    assert best is not None, "one sequence a pack always fits"
    return _ordered(lengths, best[2], best[1], pipeline=cost.scheme.pipeline)


def _counts(lengths: Integers, cost: SchemeCost) -> Iterator[int]:
    """Yield numbers of packs to try, few first; the last is one for each sequence, which always fits."""
    total, most = int(lengths.sum()), int(lengths.size)
    halves = int(np.count_nonzero(2 * lengths > cost.cap_tokens))
    least = max(1, -(-total // cost.cap_tokens), halves)
    if cost.scheme.pipeline == 1:
        yield from range(least, most + 1)
        return
    last = min(most, max(least, total // cost.util_tokens), least + TRIED - 1)
    yield from range(least, last + 1)
    if last < most:
        fitted = first_fit(lengths, capacity_tokens=cost.cap_tokens)
        yield int(fitted.max()) + 1


def _packed(lengths: Integers, times: Floats, cost: SchemeCost, count: int) -> Integers | None:
    """Return the pack of each sequence, or None where they are not found to fit into `count`."""
    bubble = cost.scheme.pipeline - 1
    problem = equal_takers(times, lengths, num_takers=count, room=cost.cap_tokens)
    taken_by = longest_first(problem)
    if taken_by is None:
        taken_by = _by_tokens(lengths, problem, count)
    if taken_by is None or not bubble:
        return taken_by
    least = max(float(times[0]), float(times.sum()) / count)
    better = improve(problem, taken_by, good_enough=least)
    return (
        better if finish_times(problem, better).max() <= finish_times(problem, taken_by).max() else taken_by
    )


def _by_tokens(lengths: Integers, problem: Problem, count: int) -> Integers | None:
    """Return the packs of first fit, else of best fit, by tokens; None if either needs more than `count`."""
    cap = int(problem.room[0])
    for fit in (first_fit, best_fit):
        taken_by = fit(lengths, capacity_tokens=cap)
        if int(taken_by.max()) < count:
            return taken_by
    return None


def first_fit(lengths: Integers, *, capacity_tokens: int) -> Integers:
    """Return the pack of each sequence: in order, each into the first pack with room.

    Example:
        >>> first_fit(np.array([4, 3, 2, 1]), capacity_tokens=5).tolist()
        [0, 1, 1, 0]
    """
    left: Integers = np.full(lengths.size, capacity_tokens, dtype=np.int64)
    packs = np.empty(lengths.size, dtype=np.int64)
    for i, size in enumerate(lengths.tolist()):
        packs[i] = pack = int((left >= size).argmax())
        left[pack] -= size
    return packs


def best_fit(lengths: Integers, *, capacity_tokens: int) -> Integers:
    """Return the pack of each sequence: in order, each into the fullest pack with room.

    Example:
        >>> best_fit(np.array([4, 3, 2, 1]), capacity_tokens=6).tolist()
        [0, 1, 0, 1]
    """
    left: Integers = np.full(lengths.size, capacity_tokens, dtype=np.int64)
    packs = np.empty(lengths.size, dtype=np.int64)
    for i, size in enumerate(lengths.tolist()):
        room = np.where(left >= size, left, capacity_tokens + 1)
        packs[i] = pack = int(room.argmin())
        left[pack] -= size
    return packs


def _ordered(lengths: Integers, taken_by: Integers, count: int, *, pipeline: int) -> list[Integers]:
    """Return the packs, most tokens first; in a pipeline, which fills and drains, small ones at the ends."""
    packs = [np.flatnonzero(taken_by == pack) for pack in range(count)]
    packs.sort(key=lambda pack: -int(lengths[pack].sum()))
    return packs if pipeline == 1 else [*packs[1::2][::-1], *packs[::2]]
