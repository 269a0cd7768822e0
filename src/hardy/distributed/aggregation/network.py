"""Batcher's comparator network: which pairs of rows to compare so that the wanted places are right.

Minimum and maximum of whole rows cost a small part of a sort of every column. Both pass NaN on to both sides,
so rows must be finite. Letters: n rows, p, q, r, d as in the usual statement of the merge exchange sort.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

MOST_ROWS = 64
"""Above so many rows a sort of each column is as fast."""


@cache
def comparators(num_rows: int, kinds: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return the pairs (i, j), i < j, that are to be put in order, one after the other.

    Args:
        num_rows: n.
        kinds: one number per place; places of equal kind may trade what a full sort would put there.

    Example:
        >>> [len(comparators(n, tuple(range(n)))) for n in (4, 8, 16, 32)]
        [5, 19, 63, 191]
        >>> middle = (0,) * 7 + (1, 1) + (0,) * 7
        >>> len(comparators(16, middle)), len(comparators(16, (0,) * 16))
        (52, 0)
    """
    kind_of, kept, fresh = list(kinds), [], max(kinds) + 1
    for i, j in reversed(_all_comparators(num_rows)):
        if kind_of[i] == kind_of[j]:  # whatever comes later does not tell them apart
            continue
        kept.append((i, j))
        kind_of[i] = kind_of[j] = fresh
        fresh += 1
    return tuple(reversed(kept))


def _all_comparators(num_rows: int) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    top = 1 << max((num_rows - 1).bit_length() - 1, 0)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(num_rows - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    return pairs


def sort_rows(rows_nc: Tensor, kinds: Sequence[int]) -> list[Tensor]:
    """Return rows that hold the sorted values of each column, but for trades within a kind; overwrites.

    Args:
        rows_nc: [n, c], finite.
        kinds: one number per place, see `comparators`.

    Example:
        >>> rows = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0]])
        >>> sort_rows(rows, [0, 1, 0])[1]
        tensor([2., 2.])
    """
    num_rows = rows_nc.shape[0]
    if num_rows > MOST_ROWS:
        return list(rows_nc.sort(dim=0).values)
    rows, spare = list(rows_nc), torch.empty_like(rows_nc[0])
    for i, j in comparators(num_rows, tuple(kinds)):
        torch.minimum(rows[i], rows[j], out=spare)
        torch.maximum(rows[i], rows[j], out=rows[j])
        rows[i], spare = spare, rows[i]
    return rows


def sort_rows_around(rows_nc: Tensor, begin: int, end: int) -> list[Tensor]:
    """Return rows `begin` to `end` - 1 of the sorted columns, in no order among themselves; overwrites."""
    kinds = [int(begin <= place < end) for place in range(len(rows_nc))]
    return sort_rows(rows_nc, kinds)[begin:end]
