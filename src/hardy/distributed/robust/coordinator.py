"""The coordinator of a run: takes records, decides, answers. Pure; records and time are handed in.

Paper: J. Yan et al., "dSTAR", arXiv 2412.07151 (the server's part; here it sees no gradient).

One step: members ANNOUNCE; the elected get GO and exchange gradients without the coordinator; each says
DONE or FAILED. When all have it, COMMIT; when one has not, RETRY and another GO among the same arrivals,
without those who were lost. Parameters change at COMMIT only, so a step can be tried any number of times.
Who comes late, or is new, gets TAKE: the state of the next step from one that has just applied it (GIVE).
Each member has at most one question open, so its answers never pile up.

Threat model. Covered: members that die, fall silent, come late, announce twice or for another step, and
strangers (`records`). Not covered: a member that forges control messages, corrupts the part that it adds
up, or attacks the machine of the coordinator; nor the loss of the coordinator, after which the run goes on
from its last checkpoint.
"""

import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from hardy.distributed.robust.admission import NO_STATE, Admission, Seat
from hardy.distributed.robust.election import (
    PACE_STEPS,
    Election,
    Pace,
    Rules,
    ShortfallError,
    Starvation,
)
from hardy.distributed.robust.election_log import Elected
from hardy.distributed.robust.messages import announcement_of, counts_record, record_of
from hardy.distributed.robust.records import REASONS, Kind, Reason, Record

logger = logging.getLogger(__name__)

Address = tuple[int, int] | bytes
"""Where an answer goes: a member's rank and generation, or the nonce of one that is none."""
MAX_TRIES = 3
"""Of one step, before the member whom others could not reach most often is left out."""


@dataclass(eq=False, kw_only=True)
class _Attempt:
    """An election that was decided, until all the elected have the result."""

    number: int
    elected: dict[int, int]
    """Generation by rank."""
    begun_s: float
    answers: dict[int, bool] = field(default_factory=dict)
    """Whether it has the result, by rank."""
    heard_s: float | None = None
    """When the last answer came, or somebody was lost."""


class Coordinator:
    """Decides for all members.

    Args:
        rules: of elections.
        replicas: ranks go from 0 to one below.
        digest: of run id, settings and versions; members that differ are refused.
        founders: members without which the first election does not begin; none means all.
        record_line: takes the log, a line for each step.
        replay: who is elected at each step, instead of by arrival.
    """

    def __init__(
        self,
        rules: Rules,
        *,
        replicas: int,
        digest: bytes,
        founders: int | None = None,
        record_line: Callable[[Elected], None] | None = None,
        replay: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        self.rules = rules
        self.counts: Counter[str] = Counter()
        """late, duplicates, refused, lost, and elections made again."""
        self.has_ended = False
        self._refused: Counter[str] = Counter()
        self._admission = Admission(replicas=replicas, digest=digest)
        self._founders = replicas if founders is None else founders
        self._record_line, self._replay = record_line, replay
        self._seats: dict[int, Seat] = {}
        self._gone: set[int] = set()
        self._step, self._has_begun = NO_STATE, False
        self._finished_s: float | None = None
        self._accused: Counter[int] = Counter()
        self._opened_s: dict[int, float] = {}
        self._election: Election | None = None
        self._attempt: _Attempt | None = None
        self._tries = 0
        self._occasions = itertools.count(1)
        self._pace, self._starvation = Pace(), Starvation(rules.starve_limit)
        self._mail: list[tuple[Address, list[Record]]] = []

    def receive(self, record: Record, now_s: float) -> None:
        """Take one record of a member, or of one that wants to be."""
        if self.has_ended:
            return
        if record.kind is Kind.JOIN:
            self._join(record, now_s)
            return
        seat = self._seats.get(record.rank)
        if seat is None or seat.generation != record.generation:
            self.refuse(f"replica {record.rank}", "a member that is none any more")
            return
        if record.number <= seat.number:
            self.counts["duplicates"] += 1
            return
        seat.number = record.number
        handle = {
            Kind.ANNOUNCE: self._announce,
            Kind.DONE: self._answer,
            Kind.FAILED: self._answer,
            Kind.ASK: self._ask,
            Kind.FINISH: self._finish,
            Kind.LEAVE: self._leave,
        }.get(record.kind)
        if handle is None:
            self.refuse(f"replica {record.rank}", f"a {record.kind.name}, which only the coordinator says")
            return
        handle(seat, record, now_s)

    def tick(self, now_s: float) -> None:
        """Decide what can be decided now."""
        if self.has_ended:
            return
        self._begin(now_s)
        self._settle(now_s)
        self._elect(now_s)
        self._help()
        self._end_if_done(now_s)

    def due_s(self, now_s: float) -> float:
        """Return the next moment at which `tick` may decide without a record."""
        if self._attempt is not None:
            return self._end_of_silence_s(self._attempt)
        if self._finished_s is not None:
            return self._finished_s + self.rules.finish_s
        return math.inf if self._election is None else self._election.due_s(now_s)

    def take_mail(self) -> list[tuple[Address, list[Record]]]:
        """Return what is to be sent, once."""
        mail, self._mail = self._mail, []
        return mail

    def lose(self, rank: int, now_s: float, *, reason: Reason = Reason.SILENT) -> None:
        """Go on without a replica that has ended, fell silent or does not keep the protocol."""
        self._gone.add(rank)
        if reason in (Reason.FLOOD, Reason.OVERSIZED):
            self._admission.bar(rank)
        seat = self._seats.pop(rank, None)
        if seat is None:
            return
        self.counts["lost"] += reason is not Reason.NONE
        level = logging.INFO if reason is Reason.NONE else logging.WARNING
        logger.log(level, "the others go on without replica %d: %s", rank, REASONS[reason])
        self._mail.append((seat.address, [Record(kind=Kind.OUT, reason=reason, rank=rank)]))
        if self._election is not None:
            self._election.lose(rank)
            self._election.num_live = len(self._seats)
        if self._attempt is not None and rank in self._attempt.elected:
            self._attempt.heard_s = now_s

    def refuse(self, whose: str, what: str) -> None:
        """Count a message that is not what it should be, and say so in one line, ever more rarely."""
        self.counts["refused"] += 1
        self._refused[whose] += 1
        number = self._refused[whose]
        if number & (number - 1) == 0:  # a flood must not fill the log
            logger.warning("message %d of %s that is refused: %s", number, whose, what)

    def fail(self, reason: Reason) -> None:
        """Send all home, for nothing can go on."""
        self.has_ended = True
        if reason is not Reason.NONE:
            logger.error("the run cannot go on: %s", REASONS[reason])
        for seat in self._seats.values():
            self._mail.append((seat.address, [Record(kind=Kind.END, reason=reason, step=self._step)]))

    @property
    def members(self) -> dict[int, int]:
        """The generation of each member, by rank."""
        return {rank: seat.generation for rank, seat in self._seats.items()}

    def _join(self, record: Record, now_s: float) -> None:
        reason = self._admission.objection(record)
        if reason is not Reason.NONE:  # under one name, for strangers may call themselves by any number
            self.refuse("one that asks to join", f"as replica {record.rank}: {REASONS[reason]}")
            self._mail.append((record.nonce, [Record(kind=Kind.REFUSE, reason=reason, rank=record.rank)]))
            return
        if self._admission.is_replayed(record):
            self.counts["duplicates"] += 1
            return
        if record.rank in self._seats:
            self.lose(record.rank, now_s, reason=Reason.REPLACED)
        generation = self._admission.next_generation(record.rank)
        if self._step == NO_STATE:
            self._step = record.step
        at = record.step if not self._has_begun and record.step == self._step else NO_STATE
        self._seats[record.rank] = Seat(rank=record.rank, generation=generation, at=at)
        self._gone.discard(record.rank)
        admitted = Record(kind=Kind.ADMIT, rank=record.rank, generation=generation, step=at)
        self._mail.append((record.nonce, [admitted]))
        self._open(now_s)
        if self._election is not None:
            self._election.num_live = len(self._seats)
            if at != NO_STATE:
                self._election.admit(record.rank, generation)

    def _announce(self, seat: Seat, record: Record, now_s: float) -> None:
        if seat.at == NO_STATE:  # it waits for state, so this is a second announcement of the same gradient
            self.counts["duplicates"] += 1
            return
        if record.step > seat.at:
            self.refuse(f"replica {seat.rank}", f"step {record.step}, while it is at {seat.at}")
            return
        if record.step < seat.at:
            self.counts["late"] += 1
            return
        if record.step < self._step:
            self.counts["late"] += 1
            if record.step in self._opened_s:
                self._pace.note(record.step, now_s - self._opened_s[record.step])
            seat.at = NO_STATE
            return
        assert self._election is not None, "a member that holds state has opened it"
        answer = self._election.receive(announcement_of(record), now_s)
        if answer in ("taken", "late"):
            seat.can_give = True
            self.counts["late"] += answer == "late"
        elif answer == "repeat":
            self.counts["duplicates"] += 1
        elif answer == "stale":  # of an earlier step, where late gradients are discarded
            self.counts["late"] += 1
            self._election.release(seat.rank)
            seat.at = NO_STATE
        else:
            self.refuse(f"replica {seat.rank}", f"an announcement that is {answer}")

    def _answer(self, seat: Seat, record: Record, now_s: float) -> None:
        attempt = self._attempt
        if attempt is None or record.attempt != attempt.number or seat.rank not in attempt.elected:
            return  # of an attempt that is over
        attempt.answers[seat.rank] = record.kind is Kind.DONE
        attempt.heard_s = now_s
        if record.kind is Kind.FAILED:
            self._accused[record.peer] += 1

    def _ask(self, seat: Seat, record: Record, now_s: float) -> None:
        if self._election is not None:
            self._election.release(seat.rank)
        seat.at, seat.can_give = NO_STATE, False

    def _finish(self, seat: Seat, record: Record, now_s: float) -> None:
        seat.can_give = seat.has_finished = seat.at == record.step

    def _leave(self, seat: Seat, record: Record, now_s: float) -> None:
        self.lose(seat.rank, now_s, reason=Reason.NONE)

    def _open(self, now_s: float) -> None:
        """Open the election of the next step."""
        if self._election is not None or self._step == NO_STATE:
            return
        candidates = {rank: seat.generation for rank, seat in self._seats.items() if seat.at == self._step}
        starved: list[int] = []
        if self.rules.include_starved:
            starved = [rank for rank in self._starvation.starved if rank in candidates]
        for rank in starved:
            self._starvation.waited(rank)
        wanted = None if self._replay is None else self._replay.get(self._step)
        if self._replay is not None and wanted is None:
            logger.info("step %d is not in the log that is replayed; now arrival decides", self._step)
            self._replay = None
        self._opened_s[self._step] = now_s
        self._tries, self._accused = 0, Counter()
        self._election = Election(
            self.rules,
            step=self._step,
            opened_s=now_s,
            candidates=candidates,
            pace=self._pace,
            num_live=len(self._seats),
            waits_for=starved,
            wanted=None if wanted is None else set(wanted) - self._gone,
        )

    def _begin(self, now_s: float) -> None:
        """Let elections be decided, once those who begin are there or lost."""
        if self._has_begun or len(self._seats) + len(self._gone) < self._founders:
            return
        if self._election is None:
            if self._seats:
                self.fail(Reason.NO_STATE)
            return
        self._has_begun = True
        self._opened_s[self._step] = now_s
        self._election.begin(now_s)

    def _elect(self, now_s: float) -> None:
        """Begin an attempt when the election is decided."""
        if self._election is None or self._attempt is not None or not self._has_begun:
            return
        try:
            elected = self._election.decide(now_s)
        except ShortfallError as error:
            logger.error("%s", error)
            self.fail(Reason.SHORTFALL)
            return
        if elected is None:
            return
        self._tries += 1
        self.counts["reelections"] += self._tries > 1
        number = next(self._occasions)
        arrived = self._election.arrived
        generations = {rank: arrived[rank].generation for rank in elected}
        self._attempt = _Attempt(number=number, elected=generations, begun_s=now_s)
        records = [record_of(arrived[rank]) for rank in elected]
        for rank in elected:
            seat = self._seats[rank]
            seat.can_give = False
            go = Record(kind=Kind.GO, rank=rank, step=self._step, attempt=number)
            self._mail.append((seat.address, [go, *records]))

    def _settle(self, now_s: float) -> None:
        """End the attempt when all have answered, or those who have not are lost.

        Once one has the result, all others have sent their parts and have it soon; once one has failed, all
        others fail soon. So who is silent long after the last answer has died.
        """
        attempt = self._attempt
        if attempt is None:
            return
        members = self.members
        there = [rank for rank, generation in attempt.elected.items() if members.get(rank) == generation]
        silent = [rank for rank in there if rank not in attempt.answers]
        if silent and now_s < self._end_of_silence_s(attempt):
            return
        for rank in silent:
            self.lose(rank, now_s)
        there = [rank for rank in there if rank not in silent]
        self._attempt = None
        if there and all(attempt.answers[rank] for rank in there):
            self._commit(attempt, there, now_s)
        else:
            self._retry(attempt, there, now_s)

    def _end_of_silence_s(self, attempt: _Attempt) -> float:
        """Return until when those who have not answered may be silent; infinity where others will tell.

        Others who were elected fail when one of them is silent, and say so. One alone is missed by nobody,
        and can be spared where another one holds the same parameters.
        """
        rules = self.rules
        if attempt.heard_s is not None:
            return attempt.heard_s + rules.silence_s
        others = (seat.at for rank, seat in self._seats.items() if rank not in attempt.elected)
        if len(attempt.elected) > 1 or self._step not in others:
            return math.inf
        return attempt.begun_s + rules.finish_s + rules.silence_s

    def _retry(self, attempt: _Attempt, there: Iterable[int], now_s: float) -> None:
        assert self._election is not None, "attempts are made of elections"
        accused = [rank for rank, _ in self._accused.most_common() if rank in self._seats]
        if self._tries % MAX_TRIES == 0 and accused:  # it answers, but others cannot reach it
            self.lose(accused[0], now_s, reason=Reason.UNREACHABLE)
            there = [rank for rank in there if rank != accused[0]]
        self._election.reopen()
        for rank in there:
            seat = self._seats[rank]
            seat.can_give = True
            record = Record(kind=Kind.RETRY, rank=rank, step=self._step, attempt=attempt.number)
            self._mail.append((seat.address, [record]))

    def _commit(self, attempt: _Attempt, there: list[int], now_s: float) -> None:
        """Let the elected apply the result, and hand it to those who were not elected."""
        election = self._election
        assert election is not None, "attempts are made of elections"
        self._note(election, sorted(attempt.elected), now_s)
        for rank, seat in self._seats.items():
            if rank in there:
                seat.at = self._step + 1
            elif rank in election.arrived:
                seat.at, seat.can_give = NO_STATE, False
        self._step += 1
        self._election = None
        gives, takes = self._pair(there)
        counts = self._counts(election)
        for rank in there:
            commit = Record(kind=Kind.COMMIT, rank=rank, step=self._step, attempt=attempt.number)
            self._mail.append((self._seats[rank].address, [commit, counts, *gives.get(rank, [])]))
        self._mail.extend(takes)
        self._pace.forget(self._step)
        self._opened_s = {step: at for step, at in self._opened_s.items() if step > self._step - PACE_STEPS}
        self._open(now_s)

    def _pair(self, givers: list[int]) -> tuple[dict[int, list[Record]], list[tuple[Address, list[Record]]]]:
        """Give each member without state one that has it, in turn; return what both are told."""
        gives: dict[int, list[Record]] = {}
        takes: list[tuple[Address, list[Record]]] = []
        waiting = [seat for seat in self._seats.values() if seat.at == NO_STATE]
        for seat, giver in zip(waiting, itertools.cycle(givers), strict=False):
            server = self._seats[giver]
            step, meeting = server.at, next(self._occasions)
            for kind, who, other in ((Kind.GIVE, server, seat), (Kind.TAKE, seat, server)):
                record = Record(
                    kind=kind,
                    rank=who.rank,
                    generation=who.generation,
                    step=step,
                    attempt=meeting,
                    peer=other.rank,
                    peer_generation=other.generation,
                )
                if kind is Kind.GIVE:
                    gives.setdefault(giver, []).append(record)
                else:
                    takes.append((seat.address, [record]))
            seat.at = step
            if self._election is not None and step == self._election.step:
                self._election.admit(seat.rank, seat.generation)
        return gives, takes

    def _help(self) -> None:
        """Where too few hold the state to go on, let one that waits hand it out before the step is made."""
        if self._attempt is not None or not any(seat.at == NO_STATE for seat in self._seats.values()):
            return
        if self._election is None or not (self._election.lacks() or self._all_have_finished()):
            return
        givers = [rank for rank, seat in self._seats.items() if seat.can_give and seat.at == self._step]
        if givers:
            gives, takes = self._pair(givers)
            for rank, records in gives.items():
                self._mail.append((self._seats[rank].address, records))
            self._mail.extend(takes)
        elif all(seat.at == NO_STATE for seat in self._seats.values()):
            self.fail(Reason.NO_STATE)

    def _all_have_finished(self) -> bool:
        """Whether all who are at the newest state have done the last step."""
        newest = [seat for seat in self._seats.values() if seat.at == self._step]
        return bool(newest) and all(seat.has_finished for seat in newest)

    def _end_if_done(self, now_s: float) -> None:
        """End the run when all have the last state, or the others were waited for long enough."""
        if not self._all_have_finished():
            self._finished_s = None
            return
        self._finished_s = now_s if self._finished_s is None else self._finished_s
        late = [rank for rank, seat in self._seats.items() if not seat.has_finished]
        if late and now_s >= self._finished_s + self.rules.finish_s:
            for rank in late:
                self.lose(rank, now_s)
            late = []
        if not late:
            self.fail(Reason.NONE)

    def _note(self, election: Election, elected: list[int], now_s: float) -> None:
        for rank in self._starvation.count(self.members, elected):
            logger.warning(
                "replica %d was not among the first for %d steps in a row: its data is missing from training "
                "(strategy.fastest.starve_limit; include_starved=true waits for it once)",
                rank,
                self.rules.starve_limit,
            )
        if self._record_line is not None:
            line = Elected(
                step=self._step,
                elected=tuple(elected),
                offsets_s=dict(election.offsets_s),
                attempts=self._tries,
                late=self.counts["late"],
                duplicates=self.counts["duplicates"],
                refused=self.counts["refused"],
            )
            self._record_line(line)

    def _counts(self, election: Election) -> Record:
        offsets_s = sorted(election.offsets_s[rank] for rank in election.arrived)
        return counts_record(
            self.counts | Counter(starved=len(self._starvation.starved)),
            kth_arrival_s=offsets_s[min(self.rules.k, len(offsets_s)) - 1],
            last_arrival_s=offsets_s[-1],
        )
