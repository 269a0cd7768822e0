"""What an algorithm may ask of the other workers, alone or by torch.distributed (simulated: `simulation`).

Algorithms take a `Communicator` and never call `torch.distributed`; every method is collective: all workers
call it, in the same order, with tensors of equal shape and dtype. `Mail` is what two workers do without the
others. Inputs are left alone, results are new tensors outside the autograd graph.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from hardy.clock import Clock, WallClock
from hardy.config import UserError
from hardy.distributed import costs

SUMMABLE = frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}
    | {torch.int8, torch.uint8, torch.int32, torch.int64}
)
"""The dtypes that gloo and NCCL both add up. The other collectives move bytes and take any dtype."""


class WorkerLostError(UserError):
    """Another worker died, or did not come to a collective in time."""


class PeerLostError(WorkerLostError):
    """The other end of a message has died; messages with others go on."""

    def __init__(self, text: str, *, peer: int) -> None:
        super().__init__(text)
        self.peer = peer
        """Its rank."""


class Communicator(Protocol):
    """The other workers, seen from one of them."""

    @property
    def rank(self) -> int:
        """This worker, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of workers."""
        ...

    @property
    def clock(self) -> Clock:
        """This worker's time: wall-clock in training, virtual in simulation."""
        ...

    @property
    def bytes_sent(self) -> int:
        """Bytes this worker has sent so far, counted as a ring would send them (`costs`)."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the workers; its dtype must be in `SUMMABLE`."""
        ...

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of `x` over the workers; floating or complex."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Return everyone's `x` stacked in rank order, shape (size, *x.shape)."""
        ...

    def all_to_all(self, x: Tensor) -> Tensor:
        """Send row j of `x`, shape (size, ...), to worker j; return the rows sent to us, by who sent them."""
        ...

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        """Return worker `source`'s `x`."""
        ...

    def barrier(self) -> None:
        """Wait until everyone is here."""
        ...


@runtime_checkable
class Mail(Protocol):
    """Messages between two workers. What is posted with one tag to one worker is taken in that order.

    Raises:
        PeerLostError: by `post` and `take`, when the other worker died; only messages with it are lost.
    """

    def post(self, x: Tensor, *, to: int, tag: int) -> None:
        """Send a copy of `x` to worker `to`, without waiting; never taken, it is never known to be sent."""
        ...

    def take(self, like: Tensor, *, source: int, tag: int) -> Tensor:
        """Wait for what worker `source` posts with this tag; `like` has its shape, dtype and device."""
        ...

    def finish_posts(self, *, keep_last: int = 0) -> None:
        """Wait until all posts but the last few were taken; who posts for ever calls it now and then.

        Raises:
            PeerLostError: one of them was to a worker that died; it is forgotten, the others are kept.
        """
        ...


class MailCommunicator(Communicator, Mail, Protocol):
    """The other workers, together and one by one: `Alone`, `SimComm`, `TorchComm` and `GlooComm`."""


class Alone:
    """The only worker.

    Example:
        >>> Alone().mean(torch.ones(2))
        tensor([1., 1.])
    """

    rank = 0
    size = 1
    bytes_sent = 0

    def __init__(self, *, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or WallClock()

    def sum(self, x: Tensor) -> Tensor:
        """Return a copy of `x`."""
        check_sum(x)
        return copy_of(x)

    def mean(self, x: Tensor) -> Tensor:
        """Return a copy of `x`."""
        check_mean(x)
        return copy_of(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return a copy of `x` with shape (1, *x.shape)."""
        return copy_of(x)[None]

    def all_to_all(self, x: Tensor) -> Tensor:
        """Return a copy of `x`, whose one row stays here."""
        check_rows(x, num_workers=1)
        return copy_of(x)

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        """Return a copy of `x`."""
        check_source(source, num_workers=1)
        return copy_of(x)

    def barrier(self) -> None:
        """Return at once."""

    def post(self, x: Tensor, *, to: int, tag: int) -> None:
        """Refuse: there is nobody to write to."""
        check_peer(to, rank=0, num_workers=1)

    def take(self, like: Tensor, *, source: int, tag: int) -> Tensor:
        """Refuse: there is nobody to hear from."""
        check_peer(source, rank=0, num_workers=1)
        raise AssertionError("the check refuses every peer")

    def finish_posts(self, *, keep_last: int = 0) -> None:
        """Return at once."""

    def divide(
        self, groups: Sequence[Sequence[int]], *, link: Literal["inner", "outer"] = "outer"
    ) -> "Alone":
        """Return the group that this worker is in: itself."""
        own_group(groups, rank=0, num_workers=1)
        return Alone(clock=self.clock)


class Outbox:
    """Posts under way through gloo, which loses a message whose handle or tensor is dropped too early.

    Its handles do not tell whether they are done before someone waits for them (torch 2.13).
    """

    def __init__(self) -> None:
        self._posts: deque[tuple[int, Tensor, Any]] = deque()

    def add(self, to: int, x: Tensor, handle: Any) -> None:
        """Keep what a post needs until it was taken."""
        self._posts.append((to, x, handle))

    def finish(self, *, keep_last: int, lost: Callable[[int, RuntimeError], PeerLostError]) -> None:
        """Wait for all but the last few; raise what `lost` makes of the first that fails."""
        while len(self._posts) > keep_last:
            to, _, handle = self._posts.popleft()
            try:
                handle.wait()
            except RuntimeError as error:
                raise lost(to, error) from error


class TorchComm:
    """The workers of a process group of torch.distributed: gloo for CPU tensors, NCCL for CUDA tensors.

    Mail goes by gloo, tensors of a GPU through the host: messages of NCCL have no tags, and two workers that
    post to each other before they take would wait for each other for ever.

    Args:
        group: the group; none means all processes.
        clock: this worker's time.
        timeout_s: how long groups made by `divide` wait in a collective; none means torch's default.

    Raises:
        WorkerLostError: by every method, when a peer died or came later than the group's timeout.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        clock: Clock | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self.group = group
        self.timeout_s = timeout_s
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.clock: Clock = clock or WallClock()
        self.bytes_sent = 0
        self._outbox = Outbox()

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the workers."""
        check_sum(x)
        result = copy_of(x)
        with self._sending("sum", costs.all_reduce(x.nbytes, self.size)):
            dist.all_reduce(result, group=self.group)
        return result

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of `x` over the workers."""
        check_mean(x)
        return self.sum(x).div_(self.size)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return everyone's `x` stacked in rank order."""
        result = torch.empty(self.size, *x.shape, dtype=x.dtype, device=x.device)
        with self._sending("all_gather", costs.all_gather(x.nbytes, self.size)):
            parts = [as_bytes(part) for part in result.unbind()]
            dist.all_gather(parts, as_bytes(copy_of(x)), group=self.group)
        return result

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        """Return worker `source`'s `x`."""
        check_source(source, num_workers=self.size)
        result = copy_of(x)
        with self._sending("broadcast", costs.broadcast(x.nbytes, self.size)):
            dist.broadcast(as_bytes(result), group=self.group, group_src=source)
        return result

    def all_to_all(self, x: Tensor) -> Tensor:
        """Send row j of `x` to worker j; return the rows sent to us, by who sent them."""
        check_rows(x, num_workers=self.size)
        result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        with self._sending("all_to_all", costs.all_to_all(x.nbytes, self.size)):
            dist.all_to_all_single(as_bytes(result), as_bytes(copy_of(x)), group=self.group)
        return result

    def barrier(self) -> None:
        """Wait until everyone is here."""
        with self._sending("barrier", costs.barrier(self.size)):
            dist.barrier(self.group)

    def post(self, x: Tensor, *, to: int, tag: int) -> None:
        """Send a copy of `x` to worker `to`, without waiting."""
        check_peer(to, rank=self.rank, num_workers=self.size)
        sent = as_bytes(copy_of(x).cpu())
        try:
            handle = dist.isend(sent, group=self.group, group_dst=to, tag=tag)
        except RuntimeError as error:
            raise lost_peer(self, to, error) from error
        self._outbox.add(to, sent, handle)
        self.bytes_sent += x.nbytes

    def take(self, like: Tensor, *, source: int, tag: int) -> Tensor:
        """Wait for what worker `source` posts with this tag."""
        check_peer(source, rank=self.rank, num_workers=self.size)
        result = torch.empty(like.shape, dtype=like.dtype)
        try:
            dist.recv(as_bytes(result), group=self.group, group_src=source, tag=tag)
        except RuntimeError as error:
            raise lost_peer(self, source, error) from error
        return result.to(like.device)

    def finish_posts(self, *, keep_last: int = 0) -> None:
        """Wait until all posts but the last few were taken."""
        self._outbox.finish(keep_last=keep_last, lost=lambda to, error: lost_peer(self, to, error))

    def divide(
        self, groups: Sequence[Sequence[int]], *, link: Literal["inner", "outer"] = "outer"
    ) -> "TorchComm":
        """Return the group that this worker is in, as a process group of its own; everyone calls it alike.

        Args:
            groups: ranks; each worker is in exactly one.
            link: only the simulation tells its links apart; here the network is what it is.
        """
        own = own_group(groups, rank=self.rank, num_workers=self.size)
        timeout = None if self.timeout_s is None else timedelta(seconds=self.timeout_s)
        try:
            if self.group is None:  # all processes make all groups, in the same order
                made = [dist.new_group(list(group), timeout=timeout) for group in groups]
                group = made[[list(members) for members in groups].index(own)]
            else:
                of_world = dist.get_process_group_ranks(self.group)
                members = [of_world[rank] for rank in own]
                group = dist.new_group(members, timeout=timeout, use_local_synchronization=True)
        except RuntimeError as error:
            raise _lost(self, "divide", error) from error
        assert isinstance(group, dist.ProcessGroup), "this process is in its own group"
        return TorchComm(group, clock=self.clock, timeout_s=self.timeout_s)

    @contextmanager
    def _sending(self, call: str, traffic: costs.Traffic) -> Iterator[None]:
        """Count what is sent; say what to do when it fails."""
        try:
            yield
        except RuntimeError as error:
            raise _lost(self, call, error) from error
        self.bytes_sent += traffic.bytes_sent


SIGNS_OF_LOSS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What torch's errors say when another process is gone; DDP and FSDP2 raise them as plain RuntimeErrors."""


@contextmanager
def lost_workers_named(comm: Communicator) -> Iterator[None]:
    """Turn what wrappers raise in their own collectives, when a worker is gone, into a `WorkerLostError`."""
    try:
        yield
    except RuntimeError as error:
        if comm.size > 1 and any(sign in str(error) for sign in SIGNS_OF_LOSS):
            raise _lost(comm, "a step", error) from error
        raise


def _lost(comm: Communicator, call: str, error: RuntimeError) -> WorkerLostError:
    return WorkerLostError(
        f"worker {comm.rank} of {comm.size} could not finish {call!r} with the others: one of them died, or "
        f"came later than the time-out of the process group. Read the end of the output of the worker that "
        f"stopped first, then go on from the last checkpoint with `hardy resume`. torch says: {error}"
    )


def lost_peer(comm: Communicator, peer: int, error: object) -> PeerLostError:
    """Return the error of a message that will not come, or will not be taken."""
    return PeerLostError(
        f"worker {comm.rank} of {comm.size} could not finish a message with worker {peer}: it died, or came "
        f"later than the time-out of the process group. The reason given is: {error}",
        peer=peer,
    )


def join_world(
    *, rank: int, size: int, init_method: str, device_type: Literal["cpu", "cuda"], timeout_s: float = 600.0
) -> TorchComm:
    """Meet the other processes and return them; CPU tensors go by gloo, CUDA tensors by NCCL.

    On CUDA choose this process's GPU before (`torch.cuda.set_device`). Call `leave_world` at the end.

    Args:
        rank: this process, from 0.
        size: number of processes.
        init_method: where they meet: "env://" under torchrun, "tcp://host:port" or "file:///path".
        device_type: where the model lives.
        timeout_s: how long to wait for the others, here and in every collective.

    Raises:
        WorkerLostError: the others did not come in time.
    """
    backend = "gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(
            backend,
            init_method=init_method,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
        )
    except RuntimeError as error:
        raise WorkerLostError(
            f"worker {rank} of {size} did not meet the others at {init_method} within {timeout_s:g} s; start "
            f"all {size} workers, with the same address, each with its own rank. torch says: {error}"
        ) from error
    return TorchComm(timeout_s=timeout_s)


def leave_world() -> None:
    """Close the process groups of this process; without one, do nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_sum(x: Tensor) -> None:
    """Refuse a dtype that not every world can add up, so that what runs in one runs in all."""
    if x.dtype not in SUMMABLE:
        known = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in SUMMABLE))
        raise ValueError(f"workers cannot add up {x.dtype}; convert to one of {known}")


def check_mean(x: Tensor) -> None:
    """Refuse whole numbers, whose mean would be rounded, and what `check_sum` refuses."""
    check_sum(x)
    if not (x.is_floating_point() or x.is_complex()):
        raise ValueError(
            f"the mean of {x.dtype} over the workers is no {x.dtype}; use sum, or convert to a float"
        )


def check_source(source: int, *, num_workers: int) -> None:
    """Refuse a worker that does not exist."""
    if not 0 <= source < num_workers:
        raise ValueError(f"broadcast source must be a rank from 0 to {num_workers - 1}, got {source}")


def check_peer(peer: int, *, rank: int, num_workers: int) -> None:
    """Refuse mail with oneself and with a worker that does not exist."""
    if num_workers == 1:
        raise ValueError("mail needs another worker, and there is only one")
    if not 0 <= peer < num_workers or peer == rank:
        raise ValueError(
            f"worker {rank} has mail with another rank from 0 to {num_workers - 1}, but not with {peer}"
        )


def check_rows(x: Tensor, *, num_workers: int) -> None:
    """Refuse an `all_to_all` that has not one row for each worker."""
    if x.ndim == 0 or x.shape[0] != num_workers:
        raise ValueError(
            f"all_to_all needs one row for each of the {num_workers} workers, got shape {list(x.shape)}"
        )


def own_group(groups: Sequence[Sequence[int]], *, rank: int, num_workers: int) -> list[int]:
    """Return the group of worker `rank`; refuse groups that do not hold each worker exactly once."""
    if sorted(member for group in groups for member in group) != list(range(num_workers)):
        raise ValueError(
            f"groups must hold each rank from 0 to {num_workers - 1} exactly once, got "
            f"{[list(group) for group in groups]}"
        )
    return next(list(group) for group in groups if rank in group)


def copy_of(x: Tensor) -> Tensor:
    """Return a contiguous copy outside the autograd graph."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def as_bytes(x: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor, as the bytes that gloo and NCCL move whatever the dtype."""
    return x.view(-1).view(torch.uint8)
