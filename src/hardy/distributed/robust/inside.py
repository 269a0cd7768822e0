"""The workers of one replica while they exchange with other replicas: where one loses one, all of them stop.

Paper: none. Each worker exchanges with those in its place in the other replicas, and may lose one of them
while its neighbours, who have lost nobody, wait for it in a sum over their replica. So before anything that
they do together they ask each other whom they lost (`whom_lost`), and so does the one that gives up: its
question meets theirs, wherever they are, and all give the same attempt up.
"""

import torch
from torch import Tensor

from hardy.clock import Clock
from hardy.distributed.comm import Communicator, PeerLostError, WorkerLostError, check_mean, check_sum
from hardy.distributed.robust.elected import add_up

_NOBODY, _SOMEBODY = -2, -1


class StoppedError(WorkerLostError):
    """Another worker of this replica gives the attempt up, and knows that this one has noticed."""

    def __init__(self, peer: int) -> None:
        super().__init__("another worker of this replica could not finish its exchange with the others")
        self.peer = peer
        """The replica that was lost; -1 for one unknown."""


def whom_lost(inner: Communicator, error: WorkerLostError | None) -> int | None:
    """Return which replica the workers of this one lost, -1 for one unknown; None where none failed.

    Args:
        inner: the workers of this replica, who all ask.
        error: why this one gives up.
    """
    if isinstance(error, StoppedError):  # that it was raised is the answer
        return error.peer
    lost = _NOBODY if error is None else error.peer if isinstance(error, PeerLostError) else _SOMEBODY
    if inner.size > 1:
        lost = int(inner.all_gather(torch.tensor(lost)).max())
    return None if lost == _NOBODY else lost


class Inside:
    """The workers of one replica during one attempt. A `Communicator`.

    Sums are added in rank order by each, so that replicas on unlike machines get the same bits.

    Args:
        inner: the workers.

    Raises:
        StoppedError: by every method, when one of them gives up.
    """

    def __init__(self, inner: Communicator) -> None:
        self._inner = inner

    @property
    def rank(self) -> int:
        """This worker's place in its replica."""
        return self._inner.rank

    @property
    def size(self) -> int:
        """Number of workers."""
        return self._inner.size

    @property
    def clock(self) -> Clock:
        """This worker's time."""
        return self._inner.clock

    @property
    def bytes_sent(self) -> int:
        """Bytes this worker has sent so far."""
        return self._inner.bytes_sent

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x`, added in rank order."""
        check_sum(x)
        return add_up(self.all_gather(x))

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of `x`."""
        check_mean(x)
        return self.sum(x).div_(self.size)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return everyone's `x` stacked in rank order."""
        return self._going_on().all_gather(x)

    def all_to_all(self, x: Tensor) -> Tensor:
        """Send row j of `x` to worker j; return the rows sent to us, by who sent them."""
        return self._going_on().all_to_all(x)

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        """Return worker `source`'s `x`."""
        return self._going_on().broadcast(x, source=source)

    def barrier(self) -> None:
        """Wait until everyone is here."""
        self._going_on().barrier()

    def _going_on(self) -> Communicator:
        """Return the workers, once all of them have said that they go on."""
        lost = whom_lost(self._inner, None)
        if lost is not None:
            raise StoppedError(lost)
        return self._inner
