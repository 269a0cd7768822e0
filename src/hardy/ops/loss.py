"""Summed cross-entropy of a linear head, chunk by chunk: the logits of all tokens never exist at once.

With a vocabulary of 32 thousand the logits are the largest tensor of a step. The gradient of a chunk is known
as soon as its logits are, so the forward pass computes it and lets them go; the backward pass only scales it.

Shape suffixes: T tokens, C tokens of one chunk, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hardy.ops.packed import IGNORED_LABEL

CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Logits of one chunk where the caller names no size: on a CPU few enough for its cache, on a GPU many."""


def linear_cross_entropy_sum(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *, chunk_tokens: int | None = None
) -> Tensor:
    """Return the summed negative log-likelihood of `labels_T` under softmax(hidden @ weight.T).

    Tokens whose label is `IGNORED_LABEL` count nothing and get a zero gradient. Under autocast the matrix
    products run in its dtype; the softmax and the sum are always in fp32 (float64 for float64 inputs).

    Args:
        hidden_TD: last hidden states.
        weight_VD: weight of the output head, without bias.
        labels_T: what each token must predict, int64.
        chunk_tokens: tokens whose logits exist at once; None takes a size that suits the device.

    Returns:
        The sum in nats, 0-d, fp32 (float64 for float64 inputs); 0 where every label is ignored.

    Raises:
        ValueError: shapes disagree, or `chunk_tokens` is below 1.

    Example:
        >>> zeros_TD, weight_VD = torch.zeros(2, 3), torch.ones(4, 3)
        >>> round(linear_cross_entropy_sum(zeros_TD, weight_VD, torch.tensor([1, -100])).item(), 4)  # log 4
        1.3863
    """
    if hidden_TD.shape[:1] != labels_T.shape or hidden_TD.shape[1] != weight_VD.shape[1]:
        shapes = [tuple(x.shape) for x in (hidden_TD, weight_VD, labels_T)]
        raise ValueError(f"hidden, weight and labels must be (T, D), (V, D) and (T,), got {shapes}")
    if chunk_tokens is None:
        most = CHUNK_ELEMENTS.get(hidden_TD.device.type, CHUNK_ELEMENTS["cuda"])
        chunk_tokens = max(64, most // weight_VD.shape[0])
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    device_type = hidden_TD.device.type
    dtype = hidden_TD.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        if torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad):
            apply = cast("Callable[..., Tensor]", _LinearCrossEntropySum.apply)  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
            return apply(hidden_TD, weight_VD, labels_T, chunk_tokens, dtype)
        return _sum_and_grads(
            hidden_TD, weight_VD, labels_T, chunk_tokens=chunk_tokens, dtype=dtype, wanted=(False, False)
        )[0]


class _LinearCrossEntropySum(torch.autograd.Function):
    """Sum in the forward pass together with its gradients; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        chunk_tokens: int,
        dtype: torch.dtype,
    ) -> Tensor:
        total, *grads = _sum_and_grads(
            hidden_TD,
            weight_VD,
            labels_T,
            chunk_tokens=chunk_tokens,
            dtype=dtype,
            wanted=ctx.needs_input_grad[:2],
        )
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # `once_differentiable` makes it positional
        (grad_total,) = grad_outputs
        grads = [None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors]
        return *grads, None, None, None


def _sum_and_grads(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    chunk_tokens: int,
    dtype: torch.dtype,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the sum and, where `wanted`, its gradients by the hidden states and by the weight."""
    exact = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=exact, device=hidden_TD.device)
    grad_hidden_TD = torch.empty_like(hidden_TD) if wanted[0] else None
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=exact) if wanted[1] else None
    head_VD, ignored_T1 = weight_VD.detach().to(dtype), (labels_T == IGNORED_LABEL).unsqueeze(1)
    index_T1 = labels_T.unsqueeze(1).masked_fill(ignored_T1, 0)
    # Asking a GPU would make the host wait; there the masks cost nothing that matters.
    some_ignored = labels_T.device.type != "cpu" or bool(ignored_T1.any())
    for start in range(0, hidden_TD.shape[0], chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        hidden_CD, index_C1 = hidden_TD.detach()[chunk].to(dtype), index_T1[chunk]
        scores_CV = torch.log_softmax(hidden_CD @ head_VD.T, dim=-1, dtype=exact)
        total -= scores_CV.gather(1, index_C1).masked_fill_(ignored_T1[chunk], 0).sum()
        if not any(wanted):
            continue
        slope_CV = scores_CV.exp_().scatter_add_(1, index_C1, torch.full_like(index_C1, -1, dtype=exact))
        slope_CV = slope_CV.to(dtype)
        # The slope of an ignored token is not zeroed: the two products it enters are narrower than it is.
        if some_ignored:
            hidden_CD = hidden_CD * ~ignored_T1[chunk]
        if grad_hidden_TD is not None:
            _product_into(grad_hidden_TD[chunk], slope_CV, head_VD)
        if grad_weight_VD is not None and dtype == exact:
            grad_weight_VD.addmm_(slope_CV.T, hidden_CD)
        elif grad_weight_VD is not None:
            grad_weight_VD += slope_CV.T @ hidden_CD
    if grad_hidden_TD is not None and some_ignored:
        grad_hidden_TD.mul_(~ignored_T1)
    return total, grad_hidden_TD, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)


def _product_into(result_CD: Tensor, slope_CV: Tensor, head_VD: Tensor) -> None:
    """Write slope @ head into `result_CD`, which may have another dtype under autocast."""
    if result_CD.dtype == head_VD.dtype:
        torch.mm(slope_CV, head_VD, out=result_CD)
    else:
        result_CD.copy_(slope_CV @ head_VD)
