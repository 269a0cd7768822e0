"""A gloo group that torch.distributed does not know of, so that processes may come and go between groups.

Paper: none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hardy.clock import Clock
from hardy.distributed import costs
from hardy.distributed.comm import (
    Outbox,
    WorkerLostError,
    as_bytes,
    check_mean,
    check_peer,
    check_rows,
    check_source,
    check_sum,
    copy_of,
    lost_peer,
)


class GlooComm:
    """A gloo group that belongs to no world of torch.distributed; tensors of a GPU travel through the host.

    Args:
        group: a `torch.distributed.ProcessGroupGloo`; torch's types leave out what it can do.
        clock: this worker's time.
        whose: who the workers are, for errors.

    Raises:
        WorkerLostError: by every method, when a peer died or came later than the group's timeout; from then
            on by all collectives.
        PeerLostError: by `post`, `take` and `finish_posts`, which leave the others' connections open.
    """

    def __init__(self, group: Any, *, clock: Clock, whose: str) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.clock = clock
        self.bytes_sent = 0
        self._group, self._whose = group, whose
        self._outbox = Outbox()

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the workers."""
        check_sum(x)
        result = copy_of(x).cpu()
        with self._sending("sum", costs.all_reduce(x.nbytes, self.size)):
            self._open().allreduce([torch.view_as_real(result) if result.is_complex() else result]).wait()
        return result.to(x.device)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of `x` over the workers."""
        check_mean(x)
        return self.sum(x).div_(self.size)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return everyone's `x` stacked in rank order."""
        result = torch.empty(self.size, *x.shape, dtype=x.dtype)
        parts = [as_bytes(part) for part in result.unbind()]
        with self._sending("all_gather", costs.all_gather(x.nbytes, self.size)):
            self._open().allgather([parts], [as_bytes(copy_of(x).cpu())]).wait()
        return result.to(x.device)

    def all_to_all(self, x: Tensor) -> Tensor:
        """Send row j of `x` to worker j; return the rows sent to us, by who sent them."""
        check_rows(x, num_workers=self.size)
        result = torch.empty(x.shape, dtype=x.dtype)
        with self._sending("all_to_all", costs.all_to_all(x.nbytes, self.size)):
            self._open().alltoall_base(as_bytes(result), as_bytes(copy_of(x).cpu()), [], []).wait()
        return result.to(x.device)

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        """Return worker `source`'s `x`."""
        check_source(source, num_workers=self.size)
        result = copy_of(x).cpu()
        with self._sending("broadcast", costs.broadcast(x.nbytes, self.size)):
            self._open().broadcast(as_bytes(result), source, None).wait()
        return result.to(x.device)

    def barrier(self) -> None:
        """Wait until everyone is here."""
        with self._sending("barrier", costs.barrier(self.size)):
            self._open().barrier().wait()

    def post(self, x: Tensor, *, to: int, tag: int) -> None:
        """Send a copy of `x` to worker `to`, without waiting."""
        check_peer(to, rank=self.rank, num_workers=self.size)
        sent = as_bytes(copy_of(x).cpu())
        try:
            handle = self._open().send([sent], to, tag)
        except RuntimeError as error:
            raise lost_peer(self, to, error) from error
        self._outbox.add(to, sent, handle)
        self.bytes_sent += x.nbytes

    def take(self, like: Tensor, *, source: int, tag: int) -> Tensor:
        """Wait for what worker `source` posts with this tag."""
        check_peer(source, rank=self.rank, num_workers=self.size)
        result = torch.empty(like.shape, dtype=like.dtype)
        try:
            self._open().recv([as_bytes(result)], source, tag).wait()
        except RuntimeError as error:
            raise lost_peer(self, source, error) from error
        return result.to(like.device)

    def finish_posts(self, *, keep_last: int = 0) -> None:
        """Wait until all posts but the last few were taken."""
        self._outbox.finish(keep_last=keep_last, lost=lambda to, error: lost_peer(self, to, error))

    def close(self) -> None:
        """Close all connections, so that those who still wait for this worker notice at once.

        Only the end of the group does: torch's `abort` and `shutdown` leave those of gloo open (torch 2.13).
        Posts that were not taken would keep it alive, so they are dropped.
        """
        self._outbox = Outbox()
        self._group = None

    def _open(self) -> Any:
        if self._group is None:
            raise RuntimeError("its connections are closed")
        return self._group

    @contextmanager
    def _sending(self, call: str, traffic: costs.Traffic) -> Iterator[None]:
        """Count what is sent; once one call has failed, let no other hang."""
        try:
            yield
        except RuntimeError as error:
            self.close()
            raise WorkerLostError(
                f"worker {self.rank} of {self._whose} could not finish {call!r} with the others: one of them "
                f"died, or came later than strategy.timeout_s. torch says: {error}"
            ) from error
        self.bytes_sent += traffic.bytes_sent
