"""What happens to the inner optimizer's state when replicas meet: it is kept, averaged, reset or repaired.

A replica whose weights were NaN has NaN in its moments too: with new weights alone it would be left out for
ever. Nothing is assumed of the optimizer but torch's `state`: what is taken away, it creates anew.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from hardy.distributed.comm import Communicator
from hardy.distributed.sharded import local_part


def reset(optimizer: Optimizer, params: Iterable[Tensor]) -> None:
    """Forget the state of parameters; the next step begins it anew."""
    for param in params:
        optimizer.state.pop(param, None)


def average(optimizer: Optimizer, params: Iterable[Tensor], outer: Communicator) -> None:
    """Replace floating state by its mean over the replicas; counters and signs stay each replica's own."""
    for param in params:
        for value in optimizer.state.get(param, {}).values():
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
                local = local_part(value)
                local.copy_(outer.mean(local.detach().float()))


def settle(how: str, optimizer: Optimizer, params: Sequence[Tensor], outer: Communicator) -> None:
    """Do at a round what `how` says: "keep", "average" or "reset"."""
    if how == "average":
        average(optimizer, params, outer)
    elif how == "reset":
        reset(optimizer, params)


def repair(optimizer: Optimizer, params: Sequence[Tensor], parts: Communicator) -> bool:
    """Begin the state anew if anything in it is not finite; the workers `parts` of a replica decide alike."""
    count = torch.zeros((), dtype=torch.float64)
    for param in params:
        for value in optimizer.state.get(param, {}).values():
            if isinstance(value, Tensor) and value.is_floating_point():
                count += float(not bool(local_part(value).isfinite().all()))
    is_broken = bool(parts.sum(count) > 0)
    if is_broken:
        reset(optimizer, params)
    return is_broken
