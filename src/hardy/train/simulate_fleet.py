"""The virtual time of many workers as arrays: what `SimWorld` does with threads, without threads or tensors.

The same sums in the same order, so equal programs give equal bits; a test compares the two.
"""

from collections.abc import Sequence

import numpy as np

from hardy.distributed.costs import Link, Traffic
from hardy.train.simulate_config import Life
from hardy.train.simulate_result import Ledger
from hardy.train.simulate_times import Ints, StepTimes


class MemberLostError(Exception):
    """Someone who was expected at a meeting has died; those who live have noticed it."""


class Fleet:
    """Where each life stands; a worker that comes back has a new life.

    Args:
        lives: who there is.
        link: between any two workers.
        times: of their steps.
        detect_s: until the others notice that one they wait for is dead.
    """

    def __init__(self, lives: Sequence[Life], *, link: Link, times: StepTimes, detect_s: float) -> None:
        self.lives = lives
        self.workers = np.array([life.worker for life in lives], dtype=np.int64)
        """Worker of each life."""
        self.births_s = np.array([life.birth_s for life in lives])
        self.deaths_s = np.array([life.death_s for life in lives])
        self.now_s = self.births_s.copy()
        """The clock of each."""
        self.idle_s = np.zeros(len(lives))
        """Waited so far, since birth."""
        self.exchange_s = np.zeros(len(lives))
        """In meetings, after everyone had arrived."""
        self.bytes_sent = np.zeros(len(lives), dtype=np.int64)
        self.steps = np.zeros(len(lives), dtype=np.int64)
        """Finished steps of each."""
        self._begun = np.zeros(int(self.workers.max()) + 1, dtype=np.int64)
        self._link, self._times, self._detect_s = link, times, detect_s

    def ledger(self, took_part: Ints) -> Ledger:
        """Return where the time of these lives went."""
        return Ledger(
            workers=self.workers[took_part],
            spans_s=(self.now_s - self.births_s)[took_part],
            ends_s=self.now_s[took_part],
            idle_s=self.idle_s[took_part],
            exchange_s=self.exchange_s[took_part],
            bytes_sent=self.bytes_sent[took_part],
            steps=self.steps[took_part],
        )

    def alive(self, members: Ints) -> Ints:
        """Return those of the members who live."""
        return members[self.now_s[members] < self.deaths_s[members]]

    def work(self, members: Ints) -> None:
        """Let those of the members who live begin a step and work it through, or die meanwhile."""
        members = self.alive(members)
        workers = self.workers[members]
        seconds = self._times.seconds_of(workers, self._begun[workers], self.now_s[members])
        self._begun[workers] += 1
        self.now_s[members] = np.minimum(self.now_s[members] + seconds, self.deaths_s[members])

    def forget(self) -> None:
        """Drop the variation of steps that are over."""
        self._times.forget(int(self._begun.min()))

    def meet(self, members: Ints, traffic: Traffic | None = None) -> None:
        """Let the members wait for each other and exchange something.

        Raises:
            MemberLostError: one of them is dead by then.
        """
        now_s, deaths_s = self.now_s[members], self.deaths_s[members]
        seconds = 0.0 if traffic is None else self._link.seconds(traffic)
        latest_s = now_s.max()
        end_s = latest_s + seconds
        if ((now_s >= deaths_s) | (deaths_s <= end_s)).any():
            self._notice(self.alive(members), float(deaths_s.min()))
            raise MemberLostError
        self.idle_s[members] += latest_s - now_s
        self.exchange_s[members] += seconds
        self.now_s[members] = end_s
        if traffic is not None:
            self.bytes_sent[members] += traffic.bytes_sent

    def meet_often(self, members: Ints, traffics: Sequence[Traffic]) -> None:
        """Let the members exchange one thing after the other.

        Raises:
            MemberLostError: one of them is dead by then.
        """
        for place, traffic in enumerate(traffics):
            if place and self._follow(members, traffics[place:]):
                return
            self.meet(members, traffic)

    def _follow(self, members: Ints, traffics: Sequence[Traffic]) -> bool:
        """Go on after a meeting, where all are at one moment and nobody dies; False where that is not so."""
        now_s, exchange_s = (values[members] for values in (self.now_s, self.exchange_s))
        if (now_s != now_s[0]).any() or (exchange_s != exchange_s[0]).any():
            return False
        end_s, spent_s = float(now_s[0]), float(exchange_s[0])
        for traffic in traffics:
            seconds = self._link.seconds(traffic)
            end_s, spent_s = end_s + seconds, spent_s + seconds
        if (self.deaths_s[members] <= end_s).any():
            return False
        self.now_s[members], self.exchange_s[members] = end_s, spent_s
        self.bytes_sent[members] += sum(traffic.bytes_sent for traffic in traffics)
        return True

    def gather_survivors(self, members: Ints) -> Ints:
        """Let the members who live wait for each other, however many die meanwhile, and return them."""
        while True:
            members = self.alive(members)
            if not len(members):
                raise MemberLostError
            deaths_s = self.deaths_s[members]
            if not (deaths_s <= self.now_s[members].max()).any():
                self.meet(members)
                return members
            first_s = float(deaths_s.min())
            waiting = self.now_s[members] <= first_s
            self._notice(members[waiting], first_s)

    def wait_until(self, member: int, moment_s: float, *, poll_s: float) -> None:
        """Let one look again and again, until the first look at `moment_s` or later."""
        now_s = float(self.now_s[member])
        while now_s < moment_s:
            now_s += poll_s
        self.idle_s[member] += now_s - self.now_s[member]
        self.now_s[member] = now_s

    def _notice(self, members: Ints, died_s: float) -> None:
        """Let those who wait notice a death, or die themselves before."""
        now_s = self.now_s[members]
        noticed_s = np.minimum(np.maximum(now_s, died_s) + self._detect_s, self.deaths_s[members])
        self.idle_s[members] += noticed_s - now_s
        self.now_s[members] = noticed_s
