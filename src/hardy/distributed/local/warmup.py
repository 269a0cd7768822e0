"""Before replicas train alone: their gradients are averaged, then their weights compared."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hardy.distributed.comm import Communicator
from hardy.distributed.sharded import local_part
from hardy.distributed.strategy import BUCKET_BYTES, buckets


def average_gradients(params: Iterable[Tensor], outer: Communicator) -> None:
    """Average gradients over the replicas, in place; a replica without one counts as zero.

    Args:
        params: the same on all replicas, in the same order.
        outer: the replicas.
    """
    grads: list[Tensor] = []
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        grads.append(local_part(param.grad))
    for bucket in buckets(grads, bucket_bytes=BUCKET_BYTES):
        mean = outer.mean(torch.cat([grad.reshape(-1) for grad in bucket]))
        for grad, part in zip(bucket, mean.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def check_alike(vectors: Sequence[Tensor], outer: Communicator, *, names: Sequence[str]) -> None:
    """Refuse replicas whose weights differ.

    Args:
        vectors: of each unit, this replica's.
        outer: the replicas.
        names: of the units.

    Raises:
        RuntimeError: they do; the text names the units.
    """
    sums_U = torch.stack([torch.stack([x.double().sum(), x.double().abs().sum()]) for x in vectors]).cpu()
    apart = (outer.all_gather(sums_U) != sums_U).any(-1).any(0)
    if apart.any():
        differing = [name or "the root" for name, is_apart in zip(names, apart, strict=True) if is_apart]
        raise RuntimeError(
            f"the replicas' weights differ in {', '.join(differing[:3])} before they train alone; start all "
            f"from the same checkpoint or seed"
        )
