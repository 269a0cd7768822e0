"""What the workers of a group pass each other inside attention: keys and values, or heads; with gradients.

Each is a step of autograd whose backward pass is the opposite collective. They stand on `Communicator`, so
they run alone, simulated, on gloo and on NCCL. The gradient's reduce-scatter is an all-to-all and a sum on
arrival: the same bytes, but bf16 is added up in fp32, and always in one order.

Shape suffixes: T rows of this worker, N rows looked at, G workers, h heads of one worker, K head size.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hardy.distributed.balance.layouts import GatherLayout
from hardy.distributed.comm import Communicator


def gather_rows(x_T: Tensor, layout: GatherLayout) -> Tensor:
    """Return the rows that the queries of this worker look at: the group's shared ones and its own.

    Collective over the layout's group where it shares rows.

    Args:
        x_T: this worker's rows, of any further dimensions.
        layout: which rows are shared and which are looked at.
    """
    return cast("Callable[..., Tensor]", _GatherRows.apply)(x_T, layout)


def swap_heads(x_GThK: Tensor, group: Communicator) -> Tensor:
    """Send slice j to worker j; return the slices sent to us, by who sent them. Collective over the group."""
    return cast("Callable[..., Tensor]", _Swap.apply)(x_GThK, group)


class _GatherRows(torch.autograd.Function):
    """All-gather, then pick; backward: put back, then reduce-scatter. Keeps indices only."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, layout: GatherLayout) -> Tensor:
        ctx.layout = layout
        if layout.shared_rows and layout.group.size > 1:
            shared = layout.group.all_gather(x_T[: layout.shared_rows]).flatten(0, 1)
            x_T = torch.cat((shared, x_T[layout.shared_rows :]))
        ctx.num_rows = x_T.shape[0]
        return x_T.index_select(0, layout.key_row_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # `once_differentiable` makes it positional
        layout: GatherLayout = ctx.layout
        (grad_N,) = grad_outputs
        fronts = layout.num_front_keys
        grad = grad_N.new_zeros(ctx.num_rows, *grad_N.shape[1:])
        # No row occurs twice in either half, so nothing depends on the order of additions.
        grad.index_copy_(0, layout.key_row_N[:fronts], grad_N[:fronts])
        grad.index_add_(0, layout.key_row_N[fronts:], grad_N[fronts:])
        if not layout.shared_rows or layout.group.size == 1:
            return grad, None
        num_shared = layout.group.size * layout.shared_rows
        shared = grad[:num_shared].unflatten(0, (layout.group.size, layout.shared_rows))
        summed = layout.group.all_to_all(shared).sum(0)  # torch adds bf16 up in fp32 and rounds once
        return torch.cat((summed, grad[num_shared:])), None


class _Swap(torch.autograd.Function):
    """All-to-all, which is its own opposite."""

    @staticmethod
    def forward(ctx: Any, x_G: Tensor, group: Communicator) -> Tensor:
        ctx.group = group
        return group.all_to_all(x_G)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # `once_differentiable` makes it positional
        return ctx.group.all_to_all(grad_outputs[0]), None
