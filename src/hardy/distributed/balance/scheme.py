"""Which of the two ways a group shares its attention: from the model's heads and the bytes each would send.

gather sends keys and values of cut documents to all workers of the group, so it grows with the group; ulysses
sends every row's queries, keys, values and outputs once, but each worker needs heads of its own.
"""

from dataclasses import dataclass
from math import gcd
from typing import Literal

from hardy.config import ConfigError, unknown_name
from hardy.distributed import costs
from hardy.distributed.balance.attention import check_heads
from hardy.distributed.balance.layouts import ShardedLayout, gather_layout, ulysses_layout
from hardy.distributed.balance.sharding import shard_documents
from hardy.distributed.comm import Communicator

Scheme = Literal["gather", "ulysses"]
SCHEMES: tuple[Scheme, ...] = ("gather", "ulysses")


@dataclass(frozen=True, kw_only=True)
class Sharer:
    """How groups share micro-batches, for a model with so many heads."""

    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads."""
    scheme: Literal["auto", "gather", "ulysses"] = "auto"
    """gather shows every worker the keys and values of cut documents, ulysses gives each worker some heads of
    all tokens; auto takes for each micro-batch the one that sends less."""
    split_tokens: int = 128
    """Least tokens of a piece: gather leaves documents of fewer than 2 G times as many whole."""

    def __post_init__(self) -> None:
        if self.scheme not in ("auto", *SCHEMES):
            raise ConfigError(f"scheme: {unknown_name(self.scheme, 'scheme', ['auto', *SCHEMES])}")
        if self.split_tokens < 0:
            raise ConfigError(
                f"split_tokens must be at least 0, got {self.split_tokens}; 0 cuts every document"
            )

    def layout(self, lengths: tuple[int, ...], group: Communicator) -> ShardedLayout:
        """Return this worker's rows of a pack; the same choice on all workers of the group.

        Raises:
            UserError: ulysses was asked for, and the heads do not divide by the workers.
        """
        scheme = self.choose(lengths, num_workers=group.size)
        if scheme == "gather":
            return gather_layout(lengths, group, split_tokens=self.split_tokens)
        check_heads(self.num_heads, num_workers=group.size)
        return ulysses_layout(lengths, group)

    def choose(self, lengths: tuple[int, ...], *, num_workers: int) -> Scheme:
        """Return the scheme of one micro-batch.

        Example:
            >>> many_heads, shared_keys = (Sharer(num_heads=32, num_kv_heads=n) for n in (32, 8))
            >>> [s.choose((8192,), num_workers=4) for s in (many_heads, shared_keys)]
            ['ulysses', 'gather']
        """
        if self.scheme != "auto":
            return self.scheme
        if self.num_heads % num_workers:
            return "gather"
        sent = {scheme: self.heads_sent(scheme, lengths, num_workers=num_workers) for scheme in SCHEMES}
        return min(SCHEMES, key=lambda scheme: sent[scheme])

    def heads_sent(self, scheme: Scheme, lengths: tuple[int, ...], *, num_workers: int) -> int:
        """Return the heads that a worker sends in the forward pass of one layer; the backward's are as many.

        Times head size and bytes of an element these are bytes.
        """
        if scheme == "gather":
            sharding = shard_documents(lengths, num_workers=num_workers, split_tokens=self.split_tokens)
            return costs.all_gather(2 * self.num_kv_heads * sharding.shared_rows, num_workers).bytes_sent
        run = -(-sum(lengths) // num_workers)
        kv_heads = self.num_kv_heads * num_workers // gcd(num_workers, self.num_kv_heads)
        there = costs.all_to_all(run * (self.num_heads + 2 * kv_heads), num_workers)
        return there.bytes_sent + costs.all_to_all(run * self.num_heads, num_workers).bytes_sent
