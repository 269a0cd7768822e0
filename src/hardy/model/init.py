"""Initial weights by name: the same on every device, world size and sharding.

Each parameter draws from a random stream of its own name, so no draw depends on another. Matrices are normal
with deviation 0.02; those that write to the residual stream are smaller by sqrt(2 * layers), so that its
variance does not grow with depth (GPT-2's rule); norms are 1.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hardy.model.decoder import Decoder
from hardy.rng import generator_for

DEVIATION = 0.02
RESIDUAL_WRITERS = ("attention.output.weight", "feed_forward.down.weight")


def initialise(model: nn.Module, *, seed: int, place: Callable[[Tensor, Tensor], None] | None = None) -> None:
    """Draw every parameter of a decoder anew, in place; a model that brought its weights is left alone.

    Args:
        model: a decoder whose parameters have memory (after `to_empty` where it was built on meta).
        seed: the run's seed.
        place: how a full tensor (fp32, CPU) gets into a parameter, for sharded ones; None copies it. Every
            worker is given every full tensor and keeps its own part.
    """
    if not isinstance(model, Decoder):
        return
    put = place or _copy
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"parameter {name} is on the meta device; give it memory by to_empty first")
        with torch.no_grad():
            put(parameter, initial_value(name, parameter.shape, num_layers=model.shape.num_layers, seed=seed))


def initial_value(name: str, size: torch.Size, *, num_layers: int, seed: int) -> Tensor:
    """Return the full initial tensor of a decoder's parameter, fp32 on the CPU.

    Example:
        >>> initial_value("norm.weight", torch.Size([2]), num_layers=1, seed=0).tolist()
        [1.0, 1.0]
    """
    if name.endswith("norm.weight"):
        return torch.ones(size)
    deviation = DEVIATION / math.sqrt(2 * num_layers) if name.endswith(RESIDUAL_WRITERS) else DEVIATION
    return torch.empty(size).normal_(0.0, deviation, generator=generator_for(seed, "init", name))


def _copy(parameter: Tensor, value: Tensor) -> None:
    """Copy the full tensor into an unsharded parameter."""
    parameter.copy_(value)
