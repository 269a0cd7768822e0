"""The gradient of the loss on text that is known to be good, on which dSTAR and its relatives lean.

Paper: J. Yan et al., "dSTAR", 2024 (arXiv 2412.07151). Letters: g_v the trusted gradient.

Differs from the paper, whose server computes g_v: here every worker does, on the same text.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from hardy.distributed.sharded import local_part


class Trusted(NamedTuple):
    """g_v at one step."""

    parts: list[Tensor]
    """This worker's part of it, one tensor per parameter."""
    agree: Literal["median", "own"]
    """Whether the median over the workers counts, or each its own."""


class TrustedGradient:
    """g_v at the weights of a step, computed anew every `every_steps` steps and kept in between.

    Args:
        parameters: whose gradient.
        draw: takes the number of a trusted batch and adds the gradient of its mean loss to `grad`, as a
            backward pass does; of a sharded model each worker gets its shard.
        every_steps: steps between two of them.
        agree: whether the median over the workers counts, against one whose hardware fails, or each its own.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        draw: Callable[[int], None],
        *,
        every_steps: int = 1,
        agree: Literal["median", "own"] = "median",
    ) -> None:
        self._agree: Literal["median", "own"] = agree
        self._parameters, self._draw, self._every_steps = list(parameters), draw, every_steps
        self.kept = [torch.zeros_like(param) for param in parameters] if every_steps > 1 else []
        """g_v as it is kept between steps; empty where each step has its own."""

    def at(self, step: int) -> Trusted:
        """Return g_v for step `step`, from 0; the parameters' `grad` is left alone."""
        number, since = divmod(step, self._every_steps)
        if since:
            return Trusted([local_part(kept) for kept in self.kept], self._agree)
        held = [param.grad for param in self._parameters]
        for param in self._parameters:
            param.grad = None
        try:
            self._draw(number)
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        finally:
            for param, grad in zip(self._parameters, held, strict=True):
                param.grad = grad
        for kept, grad in zip(self.kept, found, strict=bool(self.kept)):
            kept.copy_(grad)
        return Trusted([local_part(grad) for grad in found], self._agree)
