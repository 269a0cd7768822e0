"""The table of low-memory optimizers and the small model on which each keeps its promises: `low_memory`."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from hardy.optim.optimizers import APOLLO, SMMF, AdaptiveAdamW, APOLLOMini, RuleOptimizer

BF16 = torch.bfloat16
SHAPES = {
    "tall": (12, 5),
    "wide": (4, 12),
    "experts": (3, 4, 6),
    "filters": (4, 3, 2, 2),
    "vector": (6,),
    "scalar": (),
}


class Net(nn.Module):
    """A tall and a wide matrix, a stack of experts, filters, a vector and a scalar; all get gradients."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, x, image):
        hidden = torch.tanh(torch.tanh(x @ self.tall.T) @ self.wide.T)
        hidden = torch.einsum("bi,eij->bj", hidden, self.experts) * self.vector * self.scalar
        return hidden.square().mean() + torch.conv2d(image, self.filters).square().mean()


@dataclass(kw_only=True)
class LowMemory:
    """One way to make an optimizer, and how to train with it."""

    cls: type[RuleOptimizer]
    settings: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    """Kinds of parameters that do not have the optimizer's own."""
    dtype: torch.dtype = torch.float32
    known: dict[range, list[torch.Tensor]] = field(default_factory=dict)
    """Runs that several tests compare with."""

    def net(self) -> Net:
        return Net().to(self.dtype)

    def make(self, net: nn.Module, **settings: Any) -> RuleOptimizer:
        named = list(net.named_parameters())
        own = [(name, param) for name, param in named if name not in self.kinds]
        groups: list[dict[str, Any]] = [{"params": own}]
        groups += [{"params": [(n, p)], "kind": self.kinds[n]} for n, p in named if n in self.kinds]
        return self.cls(groups, **{"lr": 0.02, **self.settings, **settings})

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(100 + step)
        x, image = torch.randn(7, 5, generator=generator), torch.randn(2, 3, 3, 3, generator=generator)
        return x.to(self.dtype), image.to(self.dtype)

    def backward(self, net: nn.Module, step: int) -> torch.Tensor:
        """Make the gradients of a step, which depend on its number and the weights alone."""
        net.zero_grad(set_to_none=True)
        loss = net(*self.batch(step))
        loss.backward()
        return loss

    def train(self, net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
        """Return the weights after the steps."""
        for step in steps:
            self.backward(net, step)
            optimizer.step()
        return [param.detach().clone() for param in net.parameters()]

    def trained(self, steps: range, **settings: Any) -> list[torch.Tensor]:
        """Return the weights of a new model after the steps; without settings, of a run made once for all."""
        if settings:
            net = self.net()
            return self.train(net, self.make(net, **settings), steps)
        if steps not in self.known:
            net = self.net()
            self.known[steps] = self.train(net, self.make(net), steps)
        return self.known[steps]


VECTORS = {"vector": "adamw", "scalar": "adamw"}


def apollo(**settings: Any) -> LowMemory:
    kinds, dtype = settings.pop("kinds", VECTORS), settings.pop("dtype", torch.float32)
    own = {"rank": 2, "update_proj_gap": 3, "weight_decay": 0.1}
    return LowMemory(cls=APOLLO, settings={**own, **settings}, kinds=kinds, dtype=dtype)


def smmf(**settings: Any) -> LowMemory:
    kinds, dtype = settings.pop("kinds", {}), settings.pop("dtype", torch.float32)
    return LowMemory(cls=SMMF, settings={"weight_decay": 0.1, **settings}, kinds=kinds, dtype=dtype)


def adamw(**settings: Any) -> LowMemory:
    dtype = settings.pop("dtype", torch.float32)
    return LowMemory(cls=AdaptiveAdamW, settings=settings, dtype=dtype)


LOW_MEMORY: dict[str, Callable[[], LowMemory]] = {
    "adamw": adamw,
    "adamw, bf16, skip": lambda: adamw(dtype=BF16, nonfinite="skip"),
    "adamw, kahan": lambda: adamw(dtype=BF16, bf16_update="kahan"),
    "apollo, channel": apollo,
    "apollo, tensor": lambda: apollo(scale_type="tensor", scale="auto"),
    "apollo, rademacher": lambda: apollo(proj="rademacher", share_projection=True),
    "apollo, svd": lambda: apollo(proj="svd"),
    "apollo, exact svd": lambda: apollo(proj="svd", svd_method="exact", stacked=False),
    "apollo, corrected": lambda: apollo(limiter="corrected", zero_grad="decay"),
    "apollo, no limiter": lambda: apollo(limiter="off", bias_correction=False),
    "apollo, kahan": lambda: apollo(dtype=BF16, bf16_update="kahan"),
    "apollo, fp64": lambda: apollo(dtype=torch.float64),
    "apollo mini": lambda: LowMemory(cls=APOLLOMini, kinds=VECTORS),
    "apollo mini, bf16": lambda: LowMemory(cls=APOLLOMini, kinds=VECTORS, dtype=BF16),
    "smmf": smmf,
    "smmf, no momentum": lambda: smmf(beta1=None),
    "smmf, per slice": lambda: smmf(per_slice=True),
    "smmf, dense vectors": lambda: smmf(vector_reshape=False),
    "smmf, a byte per sign": lambda: smmf(pack=False, mask_zero_grad=False),
    "smmf, l2, limit": lambda: smmf(weight_decay_mode="l2", max_update=0.5, shape_policy="virtual"),
    "smmf, bf16, skip": lambda: smmf(dtype=BF16, nonfinite="skip"),
    "smmf, kahan": lambda: smmf(dtype=BF16, bf16_update="kahan", per_slice=True, vector_reshape=False),
    "mixed": lambda: apollo(kinds=VECTORS | {"wide": "smmf", "filters": "smmf"}),
}
"""Every entry gets every promise."""


@functools.cache
def entry_of(name: str) -> LowMemory:
    """Return an entry of the table, one object for all tests."""
    return LOW_MEMORY[name]()


@pytest.fixture(params=LOW_MEMORY)
def low_memory(request):
    """Each entry of the table in turn."""
    return entry_of(request.param)


@pytest.fixture
def low_memory_named():
    """Return an entry of the table by its name."""
    return entry_of
