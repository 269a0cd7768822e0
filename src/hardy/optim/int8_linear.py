"""A linear module whose weight is stored in int8, and the parameter that stands for it.

The weight is three buffers, so checkpoints see plain tensors only. Beside them stands a parameter of the
whole shape over one element: autograd, groups and names need something that has a gradient. The forward pass
makes the dense weight and lets it go, the backward pass makes it again. Nothing else may read the parameter,
which holds NaN so that a misuse shows.

Paper: H. Zhu et al., 2024 (arXiv 2412.05270), Q-APOLLO.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from hardy.ops.quantize import Int8Matrix, dequantize


class VirtualWeight(nn.Parameter):
    """The face of an int8 weight: its shape, dtype, device and gradient, over one element that holds NaN."""

    owner: "weakref.ref[Int8Linear] | None" = None
    """The module that holds the weight; weak, so that the two do not keep each other alive."""

    @staticmethod
    def over(shape: tuple[int, ...], like: Tensor, *, requires_grad: bool) -> "VirtualWeight":
        """Return one of a given shape, in the dtype and on the device of `like`."""
        one = torch.full((1, 1), torch.nan, dtype=like.dtype, device=like.device)
        return VirtualWeight(one.expand(shape), requires_grad)

    def matrix(self) -> Int8Matrix:
        """Return what it stands for: the module's buffers themselves.

        Raises:
            RuntimeError: the module is gone, or has another weight by now.
        """
        module = self.owner() if self.owner is not None else None
        if module is None or module.weight is not self:
            raise RuntimeError(
                f"an int8 weight of shape {tuple(self.shape)} has lost its module, which was copied, "
                f"converted or moved off the meta device; build the optimizer from the parameters of the "
                f"model as it is now"
            )
        return module.matrix()

    def __deepcopy__(self, memo: dict[int, Any]) -> "VirtualWeight":
        """Copy the one element; the copy of the module claims it."""
        if id(self) not in memo:
            memo[id(self)] = VirtualWeight.over(tuple(self.shape), self, requires_grad=self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle one element; the module that comes back claims the weight."""
        return _unpickled, (self.data[0, 0].clone(), tuple(self.shape), self.requires_grad)


def _unpickled(one: Tensor, shape: tuple[int, ...], requires_grad: bool) -> VirtualWeight:
    return VirtualWeight.over(shape, one, requires_grad=requires_grad)


class _Product(torch.autograd.Function):
    """x W^T + b, with W made from int8 in both passes; keeps x and the stored weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        q: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        group: int,
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, q, scale, zero_point)
        ctx.group, ctx.weight_dtype = group, weight.dtype
        matrix = Int8Matrix(q=q, scale=scale, zero_point=zero_point, group=group)
        return linear(x, dequantize(matrix, dtype=x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # `once_differentiable` makes it positional
        (grad,) = grad_outputs
        x, q, scale, zero_point = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            matrix = Int8Matrix(q=q, scale=scale, zero_point=zero_point, group=ctx.group)
            grad_x = grad @ dequantize(matrix, dtype=grad.dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None, None, None, None


class Int8Linear(nn.Module):
    """nn.Linear with its weight in int8: a byte per weight and 5 bytes per group of columns.

    `state_dict` has `q`, `scale`, `zero_point` and `bias`, and not `weight`, which is virtual. Casting the
    module changes the dtype it computes in; the stored weight keeps its bits.

    Args:
        matrix: the weight [out_features, in_features]; its tensors become buffers.
        dtype: of the virtual weight, its gradient and the product.
        bias: [out_features], or None.
        requires_grad: whether the weight is trained.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    q: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        matrix: Int8Matrix,
        *,
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
        requires_grad: bool = True,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.q.shape
        self.group = matrix.group
        like = torch.empty((), dtype=dtype, device=matrix.q.device)
        self.weight = VirtualWeight.over(tuple(matrix.q.shape), like, requires_grad=requires_grad)
        self.register_parameter("bias", bias)
        self.register_buffer("q", matrix.q)
        self.register_buffer("scale", matrix.scale)
        self.register_buffer("zero_point", matrix.zero_point)
        self.register_state_dict_post_hook(_leave_weight_out)
        self.register_load_state_dict_pre_hook(_refuse_dense_weight)
        self.register_load_state_dict_post_hook(_miss_no_weight)
        self._prefix = ""
        self._claim()

    def _claim(self) -> None:
        """Be the one whom the virtual weight stands for."""
        if isinstance(self.weight, VirtualWeight):
            self.weight.owner = weakref.ref(self)

    def matrix(self) -> Int8Matrix:
        """Return the weight as it is stored."""
        return Int8Matrix(q=self.q, scale=self.scale, zero_point=self.zero_point, group=self.group)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, in the dtype of the virtual weight or of autocast, as nn.Linear does."""
        if not isinstance(self.weight, VirtualWeight):
            raise RuntimeError(
                f"the weight of an Int8Linear was replaced by a {type(self.weight).__name__}, but its values "
                f"are in q, scale and zero_point; leave it alone, or call dequantize_model before"
            )
        dtype, device_type = self.weight.dtype, x.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            x = x.to(dtype)
        elif x.dtype != dtype:
            raise RuntimeError(
                f"the input is {x.dtype} and the int8 module computes in {dtype}; cast one of them"
            )
        bias = None if self.bias is None else self.bias.to(dtype)
        apply = cast("Callable[..., Tensor]", _Product.apply)
        return apply(x, self.weight, bias, self.q, self.scale, self.zero_point, self.group)

    def extra_repr(self) -> str:
        """Return what `print` says."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, group={self.group}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        """Move or cast as torch does, but keep the virtual weight one element and every bit of the scales."""
        weight, scale = self.weight, self.scale
        if not isinstance(weight, VirtualWeight):
            return super()._apply(fn, recurse)

        def careful(x: Tensor) -> Tensor:
            if x is weight:
                return fn(x.detach()[:1, :1]).fill_(torch.nan).expand(x.shape)
            if x is scale:  # as integers, which no cast to a floating dtype touches
                return fn(x.view(torch.int32)).view(torch.float32)
            return fn(x)

        super()._apply(careful, recurse)
        new = self.weight
        if not isinstance(new, VirtualWeight):  # made by torch, where a module comes from or goes to meta
            self.weight = VirtualWeight.over(tuple(new.shape), new, requires_grad=new.requires_grad)
        self._claim()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come back from a copy or a pickle, and claim the weight that came along."""
        super().__setstate__(state)
        self._claim()


def _leave_weight_out(_module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    del state_dict[prefix + "weight"]


def _refuse_dense_weight(module: Int8Linear, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Say what to do with a dense checkpoint, and note where in the model the module is."""
    module._prefix = prefix
    errors: list[str] = rest[-1]
    if state_dict.pop(prefix + "weight", None) is not None:
        errors.append(f"{prefix}weight is dense and its module int8; load it before quantize_model.")


def _miss_no_weight(module: Int8Linear, incompatible: Any) -> None:
    name = module._prefix + "weight"
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key != name]


def check_int8_group(name: str, group: Mapping[str, Any]) -> None:
    """Refuse a group that cannot update int8 weights.

    Raises:
        ValueError: with what to set.
    """
    if group["kind"] != "apollo":
        raise ValueError(
            f"{name} has an int8 weight, which a {group['kind']!r} group cannot update; give it to a group "
            f"of kind 'apollo', or leave it out of quantize_model"
        )
    if group["bf16_update"] == "kahan":
        raise ValueError(
            f"bf16_update='kahan' keeps a bf16 rest per weight, for which the int8 weight {name} has no use; "
            f"set bf16_update to 'stochastic' or 'nearest' for its group"
        )
