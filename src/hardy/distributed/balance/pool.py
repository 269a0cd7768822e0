"""Groups of workers, made once and kept: steps that group the workers anew find their groups here.

Making a group of processes takes all processes and is slow; using one that exists costs nothing.
"""

from collections.abc import Iterable, Sequence

from hardy.distributed.comm import Alone, Communicator
from hardy.distributed.groups import Divisible

Ranks = tuple[int, ...]


class GroupPool:
    """Communicators of groups of the workers of `comm`, one for each set of ranks ever asked for.

    A group of one is `Alone`; one of all workers is a group of its own, so that it does not queue behind
    FSDP2's messages.

    Args:
        comm: all workers.

    Raises:
        TypeError: `comm` cannot be cut into groups.

    Example:
        >>> from hardy.distributed.simulation import SimWorld
        >>> def body(comm):
        ...     pool = GroupPool(comm)
        ...     pool.prepare([(0, 1)])
        ...     return pool.group((0, 1)).size if comm.rank < 2 else 1
        >>> SimWorld(3).run(body)
        [2, 2, 1]
    """

    def __init__(self, comm: Communicator) -> None:
        if not isinstance(comm, Divisible):
            raise TypeError(
                f"{type(comm).__name__} cannot be cut into groups; give Alone, TorchComm or SimComm"
            )
        self._comm, self._divisible = comm, comm
        self._made: set[Ranks] = set()  # by anyone, so that all workers agree on what is missing
        self._own: dict[Ranks, Communicator] = {(comm.rank,): Alone(clock=comm.clock)}

    @property
    def num_made(self) -> int:
        """Groups of more than one worker that exist, with this worker or without."""
        return len(self._made)

    def prepare(self, groups: Iterable[Sequence[int]]) -> None:
        """Make the groups that do not exist yet; all workers call this with the same groups, in one order.

        Groups with different workers are made in one go.

        Raises:
            ValueError: a group has a rank twice, or one that does not exist.
        """
        missing: list[Ranks] = []
        for group in groups:
            ranks = tuple(group)
            if len(set(ranks)) != len(ranks) or not set(ranks) <= set(range(self._comm.size)) or not ranks:
                raise ValueError(
                    f"a group needs different ranks from 0 to {self._comm.size - 1}, got {list(ranks)}"
                )
            if len(ranks) > 1 and ranks not in self._made and ranks not in missing:
                missing.append(ranks)
        while missing:
            disjoint = _disjoint(missing)
            self._make(disjoint)
            missing = [ranks for ranks in missing if ranks not in self._made]

    def warm_up(self, most: int | None = None) -> None:
        """Make every aligned group of 2, 4, 8 ... workers, so that no later step waits for one.

        Args:
            most: workers of the largest group; none takes all workers.
        """
        size = 2
        while size <= min(self._comm.size, most or self._comm.size):
            starts = range(0, self._comm.size - size + 1, size)
            self.prepare([range(start, start + size) for start in starts])
            size *= 2

    def group(self, ranks: Sequence[int]) -> Communicator:
        """Return a group of this worker's that exists.

        Raises:
            KeyError: it was never prepared, or this worker is not in it.
        """
        if tuple(ranks) not in self._own:
            raise KeyError(
                f"worker {self._comm.rank} has no group {list(ranks)}; call prepare on all workers"
            )
        return self._own[tuple(ranks)]

    @property
    def largest(self) -> Communicator:
        """The group of this worker's that has the most workers."""
        return max(self._own.values(), key=lambda group: group.size)

    def _make(self, groups: Sequence[Ranks]) -> None:
        taken = {rank for group in groups for rank in group}
        others = [(rank,) for rank in range(self._comm.size) if rank not in taken]
        made = self._divisible.divide([*groups, *others], link="inner")
        self._own |= {group: made for group in groups if self._comm.rank in group}
        self._made.update(groups)


def _disjoint(groups: Sequence[Ranks]) -> list[Ranks]:
    """Return the groups of which none has a worker of an earlier one, in order."""
    taken: set[int] = set()
    chosen: list[Ranks] = []
    for group in groups:
        if not taken & set(group):
            taken |= set(group)
            chosen.append(group)
    return chosen
