"""Summed cross-entropy of a linear head, chunk by chunk: the logits of all tokens never exist at once.

With a vocabulary of 32 thousand the logits are the largest tensor of a step. The gradient of a chunk is known
as soon as its logits are, so the forward pass computes it and lets them go; the backward pass only scales it.

Shape suffixes: T tokens, C tokens of one chunk, D hidden size, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hardy.ops.packed import IGNORED_LABEL

CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Logits of one chunk where the caller names no size: on a CPU few enough for its cache, on a GPU many."""


def linear_cross_entropy_sum(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    chunk_tokens: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Return the summed negative log-likelihood of `labels_T` under softmax(hidden @ weight.T).

    Tokens whose label is `IGNORED_LABEL` count nothing and get a zero gradient. Under autocast the matrix
    products run in its dtype; the softmax and the sum are always in fp32 (float64 for float64 inputs).

    With the two further terms a token's loss is (1 - e) nll + e mean over the vocabulary of -log p
    + z logsumexp(logits)^2. They are worked into the chunk that is there anyway and take no memory of its
    size; at 0 the same operations run as without them.

    Args:
        hidden_TD: last hidden states.
        weight_VD: weight of the output head, without bias.
        labels_T: what each token must predict, int64.
        chunk_tokens: tokens whose logits exist at once; None takes a size that suits the device.
        label_smoothing: e, the share of the target that is spread evenly over the vocabulary.
        z_loss: z, weight of the squared logsumexp, which keeps logits from drifting.

    Returns:
        The sum in nats, 0-d, fp32 (float64 for float64 inputs); 0 where every label is ignored.

    Raises:
        ValueError: shapes disagree, `chunk_tokens` is below 1, or a term is out of range.

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
    if not 0 <= label_smoothing < 1 or not 0 <= z_loss < math.inf:
        raise ValueError(
            f"label_smoothing must be at least 0 and below 1, z_loss at least 0, got {label_smoothing} and "
            f"{z_loss}; 0 leaves a term out"
        )
    device_type = hidden_TD.device.type
    dtype = hidden_TD.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        if torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad):
            apply = cast("Callable[..., Tensor]", _LinearCrossEntropySum.apply)  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
            return apply(hidden_TD, weight_VD, labels_T, chunk_tokens, dtype, (label_smoothing, z_loss))
        return _sum_and_grads(
            hidden_TD,
            weight_VD,
            labels_T,
            chunk_tokens=chunk_tokens,
            dtype=dtype,
            terms=(label_smoothing, z_loss),
            wanted=(False, False),
        )[0]


def linear_correct_sum(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *, chunk_tokens: int | None = None
) -> Tensor:
    """Return how many labels have the largest logit, chunk by chunk, without gradients.

    Args:
        hidden_TD: last hidden states.
        weight_VD: weight of the output head, without bias.
        labels_T: what each token should predict, int64; `IGNORED_LABEL` is never right.
        chunk_tokens: tokens whose logits exist at once; None takes a size that suits the device.

    Example:
        >>> linear_correct_sum(torch.eye(3)[:2], torch.eye(3), torch.tensor([0, 2])).item()
        1.0
    """
    if chunk_tokens is None:
        most = CHUNK_ELEMENTS.get(hidden_TD.device.type, CHUNK_ELEMENTS["cuda"])
        chunk_tokens = max(64, most // weight_VD.shape[0])
    right = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
    with torch.no_grad():
        for start in range(0, hidden_TD.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            right += ((hidden_TD[chunk] @ weight_VD.T).argmax(-1) == labels_T[chunk]).sum()
    return right


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
        terms: tuple[float, float],
    ) -> Tensor:
        total, *grads = _sum_and_grads(
            hidden_TD,
            weight_VD,
            labels_T,
            chunk_tokens=chunk_tokens,
            dtype=dtype,
            terms=terms,
            wanted=ctx.needs_input_grad[:2],
        )
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # `once_differentiable` makes it positional
        (grad_total,) = grad_outputs
        grads = [None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors]
        return *grads, None, None, None, None


def _sum_and_grads(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    chunk_tokens: int,
    dtype: torch.dtype,
    terms: tuple[float, float],
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the sum and, where `wanted`, its gradients by the hidden states and by the weight.

    `terms` are the label smoothing and the z-loss.
    """
    label_smoothing, z_loss = terms
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
        logits_CV = hidden_CD @ head_VD.T
        scores_CV = torch.log_softmax(logits_CV, dim=-1, dtype=exact)
        picked_C1 = scores_CV.gather(1, index_C1)
        lse_C1 = logits_CV.gather(1, index_C1) - picked_C1 if z_loss else None
        del logits_CV  # before the next tensor of its size
        total += _losses(scores_CV, picked_C1, lse_C1, terms=terms).masked_fill_(ignored_T1[chunk], 0).sum()
        if not any(wanted):
            continue
        slope_CV = scores_CV.exp_()
        if lse_C1 is not None:
            slope_CV *= 1 + 2 * z_loss * lse_C1
        if label_smoothing:
            slope_CV -= label_smoothing / slope_CV.shape[1]
        slope_CV.scatter_add_(1, index_C1, torch.full_like(index_C1, label_smoothing - 1, dtype=exact))
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


def _losses(
    scores_CV: Tensor, picked_C1: Tensor, lse_C1: Tensor | None, *, terms: tuple[float, float]
) -> Tensor:
    """Return each token's loss, [C, 1], in memory of its own."""
    label_smoothing, z_loss = terms
    losses_C1 = -picked_C1
    if label_smoothing:
        losses_C1 = (1 - label_smoothing) * losses_C1 - label_smoothing * scores_CV.mean(1, keepdim=True)
    return losses_C1 if lse_C1 is None else losses_C1 + z_loss * lse_C1.square()


def _product_into(result_CD: Tensor, slope_CV: Tensor, head_VD: Tensor) -> None:
    """Write slope @ head into `result_CD`, which may have another dtype under autocast."""
    if result_CD.dtype == head_VD.dtype:
        torch.mm(slope_CV, head_VD, out=result_CD)
    else:
        result_CD.copy_(slope_CV @ head_VD)
