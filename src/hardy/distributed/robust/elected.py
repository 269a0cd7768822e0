"""A communicator among some of the replicas, by messages between two; nobody else is waited for.

Paper: none. A sum is cut into slices, each added up by one member in rank order and handed to all, so all get
the same bits; it sends what a ring would send. A member that dies fails only those who wait for it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hardy.clock import Clock
from hardy.distributed.comm import Mail, check_mean, check_rows, check_source, check_sum, copy_of

SMALL_BYTES = 4096
"""Up to this size everyone sends all of it to everyone, which is one exchange instead of two."""
_TAGS_OF_A_MEETING = 1 << 16


class ElectedComm:
    """The elected of one attempt, seen from one of them. A `Communicator`.

    Args:
        mail: messages to replicas, by their numbers.
        replicas: the members' numbers; ranks count along them.
        replica: this one's number.
        meeting: number of the attempt, so that no message is mistaken for one of another.
        clock: this worker's time.

    Raises:
        PeerLostError: by every method; report it, and close the connections to the others, who may wait.
    """

    def __init__(
        self, mail: Mail, replicas: Sequence[int], *, replica: int, meeting: int, clock: Clock
    ) -> None:
        self.replicas = tuple(replicas)
        self.rank, self.size = self.replicas.index(replica), len(self.replicas)
        self.clock = clock
        self.bytes_sent = 0
        self._mail = mail
        self._first_tag = meeting % (1 << 12) * _TAGS_OF_A_MEETING
        self._calls = 0

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x`, added in rank order."""
        check_sum(x)
        if x.nbytes <= SMALL_BYTES:
            return add_up(self.all_gather(x))
        flat = copy_of(x).reshape(-1)
        each = -(-flat.numel() // self.size)
        rows = torch.cat([flat, flat.new_zeros(each * self.size - flat.numel())]).view(self.size, each)
        slices = self.all_gather(add_up(self.all_to_all(rows)))
        return slices.view(-1)[: flat.numel()].reshape(x.shape)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of `x`."""
        check_mean(x)
        return self.sum(x).div_(self.size)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return everyone's `x` stacked in rank order."""
        return self._exchange([x] * self.size)

    def all_to_all(self, x: Tensor) -> Tensor:
        """Send row j of `x` to member j; return the rows sent to us, by who sent them."""
        check_rows(x, num_workers=self.size)
        return self._exchange(list(x))

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        """Return member `source`'s `x`."""
        check_source(source, num_workers=self.size)
        tag = self._next_tag()
        if source != self.rank:
            return self._mail.take(x, source=self.replicas[source], tag=tag)
        for to in self._others():
            self._post(x, to, tag)
        return copy_of(x)

    def barrier(self) -> None:
        """Wait until everyone is here."""
        self.all_gather(torch.zeros(1, dtype=torch.uint8))

    def _exchange(self, parts: Sequence[Tensor]) -> Tensor:
        """Send each member its part; return what all sent to us, in rank order."""
        tag = self._next_tag()
        for to in self._others():
            self._post(parts[to], to, tag)
        own = parts[self.rank]
        came = [copy_of(own)] * self.size
        for source in self._others():
            came[source] = self._mail.take(own, source=self.replicas[source], tag=tag)
        return torch.stack(came)

    def _post(self, x: Tensor, to: int, tag: int) -> None:
        self._mail.post(x, to=self.replicas[to], tag=tag)
        self.bytes_sent += x.nbytes

    def _others(self) -> list[int]:
        """Return the ranks of the others, from the next one on, so that not all write to the same first."""
        return [(self.rank + i) % self.size for i in range(1, self.size)]

    def _next_tag(self) -> int:
        self._calls += 1
        return self._first_tag + self._calls % _TAGS_OF_A_MEETING


def add_up(rows: Tensor) -> Tensor:
    """Add one row after the other, so that the order of additions is the same on every machine."""
    total = rows[0].clone()
    for row in rows[1:].unbind():
        total += row
    return total
