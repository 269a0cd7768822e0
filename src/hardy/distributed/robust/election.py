"""Who takes part in a step: the first k replicas whose gradients are ready. Pure; time is handed in.

Paper: J. Yan et al., "dSTAR", arXiv 2412.07151 (the first k of N).
Letters: N replicas, k, f faulty, c factor.
With independent exponential times of mean 1 a step takes H_N - H_(N-k) on average (harmonic numbers).
Ours: the deadline by median and median absolute deviation, the patience, starvation.
"""

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

from hardy.distributed.robust.fastest_config import FastestConfig

PACE_STEPS = 50
"""Steps whose arrivals make the usual time."""


class ShortfallError(RuntimeError):
    """Too few came in time, and the settings say that this ends the run."""


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """A replica says that its gradient is ready."""

    rank: int
    generation: int
    step: int
    """The step that it should enter."""
    made_at: int
    """The step whose parameters it was computed from."""
    finite: bool = True
    loss: float = math.nan
    square: float = math.nan
    dot: float = math.nan

    @property
    def staleness(self) -> int:
        """How many steps it is late."""
        return self.step - self.made_at

    @property
    def weight(self) -> float:
        """What a late gradient counts: 1 / (1 + staleness)."""
        return 1.0 / (1.0 + self.staleness)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What decides an election."""

    k: int
    least: int = 1
    """2f + 1."""
    deadline_factor: float | None = None
    """c; None takes the first k and nobody else."""
    patience_s: float = math.inf
    on_shortfall: Literal["wait", "shrink", "error"] = "wait"
    takes_late: bool = False
    """Whether gradients of earlier steps may enter, dampened."""
    starve_limit: int = 50
    include_starved: bool = False
    silence_s: float = 10.0
    finish_s: float = 60.0
    """How long those who have done the last step wait for the others, and, with `silence_s` besides, all for
    one that was elected alone."""

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.k:
            raise ValueError(f"k={self.k} must be at least 2f + 1 = {self.least}, which must be at least 1")


def rules_of(config: FastestConfig, *, num_faulty: int) -> Rules:
    """Return the rules that the settings say."""
    return Rules(
        k=config.k,
        least=2 * num_faulty + 1,
        deadline_factor=config.deadline_factor if config.deadline == "mad" else None,
        patience_s=math.inf if config.patience_s is None else config.patience_s,
        on_shortfall=config.on_shortfall,
        takes_late=config.late == "dampen",
        starve_limit=config.starve_limit,
        include_starved=config.include_starved,
        silence_s=config.silence_s,
        finish_s=config.timeout_s,
    )


class Pace:
    """When gradients came in the last steps, measured from the beginning of their step.

    Late ones count too: without them each deadline would be tighter than the one before.
    """

    def __init__(self) -> None:
        self._offsets: deque[tuple[int, float]] = deque()

    def note(self, step: int, offset_s: float) -> None:
        """Take one arrival of a step."""
        self._offsets.append((step, offset_s))

    def forget(self, step: int) -> None:
        """Drop what is `PACE_STEPS` older than this step."""
        self._offsets = deque(pair for pair in self._offsets if pair[0] > step - PACE_STEPS)

    def usual_s(self, factor: float) -> float:
        """Return median + factor * median absolute deviation; 0 before the first arrival."""
        offsets = [offset_s for _, offset_s in self._offsets]
        if not offsets:
            return 0.0
        middle = median(offsets)
        return middle + factor * median(abs(offset_s - middle) for offset_s in offsets)


Answer = Literal["taken", "late", "repeat", "old", "early", "stale", "stranger", "generation"]
"""What becomes of an announcement; `late` is kept for a second election of the same step."""


class Election:
    """One step's election; a second one of the same step keeps the arrivals.

    Args:
        rules: what decides.
        step: steps done before.
        opened_s: when it began.
        candidates: generation by rank of those who hold the parameters of this step.
        pace: of the steps before.
        num_live: replicas that live, candidates or not.
        waits_for: ranks without which nothing is decided while there is patience.
        wanted: who is elected, when a log is replayed; they are waited for until they are lost. None lets the
            rules decide.

    Example:
        >>> election = Election(
        ...     Rules(k=1), step=0, opened_s=0.0, candidates={0: 1, 1: 1}, pace=Pace(), num_live=2
        ... )
        >>> election.receive(Announcement(rank=1, generation=1, step=0, made_at=0), 0.5)
        'taken'
        >>> election.decide(0.5)
        (1,)
    """

    def __init__(
        self,
        rules: Rules,
        *,
        step: int,
        opened_s: float,
        candidates: Mapping[int, int],
        pace: Pace,
        num_live: int,
        waits_for: Collection[int] = (),
        wanted: Collection[int] | None = None,
    ) -> None:
        self.step, self.opened_s = step, opened_s
        self.candidates = dict(candidates)
        self.num_live = num_live
        self.arrived: dict[int, Announcement] = {}
        """In the order of arrival."""
        self.offsets_s: dict[int, float] = {}
        self.elected: tuple[int, ...] | None = None
        self._rules, self._pace = rules, pace
        self._usual_s = math.inf if rules.deadline_factor is None else pace.usual_s(rules.deadline_factor)
        self._waits_for = set(waits_for)
        self._wanted = None if wanted is None else set(wanted)

    def receive(self, announcement: Announcement, now_s: float) -> Answer:
        """Take an announcement, or say why not."""
        rank = announcement.rank
        if rank not in self.candidates:
            return "stranger"
        if announcement.generation != self.candidates[rank]:
            return "generation"
        if announcement.step != self.step:
            return "old" if announcement.step < self.step else "early"
        if announcement.staleness < 0 or (announcement.staleness > 0 and not self._rules.takes_late):
            return "stale"
        if rank in self.arrived:
            return "repeat"
        self.arrived[rank] = announcement
        self.offsets_s[rank] = now_s - self.opened_s
        self._pace.note(self.step, self.offsets_s[rank])
        return "taken" if self.elected is None else "late"

    def admit(self, rank: int, generation: int) -> None:
        """Take in one that holds the parameters of this step now."""
        self.candidates[rank] = generation

    def release(self, rank: int) -> None:
        """Expect no announcement of a replica for this step, as long as it is not taken in again."""
        self.candidates.pop(rank, None)
        self.arrived.pop(rank, None)
        self._waits_for.discard(rank)

    def lose(self, rank: int) -> None:
        """Go on without a replica."""
        self.release(rank)
        if self._wanted is not None:
            self._wanted.discard(rank)

    def begin(self, now_s: float) -> None:
        """Count time from now on; those who came before were there from the beginning."""
        self.opened_s = now_s
        self.offsets_s = dict.fromkeys(self.offsets_s, 0.0)

    def lacks(self) -> bool:
        """Whether it needs replicas that do not hold the parameters of this step."""
        if self._wanted is not None:
            return not self._wanted <= set(self.candidates)
        return len(self.candidates) < self._rules.k

    def reopen(self) -> None:
        """Elect once more, among the same arrivals."""
        self.elected = None

    def decide(self, now_s: float) -> tuple[int, ...] | None:
        """Return who is elected, by rank; None while it is open.

        Raises:
            ShortfallError: too few came within the patience, and the rules say so.
        """
        if self.elected is None:
            chosen = self._chosen(now_s)
            self.elected = None if chosen is None else tuple(sorted(chosen))
        return self.elected

    def due_s(self, now_s: float) -> float:
        """Return the next moment at which time alone may decide; infinity where none is left."""
        moments = [self.opened_s + self._rules.patience_s, self.opened_s + self._usual_s]
        return min((moment_s for moment_s in moments if moment_s > now_s), default=math.inf)

    def _chosen(self, now_s: float) -> list[int] | None:
        rules, came = self._rules, list(self.arrived)
        if self._wanted is not None:
            return sorted(self._wanted) if self._wanted and self._wanted <= set(came) else None
        is_patient = now_s < self.opened_s + rules.patience_s
        if is_patient and not self._waits_for <= set(came):
            return None
        if len(came) < rules.k:
            return None if is_patient else self._short(came)
        first = came[: rules.k] + [rank for rank in came[rules.k :] if rank in self._waits_for]
        if rules.deadline_factor is None:
            return first
        end_s = self.opened_s + self._usual_s
        if now_s < end_s and len(came) < len(self.candidates):
            return None
        in_time = [rank for rank in came if self.opened_s + self.offsets_s[rank] <= end_s]
        return sorted({*first, *in_time})

    def _short(self, came: list[int]) -> list[int] | None:
        """Return who goes on although fewer than k came."""
        rules = self._rules
        if rules.on_shortfall == "error":
            raise ShortfallError(
                f"step {self.step}: {len(came)} of k={rules.k} came within {rules.patience_s:g} s "
                f"(strategy.fastest.patience_s)"
            )
        if rules.on_shortfall == "shrink" and len(came) >= rules.least and 2 * len(came) > self.num_live:
            return came
        return None


class Starvation:
    """Counts for how many steps in a row each replica was left out."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._left_out: dict[int, int] = {}

    @property
    def starved(self) -> tuple[int, ...]:
        """Those who were left out for `limit` steps or more."""
        return tuple(sorted(rank for rank, steps in self._left_out.items() if steps >= self._limit))

    def count(self, live: Collection[int], elected: Collection[int]) -> list[int]:
        """Take one step; return those who have just reached the limit."""
        for rank in live:
            self._left_out[rank] = 0 if rank in elected else self._left_out.get(rank, 0) + 1
        return [rank for rank in live if self._left_out[rank] == self._limit]

    def waited(self, rank: int) -> None:
        """Count anew for one that was waited for, whether it came or not."""
        self._left_out[rank] = 0
