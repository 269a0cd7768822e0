"""Which documents make each global batch: a function of lengths, settings and the epoch, of nothing else.

Paper: Hydraulis (arXiv 2412.07894), which balances without touching what a batch holds: neither the number of
ranks nor a plan has a say in it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from hardy.balance.cost import Integers
from hardy.balance.lengths import token_batches
from hardy.config import UserError
from hardy.rng import numpy_generator_for


@dataclass(frozen=True, kw_only=True)
class Batching:
    """What a global batch holds. Each epoch draws a new order of documents and takes each of them once."""

    sequences: int | None = None
    """Documents of a global batch."""
    tokens: int | None = None
    """Instead, the most tokens of one; then epochs differ in their number of batches. A document that would
    go over it opens the next batch, and one that is longer has a batch to itself."""
    last: Literal["keep", "drop"] = "keep"
    """Whether what is left at the end of an epoch makes a smaller batch, or is left out of this epoch."""
    seed: int = 0
    """Of the order of documents."""

    def __post_init__(self) -> None:
        """Refuse batches of no size, or of two."""
        given = [size for size in (self.sequences, self.tokens) if size is not None]
        if len(given) != 1 or given[0] < 1:
            raise UserError(
                f"a global batch needs one of batching.sequences and batching.tokens, at least 1; got "
                f"sequences={self.sequences} and tokens={self.tokens}"
            )
        if self.last not in ("keep", "drop"):
            raise UserError(f"batching.last must be keep or drop, got {self.last!r}")


class GlobalBatches:
    """The global batches of every epoch.

    Args:
        lengths: tokens of each document.
        batching: what a batch holds.

    Raises:
        UserError: no documents, one without tokens, or too few of them for one batch.

    Example:
        >>> batches = GlobalBatches([5, 3, 2], Batching(sequences=2))
        >>> [batch.size for batch in batches.of(0)], sorted(np.concatenate(batches.of(0)).tolist())
        ([2, 1], [0, 1, 2])
    """

    def __init__(self, lengths: Sequence[int] | Integers, batching: Batching) -> None:
        self.lengths: Integers = np.array(lengths, dtype=np.int64)
        self.batching = batching
        if self.lengths.ndim != 1 or not self.lengths.size or int(self.lengths.min()) < 1:
            raise UserError("lengths need at least one document, and at least one token in each")
        self.of = lru_cache(maxsize=2)(self._of_epoch)
        """Returns the batches of an epoch, as indices of documents; two epochs are kept."""
        if not self.of(0):
            raise UserError(
                f"{self.lengths.size} documents do not fill one global batch of batching.sequences="
                f"{batching.sequences}, tokens={batching.tokens}; lower it, or set batching.last to keep"
            )

    def hash(self) -> int:
        """Return 63 bits that differ where lengths or settings differ."""
        told = repr((self.batching, self.lengths.size)).encode() + self.lengths.tobytes()
        return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big") >> 1

    def _of_epoch(self, epoch: int) -> list[Integers]:
        count, size, keep = self.lengths.size, self.batching.sequences, self.batching.last == "keep"
        order = numpy_generator_for(self.batching.seed, "global batches", epoch).permutation(count)
        if size is not None:
            end = count if keep else count - count % size
            return [order[start : min(start + size, end)] for start in range(0, end, size)]
        assert self.batching.tokens is not None, "checked where it was made"
        full = [order[own] for own in token_batches(self.lengths[order], budget_tokens=self.batching.tokens)]
        return [*full, order[sum(batch.size for batch in full) :]] if keep else full
