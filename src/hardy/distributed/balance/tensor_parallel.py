"""Ranks that share a decoder's heads and feed-forward widths: each computes a part, sums join them.

Paper: M. Shoeybi et al., "Megatron-LM", 2019 (arXiv 1909.08053), section 3. The projections into a region
(attention, feed-forward) are cut by their outputs, the one out of it by its inputs; the residual stream, the
norms, the embedding and the head are whole on every rank and the same on all.

Differs from the paper: the embedding and the head are not cut, and heads of keys and values are never
repeated, so a degree must divide their number.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hardy.config import UserError
from hardy.distributed import costs
from hardy.distributed.comm import Alone, Communicator


class SharedSizes(Protocol):
    """What of a decoder's shape says how it may be shared."""

    @property
    def num_layers(self) -> int:
        """Blocks."""
        ...

    @property
    def num_heads(self) -> int:
        """Query heads."""
        ...

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        ...

    @property
    def intermediate_size(self) -> int:
        """Inner width of the feed-forward block."""
        ...


@dataclass(frozen=True, kw_only=True)
class TensorSplits:
    """How a model's parameters may be shared by the ranks of a replica."""

    dims: Mapping[str, int]
    """The dimension along which each shared parameter is cut, by name; others are whole on every rank."""
    regions: tuple[str, ...]
    """Modules whose input is whole, whose parameters are shared and whose outputs add up."""
    counts: Mapping[str, int]
    """What the ranks of a replica must be able to share equally."""

    def check(self, degree: int) -> None:
        """Refuse a tensor-parallel degree by which something does not divide.

        Raises:
            UserError: names what does not divide, and the degrees that are possible.
        """
        odd = [f"{count} {what}" for what, count in self.counts.items() if count % degree]
        if odd:
            largest = min(self.counts.values())
            fitting = [
                str(d) for d in range(1, largest + 1) if not any(count % d for count in self.counts.values())
            ]
            raise UserError(
                f"a replica of tensor-parallel degree {degree} gives its ranks equal parts, and "
                f"{' and '.join(odd)} do not divide by {degree}; this model takes degrees "
                f"{', '.join(fitting)}"
            )


def decoder_splits(shape: SharedSizes) -> TensorSplits:
    """Return how replicas share a decoder of hardy's.

    Args:
        shape: its sizes, such as `model.shape`.
    """
    into_and_out = {
        "attention": (("query", "key", "value"), "output"),
        "feed_forward": (("gate", "up"), "down"),
    }
    dims: dict[str, int] = {}
    regions: list[str] = []
    for layer in range(shape.num_layers):
        for region, (into, out) in into_and_out.items():
            name = f"blocks.{layer}.{region}"
            regions.append(name)
            dims |= {f"{name}.{projection}.weight": 0 for projection in into}
            dims[f"{name}.{out}.weight"] = 1
    counts = {
        "query heads": shape.num_heads,
        "key and value heads": shape.num_kv_heads,
        "feed-forward widths": shape.intermediate_size,
    }
    return TensorSplits(dims=dims, regions=tuple(regions), counts=counts)


class TensorGroup:
    """The ranks that share a model's regions, by hooks on them; the group may change between steps.

    Args:
        model: its regions take whole inputs first of all, and give one tensor.
        splits: names the regions.
    """

    def __init__(self, model: nn.Module, splits: TensorSplits) -> None:
        self.group: Communicator = Alone()
        # Left out of torch.compile's graphs, as attention is: it cannot look into messages.
        before, after = (cast(Any, torch.compiler.disable(hook)) for hook in (self._before, self._after))
        for name in splits.regions:
            region = model.get_submodule(name)
            region.register_forward_pre_hook(before)
            region.register_forward_hook(after)

    def _before(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return enter_region(args[0], self.group), *args[1:]

    def _after(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        return leave_region(output, self.group)


def enter_region(x: Tensor, group: Communicator) -> Tensor:
    """Return `x` as it is; its gradient is the sum of those of all ranks. Collective in the backward pass."""
    return x if group.size == 1 else cast("Callable[..., Tensor]", _Enter.apply)(x, group)


def leave_region(x: Tensor, group: Communicator) -> Tensor:
    """Return the sum of `x` over the ranks; the gradient passes as it is. Collective in the forward pass."""
    return x if group.size == 1 else cast("Callable[..., Tensor]", _Leave.apply)(x, group)


def tensor_parallel_bytes(*, num_regions: int, stream_bytes: int, degree: int) -> int:
    """Return what each rank of a replica sends for a micro-batch: two sums for each region.

    Args:
        num_regions: two for each block of a decoder.
        stream_bytes: of the residual stream: tokens times hidden size times bytes of an element.
        degree: ranks of the replica.

    Example:
        >>> tensor_parallel_bytes(num_regions=4, stream_bytes=1000, degree=2)
        8000
    """
    return 2 * num_regions * costs.all_reduce(stream_bytes, degree).bytes_sent


class _Enter(torch.autograd.Function):
    """Nothing; backward: sum over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Communicator) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # `once_differentiable` makes it positional
        return ctx.group.sum(grad_outputs[0]), None


class _Leave(torch.autograd.Function):
    """Sum over the group; backward: nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Communicator) -> Tensor:
        return group.sum(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # `once_differentiable` makes it positional
        return grad_outputs[0], None
