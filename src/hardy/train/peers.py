"""What the processes of a run agree on around a checkpoint: who writes what, and whether all was written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist  # noqa: TID251  Communicator moves tensors; here plans and errors go round

from hardy.config import UserError
from hardy.distributed.comm import Communicator, TorchComm

T = TypeVar("T")
R = TypeVar("R")


class Peers:
    """The processes that write and read checkpoints together, with a gloo group of their own.

    Their own, because a background thread talks over it while training talks over the other ones. One process
    needs none, nor do simulated workers, which are threads of one process.
    """

    def __init__(self, comm: Communicator) -> None:
        self.rank, self.size = comm.rank, comm.size
        self.group: dist.ProcessGroup | None = None
        if isinstance(comm, TorchComm):
            members = None if comm.group is None else dist.get_process_group_ranks(comm.group)
            group = dist.new_group(members, backend="gloo", use_local_synchronization=members is not None)
            assert isinstance(group, dist.ProcessGroup), "this process is not among the workers of `comm`"
            self.group = group

    def agree(self, mine: Callable[[], T], together: Callable[[list[T]], list[R]]) -> R:
        """Run `mine` everywhere and `together` on worker 0 with all results; return our part of those.

        What fails anywhere is raised everywhere: `OSError` and `UserError` as such, else `RuntimeError`.
        """
        if self.group is None:
            return together([mine()])[0]
        answers: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(_attempt(mine), answers, group=self.group, group_dst=0)
        replies: list[Any] | None = None
        if answers is not None:
            whole = _attempt(lambda: together([_value(answer) for answer in answers]))
            replies = [whole] * self.size if isinstance(whole, _Failure) else whole
        reply: list[Any] = [None]
        dist.scatter_object_list(reply, replies, group=self.group, group_src=0)
        return _value(reply[0])


@dataclass(frozen=True)
class _Failure:
    """An error on its way to the other workers."""

    error: Exception


def _attempt(function: Callable[[], T]) -> T | _Failure:
    try:
        return function()
    except (OSError, UserError) as error:
        return _Failure(error)
    except Exception as error:
        return _Failure(RuntimeError(f"{type(error).__name__}: {error}"))


def _value(answer: Any) -> Any:
    if isinstance(answer, _Failure):
        raise answer.error
    return answer
