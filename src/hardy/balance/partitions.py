"""Cutting ranks into groups of powers of two, so that the slowest group of a slot is done soonest.

Paper: dynamic context parallelism as in Hydraulis (arXiv 2412.07894) and FlexSP (arXiv 2412.01523). A
*partition* counts groups of each scheme, the largest scheme first. All partitions of a few ranks are tried at
once; of many, a beam search walks from partition to partition by cutting groups in two or joining them.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from hardy.balance.assign import Problem, improve, longest_first
from hardy.balance.bounds import charged
from hardy.balance.cost import Floats, Integers, SchemeCost
from hardy.config import UserError

Partition = tuple[int, ...]
"""Groups of each scheme, the largest scheme first."""
MOST_PARTITIONS = 250
"""Above so many, not all are tried."""
WIDTH = 8
"""Partitions that the beam search keeps."""
PATIENCE = 2
"""Rounds of the beam search without gain after which it stops."""
AT_ONCE = (1, 2, 4, 8, 16)
"""Groups that are cut or joined in one step of the beam search."""


def count_partitions(num_ranks: int, sizes: Sequence[int]) -> int:
    """Return in how many ways groups of these sizes make up `num_ranks`.

    Example:
        >>> [count_partitions(n, [1 << k for k in range(n.bit_length())]) for n in (4, 8, 16, 32, 128)]
        [4, 10, 36, 202, 27338]
    """
    ways = [1] + [0] * num_ranks
    for size in sizes:
        for total in range(size, num_ranks + 1):
            ways[total] += ways[total - size]
    return ways[num_ranks]


def all_partitions(num_ranks: int, sizes: Sequence[int]) -> Iterator[Partition]:
    """Yield every partition, those with large groups first; `sizes` fall."""
    if not sizes:
        if num_ranks == 0:
            yield ()
        return
    for count in range(num_ranks // sizes[0], -1, -1):
        for rest in all_partitions(num_ranks - count * sizes[0], sizes[1:]):
            yield (count, *rest)


class GroupChooser:
    """Finds the groups of a slot and who takes what, for one set of schemes and ranks."""

    def __init__(self, schemes: Sequence[SchemeCost], *, num_ranks: int) -> None:
        """Take the schemes that groups may have, and the ranks that all groups together have.

        Raises:
            UserError: no groups of these schemes make up so many ranks.
        """
        self._schemes = sorted(schemes, key=lambda cost: -cost.scheme.ranks)
        self._sizes = [cost.scheme.ranks for cost in self._schemes]
        self._num_ranks = num_ranks
        self._few: list[Partition] | None = None
        number = count_partitions(num_ranks, self._sizes)
        if number == 0:
            raise UserError(f"groups of {self._sizes} ranks cannot make up a world of {num_ranks}")
        if number <= MOST_PARTITIONS:
            self._few = list(all_partitions(num_ranks, self._sizes))

    def choose(self, lengths: Integers) -> list[tuple[SchemeCost, Integers]] | None:
        """Return each group with the positions it takes; None where no partition that is tried holds them.

        Args:
            lengths: longest first, all of one slot.
        """
        times = self._table(lengths, [cost.times(lengths) for cost in self._schemes])
        spans = self._tried(times, lengths, room=[cost.cap_tokens for cost in self._schemes])
        best = min(spans, key=lambda partition: (spans[partition], partition))
        return None if spans[best] == np.inf else self._assigned(best, times, lengths)

    def promising(self, lengths: Integers, *, keep: int) -> Iterator[list[SchemeCost]]:
        """Yield the groups of the partitions that are soonest done where a group may pack many times.

        Args:
            lengths: longest first, all of one step.
            keep: at most so many partitions.
        """
        times = self._table(lengths, [charged(cost, lengths) for cost in self._schemes])
        spans = self._tried(times, lengths, room=[int(lengths.sum())] * len(self._schemes))
        for best in sorted(spans, key=lambda partition: (spans[partition], partition))[:keep]:
            if spans[best] < np.inf:
                kinds = zip(self._schemes, best, strict=True)
                yield [cost for cost, count in kinds for _ in range(count)]

    def _table(self, lengths: Integers, times: Sequence[Floats]) -> Floats:
        """Return the time of each sequence under each scheme, inf where it is too long."""
        fits = [lengths <= cost.cap_tokens for cost in self._schemes]
        return np.stack([np.where(fit, own, np.inf) for fit, own in zip(fits, times, strict=True)], axis=1)

    def _tried(self, times: Floats, lengths: Integers, *, room: Sequence[int]) -> dict[Partition, float]:
        """Return when the slowest group is done, for every partition that is tried."""
        if self._few is None:
            return self._beam(times, lengths, room)
        return dict(zip(self._few, self._makespans(self._few, times, lengths, room).tolist(), strict=True))

    def _assigned(
        self, partition: Partition, times: Floats, lengths: Integers
    ) -> list[tuple[SchemeCost, Integers]]:
        kinds = np.repeat(np.arange(len(partition)), partition)
        caps = np.array([cost.cap_tokens for cost in self._schemes], dtype=np.int64)
        problem = Problem(
            times=np.ascontiguousarray(times[:, kinds]),
            tokens=lengths,
            room=caps[kinds],
            bubbles=np.zeros(kinds.size, dtype=np.int64),
        )
        taken_by = longest_first(problem)
        assert taken_by is not None, "the partition was found to hold all"
        least = float(np.nanmin(times * np.array(self._sizes), axis=1).sum()) / self._num_ranks
        taken_by = improve(problem, taken_by, good_enough=max(least, float(times[0].min())))
        return [
            (self._schemes[int(kind)], np.flatnonzero(taken_by == group)) for group, kind in enumerate(kinds)
        ]

    def _makespans(
        self, partitions: Sequence[Partition], times: Floats, lengths: Integers, room: Sequence[int]
    ) -> Floats:
        """Return when the slowest group of each partition is done; inf where one cannot hold its share."""
        widest = max(sum(partition) for partition in partitions)
        kinds = np.full((len(partitions), widest), len(self._schemes), dtype=np.int64)
        for row, partition in enumerate(partitions):
            kinds[row, : sum(partition)] = np.repeat(np.arange(len(partition)), partition)
        caps = np.array([*room, -1], dtype=np.int64)
        padded = np.concatenate((times, np.full((lengths.size, 1), np.inf)), axis=1)
        load, left = np.zeros(kinds.shape), caps[kinds]
        flat_load, flat_left = load.reshape(-1), left.reshape(-1)
        row_starts = np.arange(len(partitions)) * widest
        for own, size in zip(padded, lengths.tolist(), strict=True):
            done = own[kinds]
            done += load
            done[left < size] = np.inf
            chosen = row_starts + done.argmin(axis=1)
            flat_load[chosen] = done.reshape(-1)[chosen]
            flat_left[chosen] -= size
        return load.max(axis=1)

    def _beam(self, times: Floats, lengths: Integers, room: Sequence[int]) -> dict[Partition, float]:
        """Return the partitions that the beam search meets, with their makespans."""
        known: dict[Partition, float] = {}
        beam, stale, best = list(self._starts(lengths)), 0, float("inf")
        while stale < PATIENCE:
            fresh = [partition for partition in dict.fromkeys(beam) if partition not in known]
            if not fresh:
                break
            known.update(zip(fresh, self._makespans(fresh, times, lengths, room).tolist(), strict=True))
            ranked = sorted(known, key=lambda partition: (known[partition], partition))[:WIDTH]
            stale = 0 if known[ranked[0]] < best else stale + 1
            best = known[ranked[0]]
            beam = [near for partition in ranked for near in self._neighbours(partition)]
        return known

    def _starts(self, lengths: Integers) -> Iterator[Partition]:
        """Yield equal groups of every size, alone and beside one group that holds the longest sequence."""
        needed = [k for k, cost in enumerate(self._schemes) if int(lengths[0]) <= cost.cap_tokens]
        for size in range(len(self._sizes)):
            for first in (None, *needed[-1:]):
                counts = [0] * len(self._sizes)
                left = self._num_ranks
                if first is not None and self._sizes[first] <= left:
                    counts[first] += 1
                    left -= self._sizes[first]
                for k in range(size, len(self._sizes)):
                    counts[k] += left // self._sizes[k]
                    left %= self._sizes[k]
                if left == 0:
                    yield tuple(counts)

    def _neighbours(self, partition: Partition) -> Iterator[Partition]:
        """Yield partitions in which some groups of one size are cut in two, or joined two by two."""
        for k in range(len(partition) - 1):
            parts = self._sizes[k] // self._sizes[k + 1]
            for number in AT_ONCE:
                counts = list(partition)
                if counts[k] >= number:
                    counts[k] -= number
                    counts[k + 1] += number * parts
                    yield tuple(counts)
                counts = list(partition)
                if counts[k + 1] >= number * parts:
                    counts[k + 1] -= number * parts
                    counts[k] += number
                    yield tuple(counts)


def cut_evenly(lengths: Integers, num_chunks: int) -> list[slice]:
    """Return runs of sequences with the largest number of tokens in a run as small as it can be.

    Example:
        >>> cut_evenly(np.array([5, 4, 3, 2, 1]), 2)
        [slice(0, 2, None), slice(2, 5, None)]
    """
    ends = np.cumsum(lengths)
    low, high = int(lengths.max()), int(ends[-1])
    while low < high:
        middle = (low + high) // 2
        if len(_runs(ends, middle)) <= num_chunks:
            high = middle
        else:
            low = middle + 1
    return _runs(ends, low)


def _runs(ends: Integers, most_tokens: int) -> list[slice]:
    """Return runs of at most so many tokens, each as long as can be."""
    runs: list[slice] = []
    start, taken = 0, 0
    while start < ends.size:
        stop = int(np.searchsorted(ends, taken + most_tokens, side="right"))
        runs.append(slice(start, stop))
        start, taken = stop, int(ends[stop - 1])
    return runs
