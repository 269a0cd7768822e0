"""Packed attention: every document attends to itself alone, documents of any length laid end to end.

Paper: Hydraulis (arXiv 2412.07894), where documents of mixed length share a row.
Queries and keys of a document are aligned bottom right: of `q` queries and `k >= q` keys, query x sees the
keys up to x + (k - q). Generation with a cache and context parallelism need that; for q = k it is plain.
`BACKENDS` lists the implementations; `reference` defines what is right and the others must equal it.

Shape suffixes: T packed tokens, H heads (keys and values may have fewer: grouped queries), K head size.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor

from hardy.config import UserError, unknown_name
from hardy.ops.attention_backends import CAUSAL, AttentionRule, dense_attention, reference_attention
from hardy.ops.attention_kernels import flex_attention, varlen_attention
from hardy.ops.packed import Borders, DocumentLayout

logger = logging.getLogger(__name__)

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

Backend = Literal["auto", "reference", "dense", "varlen", "flex"]


class PackedAttention(Protocol):
    """What a model may be given as its attention; `packed_attention` and partial calls of it are such."""

    def __call__(
        self,
        query_THK: Tensor,
        key_THK: Tensor,
        value_THK: Tensor,
        queries: DocumentLayout,
        *,
        keys: DocumentLayout | None = None,
    ) -> Tensor:
        """Return the attention output, shaped as the queries; `keys` is None where it equals `queries`."""
        ...


class _Implementation(Protocol):
    def __call__(
        self,
        query_THK: Tensor,
        key_THK: Tensor,
        value_THK: Tensor,
        queries: Borders,
        *,
        keys: Borders,
        rule: AttentionRule,
    ) -> Tensor: ...


BACKENDS: dict[str, _Implementation] = {
    "reference": reference_attention,
    "dense": dense_attention,
    "varlen": varlen_attention,
    "flex": flex_attention,
}
CUDA_ONLY = frozenset({"varlen", "flex"})


def _outside_graphs(function: FunctionT) -> FunctionT:
    """Keep torch.compile out of a function, whose type stays."""
    return cast(FunctionT, torch.compiler.disable(function))  # pyright: ignore[reportUnknownMemberType]  # untyped


@_outside_graphs
def packed_attention(
    query_THK: Tensor,
    key_THK: Tensor,
    value_THK: Tensor,
    queries: Borders,
    *,
    keys: Borders | None = None,
    rule: AttentionRule = CAUSAL,
    backend: Backend = "auto",
) -> Tensor:
    """Attend within each document and never across their borders.

    Left out of torch.compile's graphs on purpose: lengths are host integers, and a graph that reads them
    would be compiled again for every pack.

    Args:
        query_THK: queries of all documents, end to end.
        key_THK: keys; T may be larger than the queries', H must divide theirs.
        value_THK: values, shaped as the keys.
        queries: borders of the documents among the queries.
        keys: borders of the same documents among the keys; None means those of the queries.
        rule: who sees whom within a document, and the scale of the scores.
        backend: a name of `BACKENDS`, or auto: the reference on CPU, on CUDA varlen where it proved right.

    Returns:
        The output, shape and dtype of the queries.

    Raises:
        UserError: the back end does not exist, or not for this device, dtype or size.
        ValueError: shapes and layouts disagree, or a causal document has more queries than keys.

    Example:
        >>> layout = DocumentLayout.from_lengths([1, 2])
        >>> value_THK = torch.tensor([1.0, 2.0, 4.0]).reshape(3, 1, 1)
        >>> zeros_THK = torch.zeros(3, 1, 1)
        >>> packed_attention(zeros_THK, zeros_THK, value_THK, layout).flatten().tolist()
        [1.0, 2.0, 3.0]
    """
    keys = queries if keys is None else keys
    _check_shapes(query_THK, key_THK, value_THK, queries, keys=keys, rule=rule)
    device_type = query_THK.device.type
    if backend == "auto":
        backend = choose_backend(device_type, dtype=_kernel_dtype(query_THK), head_size=query_THK.shape[-1])
    if backend not in BACKENDS:
        raise UserError(f"model.attention: {unknown_name(backend, 'back end', [*BACKENDS, 'auto'])}")
    if backend in CUDA_ONLY and device_type != "cuda":
        raise UserError(
            f"model.attention={backend!r} needs a CUDA device, the tensors are on {device_type!r}; "
            f"use model.attention='auto' or 'reference'"
        )
    return BACKENDS[backend](query_THK, key_THK, value_THK, queries, keys=keys, rule=rule)


def choose_backend(device_type: str, *, dtype: torch.dtype, head_size: int) -> Backend:
    """Return what `auto` means for tensors of this kind; the first question on a GPU runs a tiny probe.

    Args:
        device_type: such as "cpu" or "cuda".
        dtype: dtype the kernel would get (the autocast dtype where autocast is on).
        head_size: K; varlen takes multiples of 8 up to 256.
    """
    if device_type != "cuda":
        return "reference"
    if head_size % 8 == 0 and head_size <= 256 and _works("varlen", device_type, dtype):
        return "varlen"
    return "reference"


@cache
def _works(backend: str, device_type: str, dtype: torch.dtype) -> bool:
    """Return whether a tiny forward and backward pass of the back end runs and equals the reference."""
    layout = DocumentLayout.from_lengths([5, 3], device=device_type)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(8, 2, 16, generator=generator).to(device_type, dtype) for _ in range(3)]
    results: list[Tensor] = []
    try:
        # Hooks of its own: asked within a checkpointed block, what the probe saves is not the block's.
        hooks = torch.autograd.graph.saved_tensors_hooks(_same, _same)
        with hooks, torch.enable_grad(), torch.autocast(device_type, enabled=False):
            for name in ("reference", backend):
                query, key, value = (x.clone().requires_grad_() for x in inputs)
                out_THK = BACKENDS[name](query, key, value, layout, keys=layout, rule=CAUSAL)
                out_THK.float().square().sum().backward()  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
                grads = [cast(Tensor, x.grad) for x in (query, key, value)]
                results.append(torch.stack([out_THK.detach(), *grads]).double())
    except (RuntimeError, ImportError, UserError) as error:
        logger.warning("attention: %s does not run for %s, using the reference: %s", backend, dtype, error)
        return False
    right = bool((results[0] - results[1]).abs().max() <= 4e-2 * results[0].abs().max())
    logger.info("attention: %s on %s in %s %s", backend, device_type, dtype, "works" if right else "is wrong")
    return right


def _same(saved: Tensor) -> Tensor:
    return saved


def _kernel_dtype(query_THK: Tensor) -> torch.dtype:
    """Return the dtype in which a kernel runs: autocast's for fp32 tensors, otherwise the tensor's own."""
    device_type = query_THK.device.type
    if query_THK.dtype == torch.float32 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return query_THK.dtype


def _check_shapes(
    query_THK: Tensor,
    key_THK: Tensor,
    value_THK: Tensor,
    queries: Borders,
    *,
    keys: Borders,
    rule: AttentionRule,
) -> None:
    """Refuse tensors and layouts that do not belong together."""
    tokens = (query_THK.shape[0], key_THK.shape[0], value_THK.shape[0])
    if tokens != (queries.num_tokens, keys.num_tokens, keys.num_tokens):
        raise ValueError(
            f"queries, keys and values have {tokens} tokens, "
            f"their layouts {queries.num_tokens} and {keys.num_tokens}"
        )
    if key_THK.shape[1] != value_THK.shape[1] or query_THK.shape[1] % key_THK.shape[1]:
        raise ValueError(
            f"{query_THK.shape[1]} query heads cannot share {key_THK.shape[1]} key heads "
            f"and {value_THK.shape[1]} value heads"
        )
    if queries is keys:
        return
    if len(queries.lengths) != len(keys.lengths):
        raise ValueError(f"{len(queries.lengths)} documents of queries, {len(keys.lengths)} of keys")
    for document, (num_queries, num_keys) in enumerate(zip(queries.lengths, keys.lengths, strict=True)):
        if rule.causal and num_queries > num_keys:
            raise ValueError(
                f"document {document} has {num_queries} queries but {num_keys} keys: "
                f"its first queries would see nothing"
            )
