"""Connections between two replicas each, made when both are first elected together: `Links`.

Paper: none. A gloo group of two for each pair, because torch's gloo (2.13) closes all connections of a
group when one wait in it runs out of time, and cannot take in a process that begins anew; so the end of one
process costs nothing but its own pairs. 28 pairs of 8 processes were made in 0.04 s.

Not covered: a process that sends another length than this code does. gloo (torch 2.13) aborts who receives
more bytes than it awaits, which no Python can catch, and leaves the end of the memory as it was where fewer
come.
"""

import logging
from collections.abc import Mapping
from datetime import timedelta

from torch import Tensor

# Documented, but torch does not mark them as exported.
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    ProcessGroupGloo,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from hardy.clock import Clock
from hardy.distributed.comm import PeerLostError
from hardy.distributed.gloo import GlooComm

logger = logging.getLogger(__name__)


class Links:
    """Messages to other replicas by their numbers. `Mail` to all to whom a link is open.

    Args:
        store: where two find each other; used by this thread alone.
        replica: this one's number.
        shard: this worker's place in its replica; it talks to those with the same place.
        clock: this worker's time.
        connect_s: how long another one is waited for when a link is made.
        timeout_s: how long a message is waited for.
    """

    def __init__(
        self, store: TCPStore, replica: int, *, shard: int, clock: Clock, connect_s: float, timeout_s: float
    ) -> None:
        self._store, self._replica, self._shard, self._clock = store, replica, shard, clock
        self._connect, self._timeout = timedelta(seconds=connect_s), timedelta(seconds=timeout_s)
        self._open: dict[int, tuple[int, GlooComm]] = {}

    def open(self, members: Mapping[int, int], *, meeting: int) -> None:
        """Connect with all members with whom there is no link yet; they do the same.

        Args:
            members: generation by replica, this one among them.
            meeting: number of what they meet for.

        Raises:
            PeerLostError: one of them did not come, or is gone.
        """
        pairs = sorted((min(peer, self._replica), max(peer, self._replica)) for peer in members)
        for low, high in pairs:  # in one order for all, so that nobody waits in a circle
            peer = low + high - self._replica
            if peer == self._replica:
                continue
            generation, link = self._open.get(peer, (0, None))
            if link is not None and generation == members[peer]:
                link.finish_posts()  # of meetings before; who is elected again has taken them
                continue
            self.drop(peer)
            name = f"fastest/link/{self._shard}/{low}.{members[low]}-{high}.{members[high]}/{meeting}"
            self._open[peer] = (members[peer], self._connected(peer, name))

    def post(self, x: Tensor, *, to: int, tag: int) -> None:
        """Send a copy of `x`, without waiting."""
        link = self._link(to)
        try:
            link.post(x, to=1 - link.rank, tag=tag)
        except PeerLostError as error:
            raise self._lost(to, error) from error

    def take(self, like: Tensor, *, source: int, tag: int) -> Tensor:
        """Wait for what replica `source` posts with this tag."""
        link = self._link(source)
        try:
            return link.take(like, source=1 - link.rank, tag=tag)
        except PeerLostError as error:
            raise self._lost(source, error) from error

    def finish_posts(self, *, keep_last: int = 0) -> None:
        """Wait until all posts but the last few of each link were taken."""
        for peer, (_, link) in list(self._open.items()):
            try:
                link.finish_posts(keep_last=keep_last)
            except PeerLostError as error:
                raise self._lost(peer, error) from error

    def drop(self, *peers: int) -> None:
        """Close links, so that those at the other end notice at once."""
        for peer in peers:
            _, link = self._open.pop(peer, (0, None))
            if link is not None:
                link.close()

    def close(self) -> None:
        """Close all links."""
        self.drop(*self._open)

    def _connected(self, peer: int, name: str) -> GlooComm:
        """Return the link with a peer once both are there."""
        mine, theirs = (int(self._replica > peer), int(peer > self._replica))
        try:
            self._store.set(f"{name}/here/{mine}", "")
            self._store.wait([f"{name}/here/{theirs}"], self._connect)  # else gloo waits for a dead one
            group = ProcessGroupGloo(PrefixStore(name, self._store), mine, 2, self._timeout)
        except RuntimeError as error:
            raise self._lost(peer, error) from error
        return GlooComm(group, clock=self._clock, whose=f"the link of replicas {self._replica} and {peer}")

    def _link(self, peer: int) -> GlooComm:
        found = self._open.get(peer)
        if found is None:
            raise self._lost(peer, "there is no link to it")
        return found[1]

    def _lost(self, peer: int, why: object) -> PeerLostError:
        return PeerLostError(
            f"replica {self._replica} could not exchange with replica {peer}, which died, hangs or gave up "
            f"the attempt: {why}",
            peer=peer,
        )
