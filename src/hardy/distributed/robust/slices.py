"""Gradients of N workers, cut so that each worker holds one part of all of them: N rows, few columns.

Paper: the all-to-all form of a reduce-scatter; what a ring all-reduce sends, each worker sends here too
(2 d (N - 1) / N values for d of them). Letters: N workers, d values of a slice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hardy.distributed.comm import Communicator
from hardy.distributed.strategy import BUCKET_BYTES, buckets


class Slices:
    """Tensors of one layout, cut into one slice per worker and put together again.

    Padding is zeros, which change neither a norm nor a product nor any coordinate that counts.

    Args:
        like: what is cut: shapes, dtypes and devices, the same on all workers.
        comm: the workers.
        bucket_bytes: tensors of one dtype travel together, until they are so large.
    """

    def __init__(
        self, like: Sequence[Tensor], comm: Communicator, *, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        place = {id(tensor): i for i, tensor in enumerate(like)}
        self._buckets = [
            [place[id(tensor)] for tensor in bucket] for bucket in buckets(like, bucket_bytes=bucket_bytes)
        ]
        self._comm = comm
        sizes = [sum(like[i].numel() for i in bucket) for bucket in self._buckets]
        widths = [-(-size // comm.size) for size in sizes]
        self.first_columns = first_columns(widths, comm)
        """Where this worker's slice of each bucket begins, among the columns of all."""
        self.num_columns = sum(widths) * comm.size
        """Of all workers, with what is padded."""

    def trade(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return this worker's slice of everyone's tensors: one block [N, d] per bucket."""
        return [self._comm.all_to_all(self._rows(tensors, bucket)) for bucket in self._buckets]

    def own(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return this worker's slice of its own tensors, [d] per bucket; nothing is sent."""
        return [self._rows(tensors, bucket)[self._comm.rank] for bucket in self._buckets]

    def put_together(self, slices: Sequence[Tensor], *, into: Sequence[Tensor]) -> None:
        """Fill `into` with what the workers made of their slices, [d] per bucket."""
        for bucket, slice_d in zip(self._buckets, slices, strict=True):
            _fill([into[i] for i in bucket], self._comm.all_gather(slice_d).reshape(-1))

    def add_up(self, tensors: Sequence[Tensor], *, into: Sequence[Tensor]) -> None:
        """Fill `into` with the sum of everyone's tensors."""
        for bucket in self._buckets:
            _fill([into[i] for i in bucket], self._comm.sum(self._rows(tensors, bucket)).reshape(-1))

    def _rows(self, tensors: Sequence[Tensor], bucket: Sequence[int]) -> Tensor:
        """Return a bucket as rows of equal length, one for each worker."""
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in bucket])
        padding = -flat.numel() % self._comm.size
        return torch.nn.functional.pad(flat, (0, padding)).view(self._comm.size, -1)


def first_columns(widths: Sequence[int], comm: Communicator) -> list[int]:
    """Return where this worker's slices begin among the columns of all, who have slices as wide.

    Args:
        widths: columns of each slice.
        comm: the workers, by the order of whose ranks a tensor is cut.
    """
    return [sum(widths[:i]) * comm.size + comm.rank * width for i, width in enumerate(widths)]


def _fill(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Give tensors their values from a flat one, which may be longer."""
    numbers = [tensor.numel() for tensor in tensors]
    for tensor, part in zip(tensors, flat[: sum(numbers)].split(numbers), strict=True):
        tensor.copy_(part.view_as(tensor))
