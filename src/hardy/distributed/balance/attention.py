"""Attention over a pack whose rows lie on several workers; exact, whatever the cut.

Papers: Hydraulis (arXiv 2412.07894) regroups workers for documents of mixed length; DeepSpeed-Ulysses (arXiv
2309.14509) is the exchange of heads. `context_parallel_attention` is a `PackedAttention`: a model takes it in
place of `packed_attention`, and the layout that comes with a batch decides what happens.

Shape suffixes: T rows of this worker, P rows of the whole pack, N rows of keys, H heads, h heads of one
worker, K head size, G workers.
"""

from collections.abc import Callable
from math import gcd
from typing import cast

import torch
from torch import Tensor

from hardy.config import UserError
from hardy.distributed.balance.exchange import gather_rows, swap_heads
from hardy.distributed.balance.layouts import GatherLayout, UlyssesLayout
from hardy.ops.attention import Backend, packed_attention
from hardy.ops.attention_backends import CAUSAL, AttentionRule
from hardy.ops.packed import Borders, DocumentLayout


def _outside_graphs(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what torch.compile leaves out of its graphs; torch does not say of which type it is."""
    return cast("Callable[..., Tensor]", torch.compiler.disable(function))


@_outside_graphs
def context_parallel_attention(
    query_THK: Tensor,
    key_THK: Tensor,
    value_THK: Tensor,
    queries: DocumentLayout,
    *,
    keys: Borders | None = None,
    rule: AttentionRule = CAUSAL,
    backend: Backend = "auto",
) -> Tensor:
    """Attend within each document, wherever its tokens lie.

    With the layout of a sharded pack all workers of its group call this together; with a plain layout it is
    `packed_attention`. Left out of torch.compile's graphs as that is.

    Args:
        query_THK: queries of this worker's rows.
        key_THK: keys of the same rows, turned by their positions.
        value_THK: values of the same rows.
        queries: the worker's rows, a `GatherLayout`, a `UlyssesLayout` or a plain layout.
        keys: with a plain layout only: borders among the keys.
        rule: who sees whom within a document.
        backend: what computes the attention on each worker.

    Returns:
        The output of this worker's rows, shape and dtype of the queries.

    Raises:
        UserError: the heads do not divide by the workers (ulysses), or a rule that is not causal (gather).
    """
    if isinstance(queries, GatherLayout):
        return _gathered(query_THK, key_THK, value_THK, queries, rule=rule, backend=backend)
    if isinstance(queries, UlyssesLayout):
        return _exchanged(query_THK, key_THK, value_THK, queries, rule=rule, backend=backend)
    return packed_attention(query_THK, key_THK, value_THK, queries, keys=keys, rule=rule, backend=backend)


def _gathered(
    query_THK: Tensor,
    key_THK: Tensor,
    value_THK: Tensor,
    layout: GatherLayout,
    *,
    rule: AttentionRule,
    backend: Backend,
) -> Tensor:
    """Gather keys and values; each piece of queries stands at the end of the keys it looks at."""
    if not rule.causal:
        raise UserError(
            "context parallelism by scheme='gather' gathers for each piece the keys before its end, so it "
            "needs causal attention; use scheme='ulysses'"
        )
    looked_at_N2HK = gather_rows(torch.stack((key_THK, value_THK), dim=1), layout)
    key_NHK, value_NHK = looked_at_N2HK.unbind(1)
    return packed_attention(
        query_THK, key_NHK, value_NHK, layout, keys=layout.keys, rule=rule, backend=backend
    )


def _exchanged(
    query_THK: Tensor,
    key_THK: Tensor,
    value_THK: Tensor,
    layout: UlyssesLayout,
    *,
    rule: AttentionRule,
    backend: Backend,
) -> Tensor:
    """Exchange rows for heads, attend over the whole pack with some heads, exchange back."""
    group = layout.group
    check_heads(query_THK.shape[1], num_workers=group.size)
    # Heads of keys that do not divide by the workers are repeated until they do: some workers share one.
    repeats = group.size // gcd(group.size, key_THK.shape[1])
    if repeats > 1:
        key_THK, value_THK = (x.repeat_interleave(repeats, dim=1) for x in (key_THK, value_THK))
    parts_GThK = [_by_worker(x, group.size) for x in (query_THK, key_THK, value_THK)]
    heads = [part.shape[2] for part in parts_GThK]
    all_rows_PhK = swap_heads(torch.cat(parts_GThK, dim=2), group).flatten(0, 1)
    query, key, value = all_rows_PhK.split_with_sizes(heads, dim=1)
    out_PhK = packed_attention(query, key, value, layout.whole, rule=rule, backend=backend)
    out_GThK = swap_heads(out_PhK.unflatten(0, (group.size, -1)), group)
    return out_GThK.transpose(0, 1).flatten(1, 2)


def check_heads(num_heads: int, *, num_workers: int) -> None:
    """Refuse heads that cannot be dealt out evenly."""
    if num_heads % num_workers:
        raise UserError(
            f"context parallelism by scheme='ulysses' gives each worker of a group equally many heads, and "
            f"{num_heads} query heads do not divide by {num_workers} workers; use scheme='gather' or 'auto', "
            f"or smaller groups"
        )


def _by_worker(x_THK: Tensor, num_workers: int) -> Tensor:
    """Return the heads of each worker, (G, T, h, K)."""
    return x_THK.unflatten(1, (num_workers, -1)).transpose(0, 1)
