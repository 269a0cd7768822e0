"""RMS normalisation with a gradient written out: on a CPU torch composes it from many passes over memory.

Paper: B. Zhang, R. Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv 1910.07467), eq. 4.

Shape suffixes: T tokens, D hidden size.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm as torch_rms_norm


def rms_norm(x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps), computed in fp32 at least, in the dtype of `x_TD`.

    Example:
        >>> rms_norm(torch.tensor([[3.0, -3.0]]), torch.ones(2), eps=0.0).round(decimals=4).tolist()
        [[1.0, -1.0]]
    """
    if x_TD.device.type == "cuda" or torch.compiler.is_compiling():  # one fused kernel there
        return torch_rms_norm(x_TD, weight_D.shape, weight_D, eps)
    apply = cast("Callable[..., Tensor]", _RMSNorm.apply)  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
    return apply(x_TD, weight_D, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        norm_T1 = cast(Tensor, torch.linalg.vector_norm(wide_TD, dim=-1, keepdim=True))  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
        factor_T1 = norm_T1.square_().div_(x_TD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, factor_T1)
        return (wide_TD * factor_T1).mul_(weight_D).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # `once_differentiable` makes it positional
        x_TD, weight_D, factor_T1 = ctx.saved_tensors
        unit_TD = x_TD * factor_T1
        slope_TD = grad_outputs[0] * unit_TD
        grad_weight_D = slope_TD.sum(0).to(weight_D.dtype)
        share_T1 = (slope_TD @ weight_D.to(slope_TD.dtype)).div_(-x_TD.shape[-1]).unsqueeze(-1)
        grad_TD = (grad_outputs[0] * weight_D).addcmul_(unit_TD, share_T1).mul_(factor_T1)
        return grad_TD.to(x_TD.dtype), grad_weight_D, None
