"""Which documents make each global batch: a function of lengths, settings and the epoch, of nothing else.

Paper: Hydraulis (arXiv 2412.07894), which balances without touching what a batch holds: neither the number of
ranks nor a plan has a say in it. Where batches are levelled, the predicted times of documents have.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from hardy.balance.cost import Floats, Integers
from hardy.balance.lengths import token_batches
from hardy.balance.level import level_batches
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
    delay_steps: int = 0
    """Most batches by which a document may come later or sooner than it was drawn, so that batches take about
    as long; 0 leaves them as drawn. A smaller batch at the end of an epoch stays as it is."""

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
        if self.delay_steps < 0:
            raise UserError(f"batching.delay_steps must be at least 0, got {self.delay_steps}")


class GlobalBatches:
    """The global batches of every epoch.

    Args:
        lengths: tokens of each document.
        batching: what a batch holds.
        times: predicted time of each document, by which batches are levelled where `delay_steps` is above 0.

    Raises:
        UserError: no documents, one without tokens, too few of them for one batch, or no times to level by.

    Example:
        >>> batches = GlobalBatches([5, 3, 2], Batching(sequences=2))
        >>> [batch.size for batch in batches.of(0)], sorted(np.concatenate(batches.of(0)).tolist())
        ([2, 1], [0, 1, 2])
    """

    def __init__(
        self, lengths: Sequence[int] | Integers, batching: Batching, *, times: Floats | None = None
    ) -> None:
        self.lengths: Integers = np.array(lengths, dtype=np.int64)
        self.batching = batching
        if self.lengths.ndim != 1 or not self.lengths.size or int(self.lengths.min()) < 1:
            raise UserError("lengths need at least one document, and at least one token in each")
        self._times = times
        if batching.delay_steps and (times is None or times.shape != self.lengths.shape):
            raise UserError(
                f"batching.delay_steps={batching.delay_steps} levels batches by predicted times; give one "
                f"for each of the {self.lengths.size} documents, or set it to 0"
            )
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
        if self._times is not None and self.batching.delay_steps:
            told += self._times.tobytes()
        return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big") >> 1

    def _of_epoch(self, epoch: int) -> list[Integers]:
        count, size = self.lengths.size, self.batching.sequences
        order = numpy_generator_for(self.batching.seed, "global batches", epoch).permutation(count)
        if size is not None:
            full = [order[start : start + size] for start in range(0, count - count % size, size)]
        else:
            assert self.batching.tokens is not None, "checked where it was made"
            places = token_batches(self.lengths[order], budget_tokens=self.batching.tokens)
            full = [order[own] for own in places]
        rest = order[sum(batch.size for batch in full) :]
        kept = [rest] if rest.size and self.batching.last == "keep" else []
        return [*self._levelled(full), *kept]

    def _levelled(self, batches: list[Integers]) -> list[Integers]:
        """Return full batches of about equal predicted time, where that was asked for."""
        own = self.batching
        if self._times is None or not own.delay_steps:
            return batches
        sizes = self.lengths if own.sequences is None else np.ones_like(self.lengths)
        room = own.sequences or own.tokens or 0
        return level_batches(batches, self._times, sizes, room=room, delay_steps=own.delay_steps)
