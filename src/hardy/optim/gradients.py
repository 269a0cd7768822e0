"""The gradients of parameters, plain or sharded: norms, faults, scaling. Each worker reads its own part.

Beside the guard, which sees norms alone. Sharded gradients are those of FSDP2, HSDP and TP (DTensor).
"""

import inspect
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from hardy.optim._sharded import Round, Split, Sum, exchange, local_part, shard_of


def tensor_norms(parameters: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of each parameter's gradient, [parameters] float64; 0 where there is none.

    Shards are added up over the axes that split a parameter, in one sum per process group; all workers must
    call this with the same parameters. What is narrower than fp32 is added up in fp32.
    """
    squares: list[Tensor] = []
    members: dict[tuple[Split, ...], list[int]] = defaultdict(list)
    for index, parameter in enumerate(parameters):
        members[shard_of(parameter, str(index)).splits].append(index)
        squares.append(_local_square(parameter))
    sums = {
        splits: Sum(torch.stack([squares[i] for i in indices]), splits)
        for splits, indices in members.items()
        if splits
    }
    if sums:
        exchange([Round(sums=list(sums.values()))], group_of=lambda split: split.mesh.get_group(split.axis))
    for splits, wanted in sums.items():
        for index, whole in zip(members[splits], wanted.tensor.unbind(), strict=True):
            squares[index] = whole
    return torch.stack(squares).sqrt()


def _local_square(parameter: Tensor) -> Tensor:
    """Return the squared norm of this worker's part of the gradient, 0-d float64."""
    if parameter.grad is None:
        return torch.zeros((), dtype=torch.float64, device=parameter.device)
    grad = local_part(parameter.grad.detach())
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(grad, dtype=dtype).double().square()


def nonfinite_flags(gradients: Sequence[Tensor]) -> Tensor:
    """Return for each gradient whether this worker's part holds a NaN or an Inf, [gradients] bool."""
    flags = [~local_part(gradient.detach()).isfinite().all() for gradient in gradients]
    return torch.stack(flags) if flags else torch.zeros(0, dtype=torch.bool)


@torch.no_grad()
def scale_gradients(parameters: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply the gradients in place, all by one factor (0-d) or each by its own ([parameters])."""
    for parameter, factor in zip(parameters, factors.expand(len(parameters)).unbind(), strict=True):
        if parameter.grad is not None:
            local_part(parameter.grad).mul_(factor)


def takes_grad_scale(optimizer: Optimizer) -> bool:
    """Whether `optimizer.step` divides gradients by a `grad_scale` itself, as hardy's own optimizers do."""
    return "grad_scale" in inspect.signature(optimizer.step).parameters
