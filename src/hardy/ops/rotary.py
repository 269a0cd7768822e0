"""Rotary positions, halves convention: dimension k of a head turns together with dimension k + K/2.

Paper: J. Su et al., "RoFormer", 2021 (arXiv 2104.09864), eq. 15.   Letters: theta = base of the frequencies.
Differs from the paper: it pairs neighbours (2k, 2k + 1); Hugging Face's Llama pairs halves, and so do we.

Shape suffixes: T packed tokens, H heads, K head size.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor


class Rotary:
    """Cosine and sine of every token's angles, (T, 1, K/2) each, fp32.

    Neither tuple nor dataclass, on purpose: FSDP2 with mixed precision casts the tensors in those to bf16,
    in which neighbouring angles run together.
    """

    def __init__(self, *, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin


def rotary_table(positions_T: Tensor, *, head_size: int, theta: float) -> Rotary:
    """Return cosine and sine of every token's angles.

    Computed anew in each forward pass: a table kept in a buffer would be lost when a model built on the meta
    device gets its memory, and this costs next to nothing.
    """
    exponents = torch.arange(0, head_size, 2, device=positions_T.device, dtype=torch.float32) / head_size
    angles = positions_T.float()[:, None, None] * (1.0 / theta**exponents)
    return Rotary(cos=angles.cos(), sin=angles.sin())


def rotate(x_THK: Tensor, rotary: Rotary) -> Tensor:
    """Turn every head by its token's angles, in fp32 at least; the dtype stays.

    Example:
        >>> quarter_turn = Rotary(cos=torch.zeros(1, 1, 1), sin=torch.ones(1, 1, 1))
        >>> rotate(torch.tensor([[[3.0, 4.0]]]), quarter_turn).flatten().tolist()
        [-4.0, 3.0]
    """
    if torch.compiler.is_compiling():  # plain operations, which the compiler fuses forward and backward
        first, second = x_THK.chunk(2, dim=-1)
        turned_first = first * rotary.cos - second * rotary.sin
        turned_second = second * rotary.cos + first * rotary.sin
        return torch.cat((turned_first, turned_second), dim=-1).to(x_THK.dtype)
    apply = cast("Callable[..., Tensor]", _Rotate.apply)  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
    return apply(x_THK, rotary.cos, rotary.sin)


class _Rotate(torch.autograd.Function):
    """One pass instead of seven; the gradient is the turn backwards."""

    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x_THK, cos, sin, direction=1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grad_outputs[0], cos, sin, direction=-1), None, None


def _turn(x_THK: Tensor, cos: Tensor, sin: Tensor, *, direction: int) -> Tensor:
    """Return (first cos - second sin, second cos + first sin), or the turn back."""
    wide_THK = x_THK.to(torch.promote_types(x_THK.dtype, cos.dtype))
    first, second = wide_THK.chunk(2, dim=-1)
    turned_THK = torch.empty_like(wide_THK, memory_format=torch.contiguous_format)
    turned_first, turned_second = turned_THK.chunk(2, dim=-1)
    torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=turned_second).addcmul_(first, sin, value=direction)
    return turned_THK.to(x_THK.dtype)
