"""Rounds by steps, fragments in turn, and rounds by time that survive large clocks and a resume."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardy.config import ConfigError
from hardy.distributed.local.triggers import EverySeconds, EverySteps

UNIX_S = 1.8e9


@given(steps=st.integers(1, 200), upto=st.integers(0, 1000))
def test_by_steps_a_round_is_due_once_in_tau(steps, upto):
    trigger = EverySteps(steps)
    due = [step for step in range(upto + 1) if trigger.due(step, 0.0)]
    assert due == list(range(steps, upto + 1, steps))
    assert trigger.enough(1)


@given(fragments=st.integers(1, 12), length=st.integers(1, 12), step=st.integers(0, 500))
def test_each_fragment_is_due_at_its_offset(fragments, length, step):
    tau = fragments * length
    trigger = EverySteps(tau, fragments=fragments)
    due = [p for p in range(fragments) if step > 0 and (step - p * tau // fragments) % tau == 0]
    assert due == ([] if trigger.fragment_due(step) is None else [trigger.fragment_due(step)])
    assert trigger.due(step, 0.0) == bool(due)


def test_all_fragments_have_their_turn_in_tau_steps():
    trigger = EverySteps(12, fragments=4)
    for start in range(1, 30):
        turns = [trigger.fragment_due(step) for step in range(start, start + 12)]
        assert sorted(turn for turn in turns if turn is not None) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("steps", "fragments", "text"),
    [
        (128, 3, "steps=128 must be a multiple of fragments=3.*; 129 is the next"),
        (2, 3, "; 3 is the next"),
        (0, 1, "steps=0 inner steps in fragments=1: both must be at least 1"),
        (4, 0, "fragments=0"),
    ],
)
def test_steps_and_fragments_that_do_not_fit_are_refused(steps, fragments, text):
    with pytest.raises(ConfigError, match=text):
        EverySteps(steps, fragments=fragments)


def test_the_first_question_only_starts_the_clock():
    trigger = EverySeconds(10.0, min_steps=1)
    assert [trigger.due(0, now) for now in (500.0, 509.9, 510.0, 511.0)] == [False, False, True, True]
    trigger.reset(511.0)
    assert [trigger.due(9, now) for now in (520.9, 521.0)] == [False, True]


@given(seconds=st.floats(0.01, 1e5), start=st.floats(0, UNIX_S))
def test_a_huge_clock_is_exact_to_a_microsecond(seconds, start):
    trigger = EverySeconds(seconds, min_steps=1)
    trigger.reset(start)
    assert not trigger.due(1, start + seconds - 1e-6)
    assert trigger.due(1, start + seconds + 1e-6)


@given(seconds=st.floats(1.0, 1e4), share=st.floats(0.0, 0.99), restart=st.floats(0, UNIX_S))
def test_a_resume_goes_on_with_the_remainder_on_another_clock(seconds, share, restart):
    before = EverySeconds(seconds, min_steps=1)
    before.due(0, UNIX_S)
    assert not before.due(5, UNIX_S + share * seconds)
    after = EverySeconds(seconds, min_steps=1)
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == before.state_dict()
    left = (1 - share) * seconds
    assert not after.due(6, restart)
    assert not after.due(7, restart + left - 2e-6)
    assert after.due(8, restart + left + 2e-6)
    after.reset(restart)
    assert after.state_dict() == {"elapsed_s": 0.0}


def test_a_state_from_before_the_first_question_starts_the_clock_as_anew():
    trigger = EverySeconds(3.0, min_steps=1)
    trigger.load_state_dict(EverySeconds(3.0, min_steps=1).state_dict())
    assert [trigger.due(0, now) for now in (7.0, 9.9, 10.0)] == [False, False, True]


def test_a_round_with_too_few_steps_is_left_out():
    trigger = EverySeconds(1.0, min_steps=100)
    assert [trigger.enough(total) for total in (0, 99, 100)] == [False, False, True]


@pytest.mark.parametrize(
    ("seconds", "min_steps", "text"),
    [
        (0.0, 1, "seconds=0.0: the time must be above 0"),
        (float("inf"), 1, "seconds=inf: .* finite"),
        (float("nan"), 1, "seconds=nan"),
        (1.0, 0, "min_steps=0 must be at least 1"),
    ],
)
def test_impossible_times_are_refused(seconds, min_steps, text):
    with pytest.raises(ConfigError, match=text):
        EverySeconds(seconds, min_steps=min_steps)
