"""What an algorithm may ask of the other workers, alone or by torch.distributed (simulated: `simulation`).

Algorithms take a `Communicator` and never call `torch.distributed`; every method is collective: all workers
call it, in the same order, with tensors of equal shape and dtype. Inputs are left alone, results are new
tensors outside the autograd graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, Protocol

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
"""The dtypes that gloo and NCCL both add up. `all_gather` and `broadcast` move bytes and take any dtype."""


class WorkerLostError(UserError):
    """Another worker died, or did not come to a collective in time."""


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

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        """Return worker `source`'s `x`."""
        ...

    def barrier(self) -> None:
        """Wait until everyone is here."""
        ...


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
        return _copy(x)

    def mean(self, x: Tensor) -> Tensor:
        """Return a copy of `x`."""
        check_mean(x)
        return _copy(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return a copy of `x` with shape (1, *x.shape)."""
        return _copy(x)[None]

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        """Return a copy of `x`."""
        check_source(source, num_workers=1)
        return _copy(x)

    def barrier(self) -> None:
        """Return at once."""


class TorchComm:
    """The workers of a process group of torch.distributed: gloo for CPU tensors, NCCL for CUDA tensors.

    Args:
        group: the group; none means all processes.
        clock: this worker's time.

    Raises:
        WorkerLostError: by every method, when a peer died or came later than the group's timeout.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, clock: Clock | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.clock: Clock = clock or WallClock()
        self.bytes_sent = 0

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the workers."""
        check_sum(x)
        result = _copy(x)
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
            dist.all_gather([_bytes(part) for part in result.unbind()], _bytes(_copy(x)), group=self.group)
        return result

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        """Return worker `source`'s `x`."""
        check_source(source, num_workers=self.size)
        result = _copy(x)
        with self._sending("broadcast", costs.broadcast(x.nbytes, self.size)):
            dist.broadcast(_bytes(result), group=self.group, group_src=source)
        return result

    def barrier(self) -> None:
        """Wait until everyone is here."""
        with self._sending("barrier", costs.barrier(self.size)):
            dist.barrier(self.group)

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
    return TorchComm()


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


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


def _bytes(x: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor, as the bytes that gloo and NCCL move whatever the dtype."""
    return x.view(-1).view(torch.uint8)
