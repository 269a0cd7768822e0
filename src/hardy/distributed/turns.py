"""Threads that take turns in virtual time: the ground under `simulation`, free of tensors and networks.

Exactly one thread runs at a time: of the members that can go on, the one whose clock is furthest behind, then
the lowest rank. A thread gives up its turn when it advances its clock or meets the others, so what it does
happens no earlier in virtual time than all that others did before. The order is the same on every machine.
"""

import heapq
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

R = TypeVar("R")


class CollectiveMismatchError(RuntimeError):
    """Workers made different calls at the same point, or one ended while others waited for it."""


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
    answer: Any = None
    result: Any = None
    has_ended: bool = False


class Turns:
    """One run of `num_members` threads; used once."""

    def __init__(self, num_members: int) -> None:
        self.members = [Member(rank=rank) for rank in range(num_members)]
        self._runnable = [(0.0, rank) for rank in range(num_members)]  # a heap
        self._failure: BaseException | None = None
        self._num_meetings = 0

    def run(self, body: Callable[[Member], R]) -> list[R]:
        """Run `body` in one thread per member and return the results in rank order.

        Raises:
            CollectiveMismatchError: the members did not meet at the same calls.
            BaseException: what the first failing member raised, with its rank as a note; the others are
            stopped
                where they wait.
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
        member.now_s += seconds
        heapq.heappush(self._runnable, (member.now_s, member.rank))
        self._pause(member)

    def meet(self, member: Member, name: str, value: Any, finish: Callable[[list[Any]], Outcome]) -> Any:
        """Wait until all members are at the call `name`, then go on with this member's answer.

        Args:
            member: who calls.
            name: the call in words; all members must come with the same.
            value: what this member brings.
            finish: makes the outcome from all values in rank order; called once, on behalf of all.
        """
        member.arrival = _Arrival(name=name, value=value, finish=finish)
        self._pause(member)
        answer, member.answer = member.answer, None
        return answer

    def _live(self, member: Member, body: Callable[[Member], Any]) -> None:
        """Be one thread: wait for the first turn, run, pass the turn on for good."""
        member.turn.acquire()
        try:
            if self._failure is None:
                member.result = body(member)
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

    def _stop_if_failed(self) -> None:
        if isinstance(self._failure, CollectiveMismatchError):
            raise CollectiveMismatchError(
                str(self._failure)
            )  # each thread has its own, and its own traceback
        if self._failure is not None:
            raise _Stopped

    def _hand_over(self) -> None:
        """Let the next member run. Whoever calls this has the turn and waits or ends right after."""
        if not self._runnable and self._failure is None:
            self._settle()
        if self._failure is not None:
            following = next((member for member in self.members if not member.has_ended), None)
        else:
            following = self.members[heapq.heappop(self._runnable)[1]] if self._runnable else None
        if following is not None:
            following.turn.release()

    def _settle(self) -> None:
        """Nobody can go on: finish the meeting in which all wait, or fail."""
        arrivals = [member.arrival for member in self.members if member.arrival is not None]
        if not arrivals:
            return
        try:
            if len(arrivals) < len(self.members) or len({arrival.name for arrival in arrivals}) > 1:
                raise CollectiveMismatchError(self._describe_mismatch())
            self._finish(arrivals)
        except BaseException as error:  # without it, a fault in `finish` would leave everyone waiting
            self._failure = error

    def _finish(self, arrivals: list[_Arrival]) -> None:
        """Make the outcome and let everyone go on at the same virtual moment."""
        outcome = arrivals[0].finish([arrival.value for arrival in arrivals])
        latest_s = max(member.now_s for member in self.members)
        self._num_meetings += 1
        for member, answer in zip(self.members, outcome.answers, strict=True):
            member.idle_s += latest_s - member.now_s
            member.meeting_s += outcome.seconds
            member.now_s = latest_s + outcome.seconds
            member.answer, member.arrival = answer, None
            heapq.heappush(self._runnable, (member.now_s, member.rank))

    def _describe_mismatch(self) -> str:
        """Say which ranks made which call."""
        ranks_by_call: dict[str, list[str]] = defaultdict(list)
        for member in self.members:
            name = member.arrival.name if member.arrival else "has ended"
            ranks_by_call[name].append(str(member.rank))
        lines = [f"  rank {', '.join(ranks)}: {name}" for name, ranks in ranks_by_call.items()]
        return (
            f"the workers do not agree on collective number {self._num_meetings + 1}; all must make the same "
            f"calls in the same order, with equal shapes and dtypes:\n" + "\n".join(lines)
        )
