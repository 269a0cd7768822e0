"""What an algorithm may ask of the other workers, alone or through torch.distributed (simulated: `simulation`).

Algorithms take a `Communicator` and never call `torch.distributed`; every method is collective: all workers call
it, in the same order, with tensors of equal shape and dtype. Inputs are left alone, results are new tensors.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hardy.clock import Clock, WallClock


class Communicator(Protocol):
    """The other workers, seen from one of them."""

    rank: int
    """This worker, from 0."""
    size: int
    """Number of workers."""
    clock: Clock
    """This worker's time: wall-clock in training, virtual in simulation."""
    bytes_sent: int
    """Bytes this worker has sent so far, counted as a ring would send them."""

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the workers."""
        ...

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of `x` over the workers."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Return everyone's `x` stacked in rank order, shape (size, *x.shape)."""
        ...

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        """Return worker `source`'s `x`."""
        ...

    def barrier(self) -> None:
        """Wait until everyone is here."""
        ...
