"""Threads that take turns in virtual time: the ground under `simulation`, free of tensors and networks.

Exactly one thread runs at a time: of the members that can go on, the one whose clock is furthest behind, then
the lowest rank. A thread gives up its turn when it advances its clock or meets others, so what it does
happens no earlier in virtual time than all that others did before. The order is the same on every machine.

Members may begin late, and die: what would end at the moment of a death or later does not happen.
"""

import heapq
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

R = TypeVar("R")


class CollectiveMismatchError(RuntimeError):
    """Workers made different calls at the same point, or one ended while others waited for it."""


class MemberLostError(RuntimeError):
    """Someone who was expected at a meeting has died."""

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__(f"died: {', '.join(str(rank) for rank in sorted(ranks))}")
        self.ranks = tuple(sorted(ranks))


class _Died(BaseException):
    """Ends a thread by its member's death; no `except Exception` of the body may hold it."""


class _Stopped(BaseException):
    """Unwinds a thread after another one failed; no `except Exception` of the body may hold it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What comes out of a meeting."""

    answers: Sequence[Any]
    """What each member gets, in rank order."""
    seconds: float
    """How long the meeting takes once everyone is there."""


@dataclass(frozen=True, kw_only=True)
class _Arrival:
    """One member at a meeting."""

    name: str
    value: Any
    finish: Callable[[list[Any]], Outcome]
    among: tuple[int, ...]
    """Who meets, in the order of values and answers."""


def _closed() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass(eq=False, kw_only=True)
class Member:
    """One thread and its virtual time."""

    rank: int
    now_s: float = 0.0
    """Its clock."""
    idle_s: float = 0.0
    """Time it waited for others to arrive at a meeting."""
    meeting_s: float = 0.0
    """Time it spent in meetings after everyone had arrived."""
    turn: threading.Lock = field(default_factory=_closed)
    """Released to let this member run."""
    arrival: _Arrival | None = None
    """The meeting it waits in."""
    lost: list[int] = field(default_factory=list)
    """Who died while it waited for them."""
    answer: Any = None
    result: Any = None
    has_ended: bool = False
    dies_at_s: float = math.inf
    died_s: float | None = None
    """When it died."""
    ticket: int = 0
    """Number of its entry among the runnable; older ones do not count."""


class Turns:
    """One run of `num_members` threads; used once.

    Args:
        num_members: how many.
        births: when a member begins, in seconds by rank; not listed is 0.
        deaths: when a member dies, in seconds by rank; not listed does not.
        detect_s: how long the others take to notice, once they wait for one who is dead.
    """

    def __init__(
        self,
        num_members: int,
        *,
        births: Mapping[int, float] | None = None,
        deaths: Mapping[int, float] | None = None,
        detect_s: float = 1.0,
    ) -> None:
        births, deaths = births or {}, deaths or {}
        self.members = [
            Member(
                rank=rank,
                now_s=births.get(rank, 0.0),
                idle_s=births.get(rank, 0.0),
                dies_at_s=deaths.get(rank, math.inf),
            )
            for rank in range(num_members)
        ]
        self.detect_s = detect_s
        self._everyone = tuple(range(num_members))
        self._runnable: list[tuple[float, int, int]] = []  # a heap of (moment, rank, ticket)
        self._failure: BaseException | None = None
        self._num_meetings = 0
        for member in self.members:
            self._schedule(member, member.now_s)

    def run(self, body: Callable[[Member], R]) -> list[R]:
        """Run `body` in one thread per member and return the results in rank order; of the dead, None.

        Raises:
            CollectiveMismatchError: the members did not meet at the same calls.
            BaseException: what the first failing member raised, with its rank as a note; the others are
                stopped where they wait.
        """
        threads = [
            threading.Thread(
                target=self._live, args=(member, body), daemon=True, name=f"worker-{member.rank}"
            )
            for member in self.members
        ]
        for thread in threads:
            thread.start()
        self._hand_over()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # such as Ctrl-C: the members stop at their next wait
            self._failure = error
        if self._failure is not None:
            raise self._failure
        return [member.result for member in self.members]

    def advance(self, member: Member, seconds: float) -> None:
        """Move the member's clock on; those that are now further behind go first."""
        if not seconds >= 0:
            raise ValueError(f"time only moves forward, got a step of {seconds} s")
        self._end_if_dead(member)
        member.now_s = min(member.now_s + seconds, member.dies_at_s)
        self._schedule(member, member.now_s)
        self._pause(member)

    def meet(
        self,
        member: Member,
        name: str,
        value: Any,
        finish: Callable[[list[Any]], Outcome],
        among: Sequence[int] | None = None,
    ) -> Any:
        """Wait until all who meet are at the call `name`, then go on with this member's answer.

        Others run on meanwhile, and several meetings may be open at once.

        Args:
            member: who calls.
            name: the call in words; all who meet must come with the same.
            value: what this member brings.
            finish: makes the outcome from all values, in the order of `among`; called once, on behalf of all.
                When one of them dies before the meeting ends, the outcome is dropped.
            among: ranks of all who meet; all must come with the same. None means everyone.

        Raises:
            MemberLostError: one of them has died; raised `detect_s` after both the death and the arrival.
        """
        self._end_if_dead(member)
        among = self._everyone if among is None else tuple(among)
        if member.rank not in among:
            raise ValueError(f"member {member.rank} meets among {among}, but is none of them")
        member.arrival = _Arrival(name=name, value=value, finish=finish, among=among)
        member.lost = [rank for rank in among if self.members[rank].died_s is not None]
        if member.lost:
            self._schedule(member, min(member.now_s + self.detect_s, member.dies_at_s))
        elif not self._has_finished(member.arrival) and member.dies_at_s < math.inf:
            self._schedule(member, member.dies_at_s)
        self._pause(member)
        if member.lost:
            raise MemberLostError(member.lost)
        answer, member.answer = member.answer, None
        return answer

    def die(self, member: Member) -> NoReturn:
        """End this member here and now."""
        member.dies_at_s = member.now_s
        raise _Died

    def _live(self, member: Member, body: Callable[[Member], Any]) -> None:
        """Be one thread: wait for the first turn, run, pass the turn on for good."""
        member.turn.acquire()
        try:
            if self._failure is None:
                self._end_if_dead(member)
                member.result = body(member)
        except _Died:
            if self._failure is None:
                self._bury(member)
        except _Stopped:
            pass
        except BaseException as error:  # all of them: it is raised again by `run`
            if self._failure is None:
                error.add_note(f"raised in simulated worker {member.rank} of {len(self.members)}")
                self._failure = error
        member.has_ended = True
        self._hand_over()

    def _pause(self, member: Member) -> None:
        """Give up the turn until the next one."""
        self._stop_if_failed()
        self._hand_over()
        member.turn.acquire()
        self._stop_if_failed()
        self._end_if_dead(member)

    def _stop_if_failed(self) -> None:
        if isinstance(self._failure, CollectiveMismatchError):
            raise CollectiveMismatchError(
                str(self._failure)
            )  # each thread has its own, and its own traceback
        if self._failure is not None:
            raise _Stopped

    def _end_if_dead(self, member: Member) -> None:
        if member.now_s >= member.dies_at_s:
            raise _Died

    def _bury(self, member: Member) -> None:
        """Let those who wait for the dead notice in due time."""
        member.died_s = member.now_s
        for other in self.members:
            if other.arrival is None or member.rank not in other.arrival.among:
                continue
            if not other.lost:
                self._schedule(other, min(member.died_s + self.detect_s, other.dies_at_s))
            other.lost.append(member.rank)

    def _schedule(self, member: Member, moment_s: float) -> None:
        """Let the member go on at this moment, and at no other."""
        member.ticket += 1
        heapq.heappush(self._runnable, (moment_s, member.rank, member.ticket))

    def _hand_over(self) -> None:
        """Let the next member run. Whoever calls this has the turn and waits or ends right after."""
        following = self._next() if self._failure is None else None
        if following is None and any(member.arrival is not None for member in self.members):
            self._failure = self._failure or CollectiveMismatchError(self._describe_mismatch())
        if self._failure is not None:
            following = next((member for member in self.members if not member.has_ended), None)
        if following is not None:
            following.turn.release()

    def _next(self) -> Member | None:
        """Return who goes on; one who still waits is then dead, or has noticed that another is."""
        while self._runnable:
            moment_s, rank, ticket = heapq.heappop(self._runnable)
            member = self.members[rank]
            if ticket != member.ticket:
                continue
            if member.arrival is not None:
                member.idle_s += moment_s - member.now_s
                member.now_s, member.arrival = moment_s, None
            return member
        return None

    def _has_finished(self, arrival: _Arrival) -> bool:
        """Finish the meeting if everyone is there and lives to its end; let all go on at the same moment."""
        members = [self.members[rank] for rank in arrival.among]
        arrivals = [member.arrival for member in members if member.arrival is not None and not member.lost]
        if len(arrivals) < len(members) or any(
            (other.name, other.among) != (arrival.name, arrival.among) for other in arrivals
        ):
            return False
        try:
            outcome = arrivals[0].finish([other.value for other in arrivals])
            answers = list(zip(members, outcome.answers, strict=True))
        except BaseException as error:  # without it, a fault in `finish` would leave everyone waiting
            self._failure = error
            return False
        latest_s = max(member.now_s for member in members)
        if any(member.dies_at_s <= latest_s + outcome.seconds for member in members):
            return False
        self._num_meetings += 1
        for member, answer in answers:
            member.idle_s += latest_s - member.now_s
            member.meeting_s += outcome.seconds
            member.now_s = latest_s + outcome.seconds
            member.answer, member.arrival = answer, None
            self._schedule(member, member.now_s)
        return True

    def _describe_mismatch(self) -> str:
        """Say which ranks made which call."""
        ranks_by_call: dict[str, list[str]] = defaultdict(list)
        for member in self.members:
            name = "has ended" if member.died_s is None else "has died"
            if member.arrival is not None:
                name, among = member.arrival.name, member.arrival.among
                if among != self._everyone:
                    name += f" among {', '.join(str(rank) for rank in among)}"
            ranks_by_call[name].append(str(member.rank))
        lines = [f"  rank {', '.join(ranks)}: {name}" for name, ranks in ranks_by_call.items()]
        return (
            f"the workers do not agree on collective number {self._num_meetings + 1}; all must make the same "
            f"calls in the same order, with equal shapes and dtypes:\n" + "\n".join(lines)
        )
