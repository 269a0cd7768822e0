"""Packed attention by CUDA kernels: torch's flash varlen attention, and FlexAttention with a document mask.

Both equal `reference_attention`; tests/gpu compares them. They need a GPU, so nothing here runs on a CPU.

Shape suffixes: T packed tokens, H heads, K head size.
"""

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from hardy._compat import varlen_attention as torch_varlen_attention
from hardy.config import UserError
from hardy.ops.attention_backends import AttentionRule, documents_and_places, sees
from hardy.ops.packed import Borders

HALF_DTYPES = (torch.bfloat16, torch.float16)


def varlen_attention(
    query_THK: Tensor,
    key_THK: Tensor,
    value_THK: Tensor,
    queries: Borders,
    *,
    keys: Borders,
    rule: AttentionRule,
) -> Tensor:
    """Attend by `torch.nn.attention.varlen.varlen_attn`; fp32 tensors are cast to the autocast dtype.

    Raises:
        UserError: not bf16 or fp16, or a head size that is no multiple of 8 or above 256.
    """
    dtype = query_THK.dtype
    if dtype not in HALF_DTYPES and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    head_size = query_THK.shape[-1]
    if dtype not in HALF_DTYPES:
        raise UserError(
            f"model.attention='varlen' needs bf16 or fp16, got {dtype}; set train.precision='bf16' or "
            f"model.attention='auto'"
        )
    if head_size % 8 or head_size > 256:
        raise UserError(
            f"model.attention='varlen' needs a model.shape.head_size that is a multiple of 8 up to 256, got "
            f"{head_size}; use model.attention='auto'"
        )
    kernel, takes_groups = torch_varlen_attention()
    group = query_THK.shape[1] // key_THK.shape[1]
    more: dict[str, Any] = {}
    if group > 1 and takes_groups:
        more["enable_gqa"] = True
    elif group > 1:
        key_THK, value_THK = (x.repeat_interleave(group, dim=1) for x in (key_THK, value_THK))
    before = -1 if rule.window is None else rule.window
    out_THK: Tensor = kernel(
        *(x.to(dtype).contiguous() for x in (query_THK, key_THK, value_THK)),
        queries.cumulative_S,
        keys.cumulative_S,
        queries.longest,
        keys.longest,
        scale=rule.scale,
        window_size=(before, 0) if rule.causal else (-1, -1),
        **more,
    )
    return out_THK.to(query_THK.dtype)


def flex_attention(
    query_THK: Tensor,
    key_THK: Tensor,
    value_THK: Tensor,
    queries: Borders,
    *,
    keys: Borders,
    rule: AttentionRule,
) -> Tensor:
    """Attend by compiled FlexAttention; the block mask of a layout is kept for the layers that follow."""
    dtype = query_THK.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    mask = _block_mask(queries.lengths, keys.lengths, rule, query_THK.device)
    out_HTK = _compiled_flex()(
        *(x.to(dtype).transpose(0, 1).unsqueeze(0) for x in (query_THK, key_THK, value_THK)),
        block_mask=mask,
        scale=rule.scale,
        enable_gqa=query_THK.shape[1] != key_THK.shape[1],
    )
    return out_HTK.squeeze(0).transpose(0, 1).to(query_THK.dtype)


@cache
def _compiled_flex() -> Any:
    """Compile FlexAttention once, for any number of tokens."""
    return torch.compile(torch_flex_attention, dynamic=True)  # pyright: ignore[reportUnknownMemberType]  # untyped in torch


@lru_cache(maxsize=8)
def _block_mask(
    query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], rule: AttentionRule, device: torch.device
) -> BlockMask:
    """Return the block mask of a layout; pure in its arguments, hence kept."""
    queries, keys = (Borders.of(x).to(device) for x in (query_lengths, key_lengths))
    query_document_T, query_place_T = documents_and_places(queries, counterpart=keys)
    key_document_T, key_place_T = documents_and_places(keys, counterpart=keys)

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = query_document_T[query] == key_document_T[key]
        return sees(same, query_place_T[query] - key_place_T[key], rule=rule)

    return create_block_mask(seen, None, None, queries.num_tokens, keys.num_tokens, device=str(device))
