"""Which tokens of a pack each worker of a group computes, from lengths alone.

Paper: Hydraulis (arXiv 2412.07894), whose groups share micro-batches of documents; how a group cuts them is
ours: a long document is cut into 2 G pieces and each of the G workers takes one piece from its front and one
from its back, so that all see equally many pairs of query and key. A short one stays whole on one worker.

Letters: G workers of a group, d the number of a cut document, s its tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heapreplace

import numpy as np
import torch
from numpy.typing import NDArray

from hardy.ops.packed import runs

Integers = NDArray[np.int64]

SHARDINGS_KEPT = 1024


@dataclass(frozen=True)
class Pieces:
    """Runs of tokens of cut documents on one worker, in the order of its rows: the fronts, then the backs."""

    documents: Integers
    """Document of each piece, by its place in the pack."""
    starts: Integers
    """First token of each piece, within its document."""
    stops: Integers
    """One past the last."""
    num_fronts: int
    """How many of the pieces are of the front halves; there and behind no document occurs twice."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all pieces."""
        return int((self.stops - self.starts).sum())


@dataclass(frozen=True)
class Sharding:
    """Who computes what of one pack; the same on every worker of the group."""

    lengths: tuple[int, ...]
    """Tokens of each document of the pack."""
    pieces: tuple[Pieces, ...]
    """Of each worker, the pieces of cut documents."""
    whole: tuple[Integers, ...]
    """Of each worker, the documents it has to itself."""

    @property
    def num_workers(self) -> int:
        """G."""
        return len(self.pieces)

    @property
    def shared_rows(self) -> int:
        """Rows that each worker shows the others: its pieces, filled up to those of the fullest worker."""
        return max(pieces.num_tokens for pieces in self.pieces)


@lru_cache(maxsize=SHARDINGS_KEPT)
def shard_documents(lengths: tuple[int, ...], *, num_workers: int, split_tokens: int) -> Sharding:
    """Return who computes what of a pack.

    Documents of at least `2 * num_workers * split_tokens` tokens are cut at floor(i s / 2G), i = 0 ... 2G;
    piece i goes to worker (min(i, 2G - 1 - i) + d) mod G, where d spreads what rounding leaves. Any length
    will do, and empty pieces are left out. The other documents go whole, the longest first, to the worker
    that has the fewest tokens.

    Args:
        lengths: tokens of each document, all positive.
        num_workers: G.
        split_tokens: least tokens of a piece; 0 cuts every document.

    Example:
        >>> sharding = shard_documents((8, 1), num_workers=2, split_tokens=2)
        >>> [(pieces.starts.tolist(), pieces.stops.tolist()) for pieces in sharding.pieces]
        [([0, 6], [2, 8]), ([2, 4], [4, 6])]
        >>> [documents.tolist() for documents in sharding.whole]
        [[1], []]
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"a pack needs documents of at least one token, got lengths {list(lengths)}")
    if num_workers < 1 or split_tokens < 0:
        raise ValueError(
            f"num_workers must be at least 1 and split_tokens at least 0, got {num_workers} and "
            f"{split_tokens}"
        )
    array = np.asarray(lengths, dtype=np.int64)
    cut = (array >= 2 * num_workers * split_tokens) & (num_workers > 1)
    pieces = tuple(_pieces(array, np.flatnonzero(cut), worker, num_workers) for worker in range(num_workers))
    whole = _whole(array, np.flatnonzero(~cut), [piece.num_tokens for piece in pieces])
    return Sharding(lengths=tuple(lengths), pieces=pieces, whole=whole)


def _pieces(lengths: Integers, cut: Integers, worker: int, num_workers: int) -> Pieces:
    """Return the pieces of the cut documents that `worker` takes."""
    front = (
        worker - np.arange(cut.size)
    ) % num_workers  # of document d, the piece i with (i + d) mod G = worker
    back = 2 * num_workers - 1 - front
    bounds = [
        lengths[cut] * (place + step) // (2 * num_workers) for place in (front, back) for step in (0, 1)
    ]
    starts, stops = np.concatenate(bounds[0::2]), np.concatenate(bounds[1::2])
    there = stops > starts
    return Pieces(
        documents=np.concatenate((cut, cut))[there],
        starts=starts[there],
        stops=stops[there],
        num_fronts=int(there[: cut.size].sum()),
    )


def _whole(lengths: Integers, documents: Integers, loads: list[int]) -> tuple[Integers, ...]:
    """Deal documents out, the longest first, each to the worker with the fewest tokens so far."""
    taken: list[list[int]] = [[] for _ in loads]
    queue = [(load, worker) for worker, load in enumerate(loads)]
    heapify(queue)
    order = documents[np.argsort(-lengths[documents], kind="stable")]
    for document, tokens in zip(order.tolist(), lengths[order].tolist(), strict=True):
        load, worker = queue[0]
        heapreplace(queue, (load + tokens, worker))
        taken[worker].append(document)
    return tuple(np.array(sorted(mine), dtype=np.int64) for mine in taken)


@dataclass(frozen=True)
class SharedRuns:
    """Where pieces lie when the shared rows of all workers stand end to end; in the order of the pack."""

    tokens: Integers
    """Place in the pack of each piece's first token, growing."""
    rows: Integers
    """Row of that token."""
    sizes: Integers
    """Tokens of each piece."""

    def up_to(self, begins: Integers, ends: Integers) -> tuple[Integers, Integers]:
        """Return the rows of some cut documents from their beginning to an end of a piece, as runs of rows.

        Args:
            begins: place in the pack of each document's first token.
            ends: one past the last token that is asked for, in the pack.

        Returns:
            The first row and the size of each run, end to end.
        """
        first, stop = np.searchsorted(self.tokens, begins), np.searchsorted(self.tokens, ends)
        pieces = ranges(first, stop)
        return self.rows[pieces], self.sizes[pieces]


def shared_runs(sharding: Sharding) -> SharedRuns:
    """Return where each piece of a cut document lies among all workers' shared rows."""
    begins, shared = begins_of(sharding.lengths), sharding.shared_rows
    first_tokens = [begins[pieces.documents] + pieces.starts for pieces in sharding.pieces]
    sizes = [pieces.stops - pieces.starts for pieces in sharding.pieces]
    first_rows = [np.cumsum(own) - own + worker * shared for worker, own in enumerate(sizes)]
    tokens = np.concatenate(first_tokens)
    order = np.argsort(tokens)
    return SharedRuns(
        tokens=tokens[order], rows=np.concatenate(first_rows)[order], sizes=np.concatenate(sizes)[order]
    )


def begins_of(lengths: Sequence[int]) -> Integers:
    """Return where each document of a pack begins, and where the last ends."""
    return np.concatenate(([0], np.cumsum(lengths)))


def ranges(starts: Sequence[int] | Integers, stops: Sequence[int] | Integers) -> Integers:
    """Return the numbers from each start to before each stop, end to end.

    Example:
        >>> ranges([5, 0], [7, 3]).tolist()
        [5, 6, 0, 1, 2]
    """
    starts, stops = np.asarray(starts, dtype=np.int64), np.asarray(stops, dtype=np.int64)
    return runs(torch.from_numpy(starts), torch.from_numpy(stops - starts)).numpy()
