"""Packed attention in plain scaled_dot_product_attention: the exact reference, and one dense masked call.

Both run on every device, in every dtype, forward and backward.

Shape suffixes: T packed tokens, H heads, K head size, B documents of one length, Q queries, S keys of each.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hardy.config import UserError
from hardy.ops.packed import Borders
from hardy.ops.rows import from_rows, plan_rectangles, to_rows

DENSE_MOST_TOKENS = 8192
ROWS_OF_A_MASK = 256
"""Rows of queries that share a mask; more look at more keys in vain, fewer make more calls."""
RUN_MEAN_TOKENS = 96
"""Runs of equal documents at least this long on average get a call each, shorter documents are gathered."""


@dataclass(frozen=True, kw_only=True)
class AttentionRule:
    """Who sees whom within a document."""

    causal: bool = True
    """Whether a query sees only keys up to its own place (bottom-right aligned)."""
    window: int | None = None
    """How many keys before its own place a query sees besides that one; None is no limit. Needs `causal`."""
    scale: float | None = None
    """Factor of the scores; None means 1 / sqrt(head size)."""

    def __post_init__(self) -> None:
        if self.window is not None and (self.window < 0 or not self.causal):
            raise ValueError(f"an attention window must be at least 0 and causal, got {self}")


CAUSAL = AttentionRule()


def visible(num_queries: int, num_keys: int, *, rule: AttentionRule, device: torch.device | str) -> Tensor:
    """Return the boolean mask (num_queries, num_keys) of one document, true where a query sees a key.

    Example:
        >>> visible(2, 3, rule=AttentionRule(window=1), device="cpu").int().tolist()
        [[1, 1, 0], [0, 1, 1]]
    """
    query_place_Q1 = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(1)
    lead_QS = query_place_Q1 - torch.arange(num_keys, device=device)
    return sees(torch.ones_like(lead_QS, dtype=torch.bool), lead_QS, rule=rule)


def sees(same: Tensor, lead: Tensor, *, rule: AttentionRule) -> Tensor:
    """Return where a query sees a key.

    Args:
        same: whether both are of one document.
        lead: place of the query less the place of the key; the last query stands at the last key.
        rule: who sees whom within a document.
    """
    if rule.causal:
        same = same & (lead >= 0)
    return same if rule.window is None else same & (lead <= rule.window)


def documents_and_places(layout: Borders, *, counterpart: Borders) -> tuple[Tensor, Tensor]:
    """Return each token's document, and its place when the documents end where those of `counterpart` do."""
    device = layout.cumulative_S.device
    counts_B = layout.cumulative_S.diff()
    document_T = torch.repeat_interleave(
        torch.arange(len(layout.lengths), device=device), counts_B, output_size=layout.num_tokens
    )
    starts_B = layout.cumulative_S[:-1] + counts_B - counterpart.cumulative_S.diff()
    return document_T, torch.arange(layout.num_tokens, device=device) - starts_B[document_T]


def reference_attention(
    query_THK: Tensor,
    key_THK: Tensor,
    value_THK: Tensor,
    queries: Borders,
    *,
    keys: Borders,
    rule: AttentionRule,
) -> Tensor:
    """Attend document by document; documents of (nearly) equal length go through one call.

    Arguments as of `packed_attention`. Memory grows with the square of a document at most, never of the pack.
    """
    shapes = list(zip(queries.lengths, keys.lengths, strict=True))
    inputs = (query_THK, key_THK, value_THK)
    runs = [(shape, len(list(run))) for shape, run in groupby(shapes)]
    if len(runs) == 1 or len(runs) * RUN_MEAN_TOKENS <= queries.num_tokens:
        return _attend_in_runs(inputs, runs, rule=rule)
    if rule.causal and queries.lengths == keys.lengths:
        return _attend_in_rectangles(inputs, queries, rule=rule)
    return _attend_in_groups(inputs, shapes, rule=rule)


def dense_attention(
    query_THK: Tensor,
    key_THK: Tensor,
    value_THK: Tensor,
    queries: Borders,
    *,
    keys: Borders,
    rule: AttentionRule,
) -> Tensor:
    """Attend with one call and a mask of (queries, keys) that is false across documents.

    Raises:
        UserError: more than 8192 tokens, where the mask alone would waste most of the work.
    """
    if max(queries.num_tokens, keys.num_tokens) > DENSE_MOST_TOKENS:
        raise UserError(
            f"model.attention='dense' takes at most {DENSE_MOST_TOKENS} tokens at once, got "
            f"{keys.num_tokens}; use model.attention='auto', or lower train.micro_packs or data.pack_tokens"
        )
    query_document_T, query_place_T = documents_and_places(queries, counterpart=keys)
    key_document_T, key_place_T = documents_and_places(keys, counterpart=keys)
    mask_TT = sees(
        query_document_T[:, None] == key_document_T, query_place_T[:, None] - key_place_T, rule=rule
    )
    inputs = (query_THK.unsqueeze(0), key_THK.unsqueeze(0), value_THK.unsqueeze(0))
    return _scaled_dot_product(*inputs, mask=mask_TT, causal=False, scale=rule.scale).squeeze(0)


def _attend_in_runs(
    inputs: tuple[Tensor, Tensor, Tensor],
    runs: Sequence[tuple[tuple[int, int], int]],
    *,
    rule: AttentionRule,
) -> Tensor:
    """Attend where neighbours of equal length share a call: nothing is moved, a view goes in for each run.

    Args:
        inputs: queries, keys and values.
        runs: (queries and keys of a document, documents in a row).
        rule: who sees whom.
    """
    outputs: list[Tensor] = []
    for ((num_queries, num_keys), count), query, key, value in zip(
        runs, *_split_runs(inputs, runs), strict=True
    ):
        out_BQHK = _attend(
            query.view(count, num_queries, *query.shape[1:]),
            key.view(count, num_keys, *key.shape[1:]),
            value.view(count, num_keys, *value.shape[1:]),
            rule=rule,
        )
        outputs.append(out_BQHK.flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _split_runs(
    inputs: tuple[Tensor, Tensor, Tensor], runs: Sequence[tuple[tuple[int, int], int]]
) -> list[Sequence[Tensor]]:
    """Return the parts of queries, keys and values that belong to each run."""
    query_sizes = [num_queries * count for (num_queries, _), count in runs]
    key_sizes = [num_keys * count for (_, num_keys), count in runs]
    # Split, not slice: a slice's backward pass fills a gradient as large as the pack for every run.
    sizes = (query_sizes, key_sizes, key_sizes)
    return [torch.split_with_sizes(x, parts) for x, parts in zip(inputs, sizes, strict=True)]


def _attend_in_rectangles(
    inputs: tuple[Tensor, Tensor, Tensor], layout: Borders, *, rule: AttentionRule
) -> Tensor:
    """Attend with as many causal queries as keys: like lengths share a call, padded behind their ends."""
    rectangles = plan_rectangles(layout.lengths, device=inputs[0].device)
    sizes = [documents * length for documents, length in rectangles.shapes]
    parts = [torch.split_with_sizes(to_rows(x, rectangles), sizes) for x in inputs]
    outputs = [
        _attend(*(part[index].view(*shape, *part[index].shape[1:]) for part in parts), rule=rule).flatten(
            0, 1
        )
        for index, shape in enumerate(rectangles.shapes)
    ]
    return from_rows(torch.cat(outputs), rectangles)


def _attend_in_groups(
    inputs: tuple[Tensor, Tensor, Tensor], shapes: Sequence[tuple[int, int]], *, rule: AttentionRule
) -> Tensor:
    """Attend with any lengths of queries and keys: documents of equal lengths share a call."""
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for document, shape in enumerate(shapes):
        members[shape].append(document)
    # Split, not slice: a slice's backward pass fills a gradient as large as the pack for every document.
    lengths = ([shape[0] for shape in shapes], *([[shape[1] for shape in shapes]] * 2))
    parts = [torch.split_with_sizes(x, sizes) for x, sizes in zip(inputs, lengths, strict=True)]
    outputs: dict[int, Tensor] = {}
    for documents in members.values():
        out_BQHK = _attend(*(torch.stack([part[i] for i in documents]) for part in parts), rule=rule)
        outputs.update(zip(documents, out_BQHK.unbind(0), strict=True))
    return torch.cat([outputs[document] for document in range(len(shapes))])


def _attend(query_BQHK: Tensor, key_BSHK: Tensor, value_BSHK: Tensor, *, rule: AttentionRule) -> Tensor:
    """Attend within documents of one length; the output is (B, Q, H, K)."""
    num_queries, num_keys = query_BQHK.shape[1], key_BSHK.shape[1]
    triangle = rule.causal and num_queries == num_keys and (rule.window is None or rule.window >= num_keys)
    everything = not rule.causal or (num_queries == 1 and rule.window is None)
    if rule.causal and rule.window is None and ROWS_OF_A_MASK < num_queries < num_keys:
        return _attend_in_steps(query_BQHK, key_BSHK, value_BSHK, rule=rule)
    mask_QS = None
    if not triangle and not everything:
        mask_QS = visible(num_queries, num_keys, rule=rule, device=query_BQHK.device)
    return _scaled_dot_product(
        query_BQHK, key_BSHK, value_BSHK, mask=mask_QS, causal=triangle, scale=rule.scale
    )


def _attend_in_steps(
    query_BQHK: Tensor, key_BSHK: Tensor, value_BSHK: Tensor, *, rule: AttentionRule
) -> Tensor:
    """Attend causally with fewer queries than keys: rows by rows, each with the keys up to its end only.

    One small mask does for all: it is looked at from where a step's keys begin, counted from their ends.
    """
    num_queries, num_keys = query_BQHK.shape[1], key_BSHK.shape[1]
    mask_QS = query_BQHK.new_zeros(ROWS_OF_A_MASK, num_keys)
    mask_QS[:, -ROWS_OF_A_MASK:] = mask_QS.new_full((ROWS_OF_A_MASK,) * 2, -torch.inf).triu(1)
    outputs: list[Tensor] = []
    sizes = [num_queries % ROWS_OF_A_MASK or ROWS_OF_A_MASK]
    sizes += [ROWS_OF_A_MASK] * ((num_queries - sizes[0]) // ROWS_OF_A_MASK)
    seen = num_keys - num_queries
    for rows_BQHK in torch.split_with_sizes(query_BQHK, sizes, dim=1):
        count = rows_BQHK.shape[1]
        seen += count
        mine = mask_QS[-count:, num_keys - seen :]
        keys = (key_BSHK[:, :seen], value_BSHK[:, :seen])
        outputs.append(_scaled_dot_product(rows_BQHK, *keys, mask=mine, causal=False, scale=rule.scale))
    return torch.cat(outputs, dim=1)


def _scaled_dot_product(
    query_BQHK: Tensor,
    key_BSHK: Tensor,
    value_BSHK: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Call torch's attention on (B, tokens, H, K), which it wants as (B, H, tokens, K)."""
    grouped = query_BQHK.shape[2] != key_BSHK.shape[2]
    out_BHQK = scaled_dot_product_attention(
        query_BQHK.transpose(1, 2),
        key_BSHK.transpose(1, 2),
        value_BSHK.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=grouped,
    )
    return out_BHQK.transpose(1, 2)
