"""The core of the planners: longest first, then moves and swaps."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.balance.assign import Problem, equal_takers, finish_times, improve, longest_first
from hardy.balance.oracle import best_assignment


def spans(problem, taken_by):
    """The slowest taker's time, from its definition."""
    done = []
    for j in range(problem.num_takers):
        own = [float(problem.times[i, j]) for i in np.flatnonzero(taken_by == j)]
        done.append(sum(own) + int(problem.bubbles[j]) * max(own, default=0.0))
    return done


def brute(problem):
    """The least time of all assignments."""
    n, m = problem.times.shape
    best = float("inf")
    for each in itertools.product(range(m), repeat=n):
        taken_by = np.array(each)
        used = np.bincount(taken_by, weights=problem.tokens, minlength=m)
        if (used <= problem.room).all():
            best = min(best, max(spans(problem, taken_by)))
    return best


@st.composite
def problems(draw, most=6):
    n, m = draw(st.integers(1, most)), draw(st.integers(1, 3))
    tokens = np.array(sorted(draw(st.lists(st.integers(1, 60), min_size=n, max_size=n)), reverse=True))
    speeds = np.array(draw(st.lists(st.sampled_from([1.0, 1.5, 2.0]), min_size=m, max_size=m)))
    caps = np.array([60, *draw(st.lists(st.integers(10, 60), min_size=m - 1, max_size=m - 1))])
    times = (tokens[:, None] ** 2 + 10.0 * tokens[:, None]) / speeds
    times = np.where(tokens[:, None] <= caps, times, np.inf)
    bubbles = np.array(draw(st.lists(st.integers(0, 2), min_size=m, max_size=m)))
    room = np.array(draw(st.lists(st.integers(60, 140), min_size=m, max_size=m)))
    return Problem(times=times, tokens=tokens, room=room, bubbles=bubbles)


@settings(max_examples=150)
@given(problems())
def test_caps_are_kept_and_changes_only_help(problem):
    first = longest_first(problem)
    if first is None:
        return
    better = improve(problem, first)
    for taken_by in (first, better):
        assert np.isfinite(problem.times[np.arange(taken_by.size), taken_by]).all()
        assert (
            np.bincount(taken_by, weights=problem.tokens, minlength=problem.num_takers) <= problem.room
        ).all()
        assert finish_times(problem, taken_by) == pytest.approx(spans(problem, taken_by))
    assert finish_times(problem, better).max() <= finish_times(problem, first).max() * (1 + 1e-12)


@settings(max_examples=60)
@given(problems())
def test_never_below_the_best_there_is(problem):
    first = longest_first(problem)
    if first is None:
        return
    assert max(spans(problem, improve(problem, first))) >= brute(problem) * (1 - 1e-12)


def test_a_move_and_a_swap_are_found():
    tokens = np.ones(4, np.int64)
    problem = equal_takers(np.array([4.0, 3.0, 2.0, 1.0]), tokens, num_takers=2, room=9)
    moved = improve(problem, np.array([0, 0, 0, 0]))
    assert max(spans(problem, moved)) == 5.0
    swapped = improve(problem, np.array([0, 0, 1, 1]), rounds=1)
    assert max(spans(problem, swapped)) == 5.0


def test_a_swap_stops_at_the_room():
    times = np.array([4.0, 3.0, 2.0, 1.0])
    full = equal_takers(times, np.array([4, 3, 2, 1]), num_takers=2, room=7)
    # Any move would overflow; only swaps that fit are left.
    better = improve(full, np.array([0, 0, 1, 1]))
    assert max(spans(full, better)) == 5.0
    tight = Problem(times=full.times, tokens=full.tokens, room=np.array([7, 3]), bubbles=full.bubbles)
    assert improve(tight, np.array([0, 0, 1, 1])).tolist() == [0, 0, 1, 1]


def test_the_bubble_counts_the_dearest_again():
    one = equal_takers(np.array([5.0, 3.0]), np.ones(2, np.int64), num_takers=1, room=2, bubble=2)
    assert finish_times(one, longest_first(one)).tolist() == [18.0]


def test_a_move_counts_the_bubble_that_stays():
    problem = equal_takers(np.array([6.0, 5.0, 4.0]), np.ones(3, np.int64), num_takers=2, room=3, bubble=1)
    assert max(spans(problem, improve(problem, np.array([0, 0, 0]), rounds=1))) == 14.0


def test_a_swap_needs_room_on_both_sides():
    # Dear and short on taker 0, cheap and long on taker 1: exchanging them overflows taker 0.
    times, tokens = np.array([[9.0, 3.0], [1.0, 1.0]]), np.array([2, 5])
    none = np.zeros(2, np.int64)
    tight = Problem(times=times, tokens=tokens, room=np.array([2, 5]), bubbles=none)
    assert improve(tight, np.array([0, 1])).tolist() == [0, 1]
    wide = Problem(times=times, tokens=tokens, room=np.array([5, 5]), bubbles=none)
    assert improve(wide, np.array([0, 1])).tolist() == [1, 0]


def test_longest_first_knows_no_place():
    problem = equal_takers(np.array([2.0, 2.0]), np.array([2, 2]), num_takers=1, room=3)
    assert longest_first(problem) is None


def test_four_thirds_of_the_best_on_equal_takers():
    rng = np.random.default_rng(3)
    for _ in range(40):
        times = np.sort(rng.integers(1, 50, 7))[::-1].astype(float)
        problem = equal_takers(times, np.ones(7, np.int64), num_takers=3, room=7)
        assert max(spans(problem, longest_first(problem))) <= 4 / 3 * brute(problem)


def test_the_oracle_is_brute_force():
    pytest.importorskip("scipy", reason="the exact oracle needs scipy")
    rng = np.random.default_rng(0)
    for bubble in (0, 1):
        for _ in range(6):
            tokens = np.sort(rng.integers(1, 40, 6))[::-1]
            times = tokens[:, None] * np.array([1.0, 0.7, 1.3]) * (1 + tokens[:, None] / 30)
            problem = Problem(
                times=times, tokens=tokens, room=np.array([90, 60, 200]), bubbles=np.full(3, bubble)
            )
            assert max(spans(problem, best_assignment(problem))) == pytest.approx(brute(problem))
