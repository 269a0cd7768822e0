"""The planner of local steps: the least number that meets an overhead, exactly; its text; its refusals."""

import math
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardy.config import ConfigError
from hardy.distributed.local.steps import WARNING, plan_local_steps


def overhead_of(local_steps, *, step_s, exchange_s):
    return Fraction(exchange_s) / (local_steps * Fraction(step_s) + Fraction(exchange_s))


hundredths = st.integers(1, 10**6).map(lambda n: f"{n // 100}.{n % 100:02d}")


@given(step_s=hundredths, exchange_s=hundredths, percent=st.integers(1, 99))
def test_it_is_the_least_number_that_meets_the_overhead(step_s, exchange_s, percent):
    plan = plan_local_steps(step_s=float(step_s), exchange_s=float(exchange_s), overhead=percent / 100)
    L, allowed = plan.local_steps, Fraction(percent, 100)
    assert L >= 1
    assert overhead_of(L, step_s=step_s, exchange_s=exchange_s) <= allowed
    assert L == 1 or overhead_of(L - 1, step_s=step_s, exchange_s=exchange_s) > allowed
    steps = [row.local_steps for row in plan.rows]
    assert steps == sorted(set(steps)) and {1, L, 2 * L, 4 * L} <= set(steps)
    for row in plan.rows:
        assert row.overhead == pytest.approx(
            float(overhead_of(row.local_steps, step_s=step_s, exchange_s=exchange_s)), rel=1e-15
        )
        assert row.bytes_per_step == 1 / row.local_steps


def test_what_rounding_of_binary_fractions_would_get_wrong():
    assert plan_local_steps(step_s=0.5, exchange_s=2.0).local_steps == 76
    assert math.ceil(0.8 * (1 - 0.25) / (0.25 * 0.1)) == 25, "in floats it is one too many"
    assert plan_local_steps(step_s=0.1, exchange_s=0.8, overhead=0.25).local_steps == 24


def test_a_cheap_exchange_may_follow_every_step():
    plan = plan_local_steps(step_s=10.0, exchange_s=0.1)
    assert plan.local_steps == 1
    assert [row.local_steps for row in plan.rows] == [1, 2, 4]


def test_the_text_marks_the_recommendation_and_warns():
    lines = plan_local_steps(step_s=0.5, exchange_s=2, overhead=0.05).text().splitlines()
    assert (
        lines[0] == "76 local steps keep exchanges of 2 s at or below 0.05 of the time, with steps of 0.5 s"
    )
    table = lines[2:9]
    assert table == [
        "local steps  overhead  bytes of L=1",
        "          1    80.00%             1",
        "         19    17.39%        0.0526",
        "         38     9.52%        0.0263",
        "         76     5.00%        0.0132  <- the least that meets it",
        "        152     2.56%       0.00658",
        "        304     1.30%       0.00329",
    ]
    assert "\n".join(lines[10:]) == WARNING
    assert "heuristic" in WARNING and "watch the drift" in WARNING
    assert max(map(len, WARNING.splitlines())) <= 120


@pytest.mark.parametrize("overhead", [0, 1, -0.1, 5, math.nan])
def test_an_overhead_that_is_no_share_is_refused(overhead):
    with pytest.raises(
        ConfigError, match=rf"^overhead={overhead} must lie above 0 and below 1: it is the share"
    ):
        plan_local_steps(step_s=1, exchange_s=1, overhead=overhead)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_seconds_that_are_none_are_refused(value):
    with pytest.raises(
        ConfigError, match=rf"^step_s={value} must be above 0 and finite; measure the seconds of one op"
    ):
        plan_local_steps(step_s=value, exchange_s=1)
    with pytest.raises(
        ConfigError, match=rf"^exchange_s={value} must be above 0 and finite; measure the seconds of one ex"
    ):
        plan_local_steps(step_s=1, exchange_s=value)


def test_planning_needs_no_torch():
    code = "import sys, hardy.distributed.local.steps; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
