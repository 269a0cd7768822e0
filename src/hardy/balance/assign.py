"""Who takes what: longest first, then moves and swaps away from the slowest. The core of every planner here.

Paper: Hydraulis (arXiv 2412.07894). A *taker* is a replica, a pack or a group. Arrays: times [sequences,
takers], inf where a taker cannot have a sequence; tokens [sequences], longest first; room [takers], tokens
that fit; bubbles [takers], how often a taker's dearest sequence counts beyond its sum (stages of a pipeline
less one). Ties go to the lowest index; nothing is drawn.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

ROUNDS = 50
"""Most moves or swaps; a count and not a time limit, so that all ranks find the same."""
ENOUGH = 1 - 1e-9
"""A change must shorten the slowest taker to this share at least."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One assignment to be made."""

    times: Floats
    tokens: Integers
    room: Integers
    bubbles: Integers

    @property
    def num_takers(self) -> int:
        """How many may take."""
        return self.times.shape[1]


def equal_takers(times: Floats, tokens: Integers, *, num_takers: int, room: int, bubble: int = 0) -> Problem:
    """Return the problem in which all takers are alike."""
    return Problem(
        times=np.broadcast_to(times[:, None], (times.size, num_takers)),
        tokens=tokens,
        room=np.full(num_takers, room, dtype=np.int64),
        bubbles=np.full(num_takers, bubble, dtype=np.int64),
    )


def longest_first(problem: Problem) -> Integers | None:
    """Give each sequence, in order, to the taker that would be done with it first; None if one has no place.

    Example:
        >>> both = equal_takers(np.array([5.0, 4, 3, 3]), np.ones(4, np.int64), num_takers=2, room=9)
        >>> longest_first(both).tolist()
        [0, 1, 1, 0]
    """
    times = problem.times
    tokens: list[int] = problem.tokens.tolist()
    left = problem.room.copy()
    scarce = bool(left.min(initial=0) < sum(tokens))
    bubble_times = _bubble_times(problem)
    load = np.zeros(problem.num_takers)
    dearest = np.zeros(problem.num_takers)
    taken_by: Integers = np.empty(len(tokens), dtype=np.int64)
    for i, size in enumerate(tokens):
        done = load + times[i]
        if bubble_times is not None:
            done += np.maximum(dearest, bubble_times[i])
        if scarce:
            done[left < size] = np.inf
        j = int(done.argmin())
        if done[j] == np.inf:
            return None
        taken_by[i] = j
        load[j] += times[i, j]
        left[j] -= size
        if bubble_times is not None:
            dearest[j] = max(dearest[j], bubble_times[i, j])
    return taken_by


def finish_times(problem: Problem, taken_by: Integers) -> Floats:
    """Return when each taker is done."""
    return _state(problem, taken_by, _bubble_times(problem)).finish


def improve(
    problem: Problem, taken_by: Integers, *, rounds: int = ROUNDS, good_enough: float = 0.0
) -> Integers:
    """Return the assignment after the best moves and swaps away from the slowest taker, one a round.

    Args:
        problem: with it the assignment was made.
        taken_by: the taker of each sequence; left alone.
        rounds: at most so many changes.
        good_enough: a lower bound; nothing is tried once it is reached.
    """
    taken_by = taken_by.copy()
    bubble_times = _bubble_times(problem)
    for _ in range(rounds):
        state = _state(problem, taken_by, bubble_times)
        slowest = int(state.finish.argmax())
        if state.finish[slowest] <= good_enough * (1 + 1e-12):
            break
        search = _Search(problem, taken_by, state, slowest, bubble_times)
        moved, swapped = search.best_move(), search.best_swap()
        best = min(moved, swapped)
        if not best[0] < state.finish[slowest] * ENOUGH:
            break
        _, i, other = best
        if best is moved:
            taken_by[i] = other
        else:
            taken_by[i], taken_by[other] = taken_by[other], taken_by[i]
    return taken_by


@dataclass(frozen=True)
class _State:
    """Where an assignment stands."""

    load: Floats
    left: Integers
    finish: Floats
    without: Floats
    """Of each sequence: the bubble its taker would have without it."""


def _bubble_times(problem: Problem) -> Floats | None:
    """Return what the dearest sequence adds, [sequences, takers]; none where no taker is a pipeline."""
    if not problem.bubbles.any():
        return None
    finite = np.where(np.isfinite(problem.times), problem.times, 0.0)
    return finite * problem.bubbles.astype(np.float64)


def _state(problem: Problem, taken_by: Integers, bubble_times: Floats | None) -> _State:
    size, every = problem.num_takers, np.arange(taken_by.size)
    own = problem.times[every, taken_by]
    load = np.bincount(taken_by, weights=own, minlength=size).astype(np.float64)
    used = np.bincount(taken_by, weights=problem.tokens, minlength=size)
    left = problem.room - used.astype(np.int64)
    if bubble_times is None:
        return _State(load, left, load, np.zeros(taken_by.size))
    bubble = bubble_times[every, taken_by]
    first, second, holder = np.zeros(size), np.zeros(size), np.full(size, -1)
    order = np.lexsort((every, bubble))  # dearest last, so it is what stays
    holder[taken_by[order]] = order
    present = holder >= 0
    first[present] = bubble[holder[present]]
    rest = np.ones(taken_by.size, dtype=bool)
    rest[holder[present]] = False
    np.maximum.at(second, taken_by[rest], bubble[rest])
    without = np.where(rest, first[taken_by], second[taken_by])
    return _State(load, left, load + first, without)


class _Search:
    """The moves and swaps from one taker."""

    def __init__(
        self, problem: Problem, taken_by: Integers, state: _State, slowest: int, bubble_times: Floats | None
    ) -> None:
        self.problem, self.state, self.slowest, self.bubble_times = problem, state, slowest, bubble_times
        self.mine = np.flatnonzero(taken_by == slowest)
        self.others = np.flatnonzero(taken_by != slowest)
        self.holders = taken_by[self.others]
        self.lighter = state.load[slowest] - problem.times[self.mine, slowest]  # without each of mine

    def best_move(self) -> tuple[float, int, int]:
        """Return (finish of the slower of the two, sequence, taker)."""
        problem, state = self.problem, self.state
        there = state.load + problem.times[self.mine]
        here = self.lighter
        if self.bubble_times is not None:
            first = state.finish - state.load
            there = there + np.maximum(first, self.bubble_times[self.mine])
            here = here + state.without[self.mine]
        both = np.maximum(here[:, None], there)
        both[problem.tokens[self.mine][:, None] > state.left] = np.inf
        both[:, self.slowest] = np.inf
        k, j = divmod(int(both.argmin()), both.shape[1])
        return float(both[k, j]), int(self.mine[k]), j

    def best_swap(self) -> tuple[float, int, int]:
        """Return (finish of the slower of the two, sequence, the other sequence)."""
        if not self.others.size:
            return float("inf"), -1, -1
        problem, state, w = self.problem, self.state, self.slowest
        q, j = self.others, self.holders
        here = self.lighter[:, None] + problem.times[q, w]
        came = problem.times[self.mine[:, None], j]
        there = (state.load[j] - problem.times[q, j]) + came
        if self.bubble_times is not None:
            here += np.maximum(state.without[self.mine][:, None], self.bubble_times[q, w])
            there += np.maximum(state.without[q], self.bubble_times[self.mine[:, None], j])
        both = np.maximum(here, there)
        grown = problem.tokens[self.mine][:, None] - problem.tokens[q]
        both[(grown > state.left[j]) | (-grown > state.left[w])] = np.inf
        k, other = divmod(int(both.argmin()), both.shape[1])
        return float(both[k, other]), int(self.mine[k]), int(q[other])
