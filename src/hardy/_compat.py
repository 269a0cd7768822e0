"""What differs between the releases of torch that hardy supports; each entry says when it can go."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def accepts(function: Callable[..., Any], parameter: str) -> bool:
    """Return whether `function` takes a parameter of that name.

    Example:
        >>> accepts(sorted, "key"), accepts(sorted, "colour")
        (True, False)
    """
    return parameter in inspect.signature(function).parameters


@cache
def varlen_attention() -> tuple[Callable[..., Any], bool]:
    """Return torch's packed attention kernel and whether it takes fewer key than query heads by itself.

    torch 2.11 has `scale` and `window_size` but documents no `enable_gqa`; 2.12 to 2.14 have it. All take the
    window as a tuple (a list switches the kernel's test for causality off). The second value can go when no
    supported torch lacks `enable_gqa`, that is together with torch 2.11.

    Raises:
        ImportError: this build of torch has no `torch.nn.attention.varlen`.
    """
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, accepts(varlen_attn, "enable_gqa")


def reduce_scatter_single() -> Callable[..., Any]:
    """Return the reduce-scatter of one tensor, which torch 2.13 renamed. Goes with torch 2.12."""
    import torch.distributed as dist

    return getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_single() -> Callable[..., Any]:
    """Return the gather into one tensor, which torch 2.13 renamed. Goes with torch 2.12."""
    import torch.distributed as dist

    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def sync_buffers_option() -> str:
    """Return what DDP calls the option to send buffers around in each forward pass. Goes with torch 2.12."""
    from torch.nn.parallel import DistributedDataParallel

    new = "forward_sync_buffers"
    return new if accepts(DistributedDataParallel.__init__, new) else "broadcast_buffers"
