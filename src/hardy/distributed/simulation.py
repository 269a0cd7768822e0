"""N workers in one process with virtual time: the same code as on N machines, and always the same bits.

Each worker is a thread, but exactly one runs at a time (`turns`). Time passes only by `spend`, by
`clock.sleep` and in collectives: a collective ends for everyone at the latest arrival plus what the ring
costs (`costs`). Values are combined in rank order. So results and times depend on the program, the cluster
and the seed alone, never on this machine or its load.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor, stack

from hardy.distributed import costs
from hardy.distributed.comm import check_mean, check_source, check_sum
from hardy.distributed.config import ClusterConfig
from hardy.distributed.turns import Member, Outcome, Turns

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """Where one worker's virtual time went: `virtual_s` = `compute_s` + `transfer_s` + `idle_s`."""

    virtual_s: float
    """Its clock at the end."""
    compute_s: float
    """Spent working."""
    transfer_s: float
    """In collectives, after the last worker arrived."""
    idle_s: float
    """Waiting for others to arrive, and asleep."""
    bytes_sent: int
    """As a ring would send them."""


class SimWorld:
    """Workers that exist in this process only.

    Args:
        num_workers: how many.
        cluster: their speeds and their network; none means equal workers for whom nothing takes time.
        seed: of the random variation of the workers' speeds.

    Example:
        >>> import torch
        >>> SimWorld(3).run(lambda comm: comm.sum(torch.tensor(comm.rank)).item())
        [3, 3, 3]
    """

    def __init__(self, num_workers: int, *, cluster: ClusterConfig | None = None, seed: int = 0) -> None:
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
        self._comms: list[SimComm] = []

    def run(self, body: Callable[["SimComm"], R]) -> list[R]:
        """Run `body` once per worker, all from virtual time 0, and return their results in rank order.

        Gradient mode, autocast and other settings that torch keeps per thread start at their defaults.

        Raises:
            CollectiveMismatchError: the workers did not call the same collectives.
            BaseException: whatever the first failing worker raised, with its rank as a note; the others are
                stopped where they wait.
        """
        turns = Turns(self.size)
        self._comms = [SimComm(self, turns, member) for member in turns.members]
        return turns.run(lambda member: body(self._comms[member.rank]))

    def report(self) -> list[WorkerReport]:
        """Return where the virtual time of the last run went, in rank order; empty before the first."""
        return [comm.report() for comm in self._comms]


class SimComm:
    """The other simulated workers, seen from one of them. A `Communicator`; `SimWorld.run` makes it."""

    def __init__(self, world: SimWorld, turns: Turns, member: Member) -> None:
        self.rank, self.size = member.rank, world.size
        self.bytes_sent = 0
        self.clock = SimClock(turns, member)
        self._cluster, self._seed = world.cluster, world.seed
        self._turns, self._member = turns, member
        self._compute_s = 0.0
        self._num_spends = 0

    def spend(self, work_s: float) -> None:
        """Work as long as this worker takes for what an ordinary one does in `work_s` seconds.

        Not in `Communicator`: with real workers time passes by itself, so no algorithm needs it; whoever
        simulates a run knows what its work costs and says so here.
        """
        seconds = costs.compute_seconds(
            work_s, self._cluster, rank=self.rank, index=self._num_spends, seed=self._seed
        )
        self._num_spends += 1
        self._compute_s += seconds
        self._turns.advance(self._member, seconds)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x`, added in rank order."""
        check_sum(x)
        return self._meet("sum", x, costs.all_reduce(x.nbytes, self.size), _add_up)

    def mean(self, x: Tensor) -> Tensor:
        """Return the sum in rank order, divided by the number of workers."""
        check_mean(x)
        return self._meet("mean", x, costs.all_reduce(x.nbytes, self.size), _average)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return everyone's `x` stacked in rank order."""
        return self._meet("all_gather", x, costs.all_gather(x.nbytes, self.size), stack)

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        """Return worker `source`'s `x`."""
        check_source(source, num_workers=self.size)
        traffic = costs.broadcast(x.nbytes, self.size)
        return self._meet(f"broadcast from {source}", x, traffic, lambda values: values[source])

    def barrier(self) -> None:
        """Wait until everyone is here."""
        traffic = costs.barrier(self.size)
        self._turns.meet(self._member, "barrier", None, partial(self._finish, traffic, lambda _: None))
        self.bytes_sent += traffic.bytes_sent

    def report(self) -> WorkerReport:
        """Return where this worker's virtual time went so far."""
        member = self._member
        return WorkerReport(
            virtual_s=member.now_s,
            compute_s=self._compute_s,
            transfer_s=member.meeting_s,
            idle_s=member.idle_s + self.clock.slept_s,
            bytes_sent=self.bytes_sent,
        )

    def _meet(
        self, name: str, x: Tensor, traffic: costs.Traffic, combine: Callable[[list[Tensor]], Tensor]
    ) -> Tensor:
        """Call one collective."""
        dtype = str(x.dtype).removeprefix("torch.")
        call = f"{name} of {dtype}{list(x.shape)} on {x.device}"
        answer = self._turns.meet(self._member, call, x.detach(), partial(self._finish, traffic, combine))
        self.bytes_sent += traffic.bytes_sent
        return answer

    def _finish(
        self,
        traffic: costs.Traffic,
        combine: Callable[[list[Tensor]], Tensor | None],
        values: list[Tensor],
    ) -> Outcome:
        """Combine everyone's values, once for all."""
        result = combine(values)
        seconds = traffic.seconds(
            bandwidth_bytes_per_s=self._cluster.bandwidth_bytes_per_s or math.inf,
            latency_s=self._cluster.latency_s,
        )
        # Copies: each worker may change its own in place.
        return Outcome(answers=[None if result is None else result.clone() for _ in values], seconds=seconds)


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
        self._turns.advance(self._member, seconds)
        self.slept_s += seconds


def _add_up(values: list[Tensor]) -> Tensor:
    """Add one after the other: elementwise, so that the order of additions is the same on every machine."""
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total


def _average(values: list[Tensor]) -> Tensor:
    return _add_up(values) / len(values)
