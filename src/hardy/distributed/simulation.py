"""N workers in one process with virtual time: the same code as on N machines, and always the same bits.

Each worker is a thread, but exactly one runs at a time (`turns`). Time passes only by `spend`, by
`clock.sleep`, in collectives and waiting for mail. A collective ends for everyone at the latest arrival plus
what the ring costs (`costs`); a message arrives once its sender's link has carried it, behind all that was
posted before, plus the latency. Values are combined in rank order. So results and times depend on the
program, the cluster and the seed alone, never on this machine or its load.

Workers may begin late and die (`births`, `deaths`, `SimComm.die`). Some of them may meet while the others
go on (`SimComm.divide`, `SimComm.among`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar

from torch import Tensor, stack

from hardy.distributed import costs
from hardy.distributed.comm import (
    PeerLostError,
    WorkerLostError,
    check_mean,
    check_peer,
    check_rows,
    check_source,
    check_sum,
    copy_of,
    own_group,
)
from hardy.distributed.config import ClusterConfig
from hardy.distributed.turns import Letter, Member, MemberLostError, Outcome, Turns

R = TypeVar("R")

Combine = Callable[[list[Tensor]], list[Tensor]]
"""Makes what each worker gets from what all brought."""


@dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """Where one worker's virtual time went: `virtual_s` = `compute_s` + `transfer_s` + `idle_s`."""

    virtual_s: float
    """Its clock at the end."""
    compute_s: float
    """Spent working."""
    transfer_s: float
    """In collectives, after the last worker arrived, and waiting for messages on their way."""
    idle_s: float
    """Waiting for others to arrive or to post, asleep, and not yet begun."""
    bytes_sent: int
    """As a ring would send them, over all its links."""
    died_s: float | None = None
    """When it died, if it did."""


class SimWorld:
    """Workers that exist in this process only.

    Args:
        num_workers: how many.
        cluster: their speeds and their network; none means equal workers for whom nothing takes time.
        seed: of the random variation of the workers' speeds.
        inner_link: between workers of one replica (`groups.split`); none means as between all others.
        births: when a worker begins, in virtual seconds by rank; not listed is 0.
        deaths: when a worker dies, in virtual seconds by rank; what would end then or later does not happen.
        detect_s: virtual seconds until the others notice, once they wait for one who is dead.

    Example:
        >>> import torch
        >>> SimWorld(3).run(lambda comm: comm.sum(torch.tensor(comm.rank)).item())
        [3, 3, 3]
    """

    def __init__(
        self,
        num_workers: int,
        *,
        cluster: ClusterConfig | None = None,
        seed: int = 0,
        inner_link: costs.Link | None = None,
        births: Mapping[int, float] | None = None,
        deaths: Mapping[int, float] | None = None,
        detect_s: float = 1.0,
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"a simulated world needs at least one worker, got {num_workers}")
        self.size = num_workers
        self.cluster = cluster or ClusterConfig()
        self.seed = seed
        if len(self.cluster.slow_factors) > num_workers:
            raise ValueError(
                f"cluster.slow_factors lists {len(self.cluster.slow_factors)} workers, but the world has "
                f"{num_workers}; shorten the list"
            )
        outer = costs.Link(
            bandwidth_bytes_per_s=self.cluster.bandwidth_bytes_per_s, latency_s=self.cluster.latency_s
        )
        self.links: dict[str, costs.Link] = {"outer": outer, "inner": inner_link or outer}
        self.births, self.deaths = dict(births or {}), dict(deaths or {})
        _check_moments("births", self.births, num_workers=num_workers)
        _check_moments("deaths", self.deaths, num_workers=num_workers)
        if not detect_s >= 0:
            raise ValueError(f"detect_s is at least 0, got {detect_s}")
        self.detect_s = detect_s
        self._workers: list[_Worker] = []

    def run(self, body: Callable[["SimComm"], R]) -> list[R]:
        """Run `body` once per worker and return their results in rank order; of those who died, None.

        All begin at virtual time 0, or at their birth. Gradient mode, autocast and other settings that torch
        keeps per thread start at their defaults.

        Raises:
            CollectiveMismatchError: the workers did not call the same collectives.
            BaseException: whatever the first failing worker raised, with its rank as a note; the others are
                stopped where they wait.
        """
        turns = Turns(self.size, births=self.births, deaths=self.deaths, detect_s=self.detect_s)
        store: dict[str, Any] = {}
        self._workers = [_Worker(self, turns, member, store) for member in turns.members]
        everyone = tuple(range(self.size))
        comms = [SimComm(worker, everyone, self.links["outer"], "") for worker in self._workers]
        return turns.run(lambda member: body(comms[member.rank]))

    def report(self) -> list[WorkerReport]:
        """Return where the virtual time of the last run went, in rank order; empty before the first."""
        return [worker.report() for worker in self._workers]


class SimClock:
    """One worker's virtual time. Sleeping lets the others catch up."""

    def __init__(self, turns: Turns, member: Member) -> None:
        self._turns, self._member = turns, member
        self.slept_s = 0.0

    def now(self) -> float:
        """Return the virtual seconds since the run began."""
        return self._member.now_s

    def sleep(self, seconds: float) -> None:
        """Let virtual time pass idly."""
        before_s = self._member.now_s
        try:
            self._turns.advance(self._member, seconds)
        finally:  # a death cuts it short
            self.slept_s += self._member.now_s - before_s


@dataclass(eq=False)
class _Worker:
    """What all communicators of one simulated worker share."""

    world: SimWorld
    turns: Turns
    member: Member
    store: dict[str, Any]
    clock: SimClock = field(init=False)
    compute_s: float = 0.0
    num_spends: int = 0
    bytes_sent: int = 0
    busy_until_s: dict[costs.Link, float] = field(default_factory=dict)
    """When each link has carried all that was posted."""

    def __post_init__(self) -> None:
        self.clock = SimClock(self.turns, self.member)

    def report(self) -> WorkerReport:
        """Return where this worker's virtual time went so far."""
        return WorkerReport(
            virtual_s=self.member.now_s,
            compute_s=self.compute_s,
            transfer_s=self.member.meeting_s,
            idle_s=self.member.idle_s + self.clock.slept_s,
            bytes_sent=self.bytes_sent,
            died_s=self.member.died_s,
        )


class SimComm:
    """The other simulated workers, or some of them, seen from one. A `Communicator`; `SimWorld.run` makes it.

    Raises:
        WorkerLostError: by every collective in which a dead worker was expected, `detect_s` after both its
            death and this worker's arrival.
    """

    def __init__(self, worker: _Worker, ranks: tuple[int, ...], link: costs.Link, name: str) -> None:
        self.ranks = ranks
        """The workers here, as ranks of the world."""
        self.rank, self.size = ranks.index(worker.member.rank), len(ranks)
        self.bytes_sent = 0
        self.clock = worker.clock
        self._worker, self._link, self._name = worker, link, name

    @property
    def world_rank(self) -> int:
        """This worker among all of the world."""
        return self._worker.member.rank

    @property
    def store(self) -> dict[str, Any]:
        """A place that all workers of this run see, as processes see a store of torch.distributed."""
        return self._worker.store

    def is_lost(self, world_rank: int) -> bool:
        """Return whether this worker of the world has died."""
        return self._worker.turns.members[world_rank].died_s is not None

    def spend(self, work_s: float) -> None:
        """Work as long as this worker takes for what an ordinary one does in `work_s` seconds.

        Not in `Communicator`: with real workers time passes by itself, so no algorithm needs it; whoever
        simulates a run knows what its work costs and says so here.
        """
        worker = self._worker
        seconds = costs.compute_seconds(
            work_s,
            worker.world.cluster,
            rank=self.world_rank,
            index=worker.num_spends,
            seed=worker.world.seed,
        )
        worker.num_spends += 1
        before_s = self.clock.now()
        try:
            worker.turns.advance(worker.member, seconds)
        finally:  # a death cuts it short
            worker.compute_s += self.clock.now() - before_s

    def die(self) -> NoReturn:
        """End this worker here and now, as a crash would; nothing after this runs but `finally` blocks."""
        self._worker.turns.die(self._worker.member)

    def among(
        self, ranks: Sequence[int], *, name: str, link: Literal["inner", "outer"] = "outer"
    ) -> "SimComm":
        """Return the communicator of some workers, in this order; no word is exchanged.

        Args:
            ranks: of this communicator, with this worker among them.
            name: tells groups of the same workers apart; all of them give the same.
            link: which of the world's links they talk over.
        """
        members = tuple(self.ranks[rank] for rank in ranks)
        return SimComm(self._worker, members, self._worker.world.links[link], f"{self._name}/{name}")

    def divide(
        self, groups: Sequence[Sequence[int]], *, link: Literal["inner", "outer"] = "outer"
    ) -> "SimComm":
        """Return the group that this worker is in; the groups do not wait for each other.

        Args:
            groups: ranks; each worker is in exactly one.
            link: which of the world's links they talk over.
        """
        own = own_group(groups, rank=self.rank, num_workers=self.size)
        return self.among(own, name=f"{link} group", link=link)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x`, added in rank order."""
        check_sum(x)
        return self._meet("sum", x, costs.all_reduce(x.nbytes, self.size), _for_all(_add_up))

    def mean(self, x: Tensor) -> Tensor:
        """Return the sum in rank order, divided by the number of workers."""
        check_mean(x)
        return self._meet("mean", x, costs.all_reduce(x.nbytes, self.size), _for_all(_average))

    def all_gather(self, x: Tensor) -> Tensor:
        """Return everyone's `x` stacked in rank order."""
        return self._meet("all_gather", x, costs.all_gather(x.nbytes, self.size), _for_all(stack))

    def all_to_all(self, x: Tensor) -> Tensor:
        """Send row j of `x` to worker j; return the rows sent to us, by who sent them."""
        check_rows(x, num_workers=self.size)
        return self._meet("all_to_all", x, costs.all_to_all(x.nbytes, self.size), _turn)

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        """Return worker `source`'s `x`."""
        check_source(source, num_workers=self.size)
        traffic = costs.broadcast(x.nbytes, self.size)
        return self._meet(f"broadcast from {source}", x, traffic, _for_all(lambda values: values[source]))

    def barrier(self) -> None:
        """Wait until everyone is here."""
        self.agree("barrier", None, lambda values: values, traffic=costs.barrier(self.size))

    def post(self, x: Tensor, *, to: int, tag: int) -> None:
        """Send a copy of `x` to worker `to`, behind all that this worker posted before on the same link.

        A worker that died is noticed after `detect_s`; what is posted before that is lost.
        """
        check_peer(to, rank=self.rank, num_workers=self.size)
        worker, traffic = self._worker, costs.message(x.nbytes)
        posted_s = self.clock.now()
        begins_s = max(posted_s, worker.busy_until_s.get(self._link, 0.0))
        left_s = begins_s + self._link.seconds(replace(traffic, hops=0))
        arrives_s = begins_s + self._link.seconds(traffic)
        letter = Letter(value=copy_of(x), posted_s=posted_s, left_s=left_s, arrives_s=arrives_s)
        try:
            worker.turns.post(worker.member, self.ranks[to], (self._name, tag), letter)
        except MemberLostError as error:
            raise self._lost_peer(to) from error
        worker.busy_until_s[self._link] = left_s
        self.bytes_sent += traffic.bytes_sent
        worker.bytes_sent += traffic.bytes_sent

    def take(self, like: Tensor, *, source: int, tag: int) -> Tensor:
        """Wait for what worker `source` posts with this tag."""
        check_peer(source, rank=self.rank, num_workers=self.size)
        sender = self.ranks[source]
        name = f"take of mail with tag {tag} from rank {sender}{self._where()}"
        try:
            x = self._worker.turns.take(self._worker.member, sender, (self._name, tag), name=name)
        except MemberLostError as error:
            raise self._lost_peer(source) from error
        if (x.shape, x.dtype) != (like.shape, like.dtype):
            raise ValueError(
                f"worker {self.rank} expected {like.dtype} {list(like.shape)} with tag {tag} from worker "
                f"{source}, who sent {x.dtype} {list(x.shape)}"
            )
        return x.to(like.device)

    def finish_posts(self, *, keep_last: int = 0) -> None:
        """Return at once: the simulated network holds what was posted."""

    def _lost_peer(self, peer: int) -> PeerLostError:
        return PeerLostError(
            f"simulated worker {self.rank} of {self.size} could not finish a message with worker {peer}: it "
            f"died",
            peer=peer,
        )

    def _where(self) -> str:
        return f" in {self._name.removeprefix('/')}" if self._name else ""

    def agree(
        self,
        call: str,
        value: Any,
        combine: Callable[[list[Any]], Sequence[Any]],
        *,
        traffic: costs.Traffic | None = None,
    ) -> Any:
        """Meet the others with any value; return our part of what `combine` makes of all, in rank order.

        Args:
            call: in words; all come with the same.
            value: what this worker brings.
            combine: runs once on behalf of all; what it gives may be dropped, when someone dies meanwhile.
            traffic: what it sends; none means nothing.
        """
        worker = self._worker
        try:
            answer = worker.turns.meet(
                worker.member,
                call + self._where(),
                value,
                partial(self._finish, combine, traffic),
                self.ranks,
            )
        except MemberLostError as error:
            dead = " and ".join(f"worker {self.ranks.index(rank)}" for rank in error.ranks)
            raise WorkerLostError(
                f"simulated worker {self.rank} of {self.size} could not finish {call!r}: {dead} died; form a "
                f"new group (`OuterGroup.reform`), or go on from the last checkpoint"
            ) from error
        if traffic is not None:
            self.bytes_sent += traffic.bytes_sent
            worker.bytes_sent += traffic.bytes_sent
        return answer

    def report(self) -> WorkerReport:
        """Return where this worker's virtual time went so far."""
        return self._worker.report()

    def _meet(self, name: str, x: Tensor, traffic: costs.Traffic, combine: Combine) -> Tensor:
        """Call one collective."""
        dtype = str(x.dtype).removeprefix("torch.")
        call = f"{name} of {dtype}{list(x.shape)} on {x.device}"
        return self.agree(call, x.detach(), combine, traffic=traffic)

    def _finish(
        self, combine: Callable[[list[Any]], Sequence[Any]], traffic: costs.Traffic | None, values: list[Any]
    ) -> Outcome:
        """Combine everyone's values, once for all."""
        return Outcome(
            answers=combine(values), seconds=0.0 if traffic is None else self._link.seconds(traffic)
        )


def _for_all(combine: Callable[[list[Tensor]], Tensor]) -> Combine:
    """Give everyone the same values, but a tensor of its own, which it may change in place."""

    def copies(values: list[Tensor]) -> list[Tensor]:
        result = combine(values)
        return [result.clone() for _ in values]

    return copies


def _turn(values: list[Tensor]) -> list[Tensor]:
    """Give worker j everyone's row j."""
    return [stack([rows[receiver] for rows in values]) for receiver in range(len(values))]


def _add_up(values: list[Tensor]) -> Tensor:
    """Add one after the other: elementwise, so that the order of additions is the same on every machine."""
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total


def _average(values: list[Tensor]) -> Tensor:
    return _add_up(values) / len(values)


def _check_moments(setting: str, moments_s: Mapping[int, float], *, num_workers: int) -> None:
    for rank, moment_s in moments_s.items():
        if not 0 <= rank < num_workers:
            raise ValueError(f"{setting} names worker {rank}, but the world has {num_workers}, from 0")
        if not 0 <= moment_s < math.inf:
            raise ValueError(f"{setting} of worker {rank} is {moment_s} s; it must be at least 0 and finite")
