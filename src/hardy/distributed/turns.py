"""Threads that take turns in virtual time: the ground under `simulation`, free of tensors and networks.

Exactly one thread runs at a time: of the members that can go on, the one whose clock is furthest behind, then
the lowest rank. A thread gives up its turn when it advances its clock, meets others or waits for a letter, so
what it does happens no earlier in virtual time than all that others did before. The order is the same on
every machine.

Members may begin late, and die: what would end at the moment of a death or later does not happen. A letter
that had left its sender by then arrives.
"""

import heapq
import math
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
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


@dataclass(frozen=True, kw_only=True)
class Letter:
    """A value on its way to one member."""

    value: Any
    posted_s: float
    """When it was handed over to the sender's link."""
    left_s: float
    """When all of it had left the sender."""
    arrives_s: float


@dataclass(frozen=True, kw_only=True)
class _Expected:
    """A letter that one member waits for."""

    source: int
    key: Hashable
    name: str


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
    """Time it waited for others to arrive at a meeting, or to post a letter."""
    meeting_s: float = 0.0
    """Time it spent in meetings after everyone had arrived, and waiting for letters on their way."""
    turn: threading.Lock = field(default_factory=_closed)
    """Released to let this member run."""
    arrival: _Arrival | None = None
    """The meeting it waits in."""
    expected: _Expected | None = None
    """The letter it waits for."""
    letters: dict[tuple[int, Hashable], deque[Letter]] = field(default_factory=lambda: defaultdict(deque))
    """Letters to it, by who sent them and their key, in the order of posting."""
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

    @property
    def waits(self) -> bool:
        """Whether it needs others to go on."""
        return self.arrival is not None or self.expected is not None


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
            CollectiveMismatchError: the members did not meet at the same calls, or wait for letters that
                nobody posts.
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

    def post(self, member: Member, to: int, key: Hashable, letter: Letter) -> None:
        """Put a letter on its way; its sender goes on at once.

        Raises:
            MemberLostError: the other has died, and there was time to notice.
        """
        self._end_if_dead(member)
        other = self.members[to]
        if other.died_s is not None:
            if member.now_s >= other.died_s + self.detect_s:
                raise MemberLostError([to])
            return
        waiting = other.letters[member.rank, key]
        waiting.append(letter)
        is_expected = other.expected and (other.expected.source, other.expected.key) == (member.rank, key)
        if is_expected and len(waiting) == 1:
            self._schedule(other, min(letter.arrives_s, other.dies_at_s))

    def take(self, member: Member, source: int, key: Hashable, *, name: str) -> Any:
        """Wait for the next letter with this key from `source`, and return what it holds.

        Raises:
            MemberLostError: the sender has died, and no letter of it is under way; raised `detect_s` after
                both the death and the beginning of the wait.
        """
        self._end_if_dead(member)
        member.expected = _Expected(source=source, key=key, name=name)
        member.lost = []
        waiting = member.letters[source, key]
        if waiting:
            self._schedule(member, min(max(member.now_s, waiting[0].arrives_s), member.dies_at_s))
        elif self.members[source].died_s is not None:
            member.lost = [source]
            self._schedule(member, min(member.now_s + self.detect_s, member.dies_at_s))
        elif member.dies_at_s < math.inf:
            self._schedule(member, member.dies_at_s)
        self._pause(member)
        if member.lost:
            raise MemberLostError(member.lost)
        letter = waiting.popleft()
        if not waiting:
            del member.letters[source, key]
        return letter.value

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
            self._drop_letters(member, other)
            if other.arrival is None or member.rank not in other.arrival.among:
                continue
            if not other.lost:
                self._schedule(other, min(member.died_s + self.detect_s, other.dies_at_s))
            other.lost.append(member.rank)

    def _drop_letters(self, dead: Member, other: Member) -> None:
        """Take back letters that had not left the dead one; let the other notice that none comes."""
        assert dead.died_s is not None, "only of the dead"
        for (source, _key), waiting in other.letters.items():
            while source == dead.rank and waiting and waiting[-1].left_s > dead.died_s:
                waiting.pop()
        expected = other.expected
        if expected and expected.source == dead.rank and not other.letters[dead.rank, expected.key]:
            other.lost = [dead.rank]
            self._schedule(other, min(dead.died_s + self.detect_s, other.dies_at_s))

    def _schedule(self, member: Member, moment_s: float) -> None:
        """Let the member go on at this moment, and at no other."""
        member.ticket += 1
        heapq.heappush(self._runnable, (moment_s, member.rank, member.ticket))

    def _hand_over(self) -> None:
        """Let the next member run. Whoever calls this has the turn and waits or ends right after."""
        following = self._next() if self._failure is None else None
        if following is None and any(member.waits for member in self.members):
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
            if member.waits:
                self._let_go(member, moment_s)
            return member
        return None

    def _let_go(self, member: Member, moment_s: float) -> None:
        """End a wait, and count its time."""
        on_the_way_s = 0.0
        if member.expected is not None and not member.lost:
            waiting = member.letters[member.expected.source, member.expected.key]
            if waiting:  # none when it is this member that dies
                on_the_way_s = max(moment_s - max(member.now_s, waiting[0].posted_s), 0.0)
        member.meeting_s += on_the_way_s
        member.idle_s += moment_s - member.now_s - on_the_way_s
        member.now_s, member.arrival, member.expected = moment_s, None, None

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
            elif member.expected is not None:
                name = member.expected.name
            ranks_by_call[name].append(str(member.rank))
        lines = [f"  rank {', '.join(ranks)}: {name}" for name, ranks in ranks_by_call.items()]
        if any(member.expected is not None for member in self.members):
            return "nobody can go on, as letters are waited for that nobody posts:\n" + "\n".join(lines)
        return (
            f"the workers do not agree on collective number {self._num_meetings + 1}; all must make the same "
            f"calls in the same order, with equal shapes and dtypes:\n" + "\n".join(lines)
        )
