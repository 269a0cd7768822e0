"""The workers as a grid: each row is one replica of the model, each column the same place in all replicas.

Rank = replica * shards + shard. Workers of one replica step together over fast links (`inner`); replicas meet
now and then over slow ones (`outer`). Each has communicators of its own, so neither queues behind the other.

An `OuterGroup` is a communicator over replicas whose members may change, under a new generation each time:
here the one that never does and the simulated one, in `elastic` that of real processes. Members change only
in `reform`, which all members call at the same place of their program: after a collective raised
`WorkerLostError`, or once they agree that someone `wants_members`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from hardy.clock import Clock
from hardy.distributed.comm import Communicator, Mail, MailCommunicator, TorchComm, WorkerLostError
from hardy.distributed.simulation import SimComm


@runtime_checkable
class Divisible(Protocol):
    """A world that can be cut into groups: `Alone`, `TorchComm` and `SimComm` can."""

    def divide(
        self, groups: Sequence[Sequence[int]], *, link: Literal["inner", "outer"] = "outer"
    ) -> Communicator:
        """Return the group that this worker is in; all call it with the same groups, in the same order."""
        ...


@dataclass(frozen=True)
class Grid:
    """Where one worker stands."""

    inner: Communicator
    """The workers of this replica, by shard."""
    outer: Communicator
    """The workers with this one's place in all replicas, by replica."""
    replica: int
    """This worker's replica, from 0."""
    replicas: int
    """How many there are."""
    shard: int
    """This worker's place in its replica, from 0."""
    shards: int
    """Workers of one replica."""


def split(comm: Communicator, *, replicas: int, shards: int) -> Grid:
    """Return this worker's place in a grid of `replicas` x `shards`; all workers call it alike.

    Args:
        comm: all workers.
        replicas: rows, each a whole copy of the model.
        shards: workers of one replica, neighbours in rank.

    Raises:
        ValueError: the grid does not hold the workers.

    Example:
        >>> from hardy.distributed.simulation import SimWorld
        >>> SimWorld(4).run(lambda comm: split(comm, replicas=2, shards=2).outer.ranks)
        [(0, 2), (1, 3), (0, 2), (1, 3)]
    """
    if replicas < 1 or shards < 1 or replicas * shards != comm.size:
        raise ValueError(
            f"a grid of {replicas} replicas x {shards} workers does not hold the {comm.size} workers that "
            f"run; their product must be {comm.size}"
        )
    if not isinstance(comm, Divisible):
        raise TypeError(f"{type(comm).__name__} cannot be cut into groups; give Alone, TorchComm or SimComm")
    rows = [range(replica * shards, (replica + 1) * shards) for replica in range(replicas)]
    columns = [range(shard, comm.size, shards) for shard in range(shards)]
    return Grid(
        inner=comm.divide(rows, link="inner"),
        outer=comm.divide(columns, link="outer"),
        replica=comm.rank // shards,
        replicas=replicas,
        shard=comm.rank % shards,
        shards=shards,
    )


class ExcludedError(WorkerLostError):
    """The others went on without this replica."""


@runtime_checkable
class OuterGroup(Communicator, Protocol):
    """A communicator over replicas whose members may change."""

    @property
    def generation(self) -> int:
        """How many times the group was made anew."""
        ...

    @property
    def members(self) -> tuple[int, ...]:
        """The replicas in the group, in rank order."""
        ...

    @property
    def is_elastic(self) -> bool:
        """Whether `reform` can help after a loss."""
        ...

    @property
    def runs_beside(self) -> bool:
        """Whether collectives may run in one thread while another computes."""
        ...

    @property
    def mail(self) -> MailCommunicator:
        """The communicator of the present generation, for messages between two members."""
        ...

    def reform(self) -> None:
        """Go on with those members that live and those who ask to join; all members that live call it.

        Raises:
            WorkerLostError: no group can be formed with this replica in it.
        """
        ...

    def wants_members(self) -> bool:
        """Return whether someone asks to join; cheap. Members may see it at different moments.

        All workers of a replica call it together and see the same.
        """
        ...

    def close(self) -> None:
        """Leave. Call `barrier` before, unless others were lost."""
        ...


class Regrouping:
    """A communicator that passes every call on to that of the present generation."""

    def __init__(self, comm: Communicator, members: Sequence[int], *, generation: int) -> None:
        self.generation, self.members = generation, tuple(members)
        self._comm, self._sent_before = comm, 0

    @property
    def rank(self) -> int:
        """This replica's place among the members, from 0."""
        return self._comm.rank

    @property
    def size(self) -> int:
        """Number of members."""
        return self._comm.size

    @property
    def clock(self) -> Clock:
        """This worker's time."""
        return self._comm.clock

    @property
    def bytes_sent(self) -> int:
        """Bytes sent so far, over all generations."""
        return self._sent_before + self._comm.bytes_sent

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the members."""
        return self._comm.sum(x)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of `x` over the members."""
        return self._comm.mean(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return everyone's `x` stacked in rank order."""
        return self._comm.all_gather(x)

    def all_to_all(self, x: Tensor) -> Tensor:
        """Send row j of `x` to member j; return the rows sent to us, by who sent them."""
        return self._comm.all_to_all(x)

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        """Return member `source`'s `x`."""
        return self._comm.broadcast(x, source=source)

    def barrier(self) -> None:
        """Wait until everyone is here."""
        self._comm.barrier()

    @property
    def mail(self) -> MailCommunicator:
        """The communicator of the present generation, for messages between two members."""
        if not isinstance(self._comm, Mail):
            raise TypeError(
                f"{type(self._comm).__name__} has no mail; give Alone, TorchComm, GlooComm or SimComm"
            )
        return self._comm

    def renew(self, comm: Communicator, members: Sequence[int], *, generation: int) -> None:
        """Go on as another generation."""
        self._sent_before += self._comm.bytes_sent
        self._comm, self.members, self.generation = comm, tuple(members), generation


class FixedGroup(Regrouping):
    """Replicas that all live to the end, or all stop.

    Example:
        >>> from hardy.distributed.comm import Alone
        >>> FixedGroup(Alone()).members
        (0,)
    """

    is_elastic = False

    def __init__(self, comm: Communicator) -> None:
        super().__init__(comm, range(comm.size), generation=0)
        self.runs_beside = isinstance(comm, TorchComm)

    def reform(self) -> None:
        """Refuse: nobody can leave or come."""
        raise WorkerLostError(
            "strategy.elastic is false, so the replicas cannot go on without the one that was lost; go on "
            "from the last checkpoint with `hardy resume`, or set strategy.elastic=true"
        )

    def wants_members(self) -> bool:
        """Return False."""
        return False

    def close(self) -> None:
        """Leave the communicator to whoever made it."""


class SimGroup(Regrouping):
    """Replicas of a simulated world that die and come (`SimWorld(deaths=..., births=...)`).

    Rank of the world = replica * shards + shard. A replica whose worker has died is lost as a whole; its
    other workers are told so by `reform`.

    Args:
        comm: all workers of the world, those included that are not yet born.
        founders: replicas 0 to founders - 1 are the first members; the others ask to join when they begin.
        shards: workers of one replica.
        timeout_s: virtual seconds that one who asks to join waits.
        poll_s: virtual seconds between two looks whether it was admitted.
    """

    is_elastic = True
    runs_beside = False

    def __init__(
        self,
        comm: SimComm,
        *,
        founders: int,
        shards: int = 1,
        timeout_s: float = 86400.0,
        poll_s: float = 0.1,
    ) -> None:
        if not 1 <= founders * shards <= comm.size or comm.size % shards:
            raise ValueError(
                f"{founders} founding replicas of {shards} workers do not fit a world of {comm.size} workers"
            )
        self.replica, self._shard = divmod(comm.rank, shards)
        self._world, self._shards = comm, shards
        self._rosters: dict[int, tuple[int, ...]] = comm.store.setdefault(
            "outer/rosters", {0: tuple(range(founders))}
        )
        self._asked: list[int] = comm.store.setdefault("outer/asked", [])
        if self.replica >= founders:
            self._wait_to_be_admitted(timeout_s=timeout_s, poll_s=poll_s)
        generation = max(self._rosters) if self.replica >= founders else 0
        members = self._rosters[generation]
        super().__init__(self._among(members, generation), members, generation=generation)

    def reform(self) -> None:
        """Meet all members that live, and agree on the next generation."""
        following = self.generation + 1
        while True:
            if self._is_lost(self.replica):
                raise ExcludedError(f"replica {self.replica} lost one of its workers and cannot go on")
            live = [replica for replica in self.members if not self._is_lost(replica)]
            try:
                members = self._among(live, self.generation).agree(
                    f"forming generation {following}",
                    None,
                    lambda here: [self._decide(following)] * len(here),
                )
                break
            except WorkerLostError:  # another died meanwhile
                continue
        self.renew(self._among(members, following), members, generation=following)

    def wants_members(self) -> bool:
        """Return whether a replica that lives asks to join."""
        return any(replica not in self.members and not self._is_lost(replica) for replica in self._asked)

    def close(self) -> None:
        """Nothing to give back."""

    def _decide(self, generation: int) -> tuple[int, ...]:
        """Return who is in this generation; whoever asks first decides, for all shards."""
        if generation not in self._rosters:
            wanted = {*self._rosters[generation - 1], *self._asked}
            self._rosters[generation] = tuple(sorted(r for r in wanted if not self._is_lost(r)))
        return self._rosters[generation]

    def _wait_to_be_admitted(self, *, timeout_s: float, poll_s: float) -> None:
        clock = self._world.clock
        if self._shard == 0:
            self._asked.append(self.replica)
        deadline_s = clock.now() + timeout_s
        while self.replica not in self._rosters[max(self._rosters)]:
            if clock.now() >= deadline_s:
                raise WorkerLostError(
                    f"replica {self.replica} asked to join and was not admitted within {timeout_s:g} s; "
                    f"members admit others at the end of a round, so they may have ended"
                )
            clock.sleep(poll_s)

    def _is_lost(self, replica: int) -> bool:
        ranks = range(replica * self._shards, (replica + 1) * self._shards)
        return any(self._world.is_lost(rank) for rank in ranks)

    def _among(self, replicas: Sequence[int], generation: int) -> SimComm:
        ranks = [replica * self._shards + self._shard for replica in replicas]
        return self._world.among(ranks, name=f"generation {generation}")
