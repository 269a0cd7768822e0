"""What a worker sends: its gradient or its momentum, beside the trusted gradient; and how that is remembered.

Paper: S. P. Karimireddy, L. He, M. Jaggi, "Learning from History for Byzantine Robust Optimization", 2021.
Letters: m momentum of a worker, beta its rate, g its gradient.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hardy.distributed.aggregation.stack import working_dtype
from hardy.distributed.comm import Communicator
from hardy.distributed.robust.exchange import dot
from hardy.distributed.robust.trusted import Trusted, TrustedGradient
from hardy.distributed.sharded import local_part


class Prepared(NamedTuple):
    """This worker's part of what is combined at one step, one tensor per parameter."""

    grads: list[Tensor]
    """What the optimizer will look at: the memory of `grad`."""
    sent: list[Tensor]
    trusted: Trusted | None


class Sender:
    """One worker's side before anything is exchanged.

    Args:
        model: whose parameters are trained.
        inner: the workers of this replica.
        momentum: beta; 0 sends gradients as they are.
        trusted: gives the trusted gradient, where the rule needs it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inner: Communicator,
        momentum: float = 0.0,
        trusted: TrustedGradient | None = None,
    ) -> None:
        named = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self.names, self.parameters = list(named), list(named.values())
        self._inner, self._beta, self._trusted = inner, momentum, trusted
        self._momentum = self.empty() if momentum else []

    @property
    def like(self) -> list[Tensor]:
        """Return shapes, dtypes and devices of what is sent."""
        return [local_part(param) for param in self.parameters]

    def prepare(self, step: int) -> Prepared:
        """Return what is to be combined at step `step`, from 0; a missing gradient counts as zeros."""
        for param in self.parameters:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        grads = [local_part(param.grad) for param in self.parameters if param.grad is not None]
        trusted = self._trusted.at(step) if self._trusted is not None else None
        return Prepared(grads, self._with_momentum(grads) if self._beta else grads, trusted)

    def _with_momentum(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Return m = beta m + (1 - beta) g; a gradient that is not finite is sent as it is and not kept."""
        is_finite = self._inner.sum(dot(grads, grads)).isfinite()
        fault = torch.where(is_finite, 0.0, math.nan)
        sent: list[Tensor] = []
        for kept, grad in zip(map(local_part, self._momentum), grads, strict=True):
            kept.copy_(torch.where(is_finite, kept.lerp(grad.to(kept.dtype), 1 - self._beta), kept))
            sent.append((kept + fault).to(grad.dtype))
        return sent

    def state(self) -> dict[str, Tensor]:
        """Return the momentum, and the trusted gradient where one serves several steps."""
        kept = self._trusted.kept if self._trusted is not None else []
        return self.named("momentum", self._momentum) | self.named("trusted", kept)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take it back."""
        for name, tensor in self.state().items():
            local_part(tensor).copy_(local_part(state[name]))

    def named(self, part: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return one tensor per parameter under its name; none where there are none."""
        return {f"{part}/{name}": x for name, x in zip(self.names, tensors, strict=True)} if tensors else {}

    def empty(self) -> list[Tensor]:
        """Return zeros, laid out as the parameters: fp64 where these are, else fp32."""
        return [torch.zeros_like(param, dtype=working_dtype(param)) for param in self.parameters]
