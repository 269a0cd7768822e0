"""Clocks: wall and virtual."""

import math

import pytest

from hardy.clock import VirtualClock, WallClock


def test_the_wall_clock_sleeps_as_long_as_told():
    clock = WallClock()
    start_s = clock.now()
    clock.sleep(0.01)
    assert 0.01 <= clock.now() - start_s < 5


def test_the_virtual_clock_moves_only_when_told():
    clock = VirtualClock(start_s=5.0)
    assert (clock.now(), clock.now()) == (5.0, 5.0)
    clock.sleep(600.0)
    assert clock.now() == 605.0
    clock.sleep(0.0)
    assert clock.now() == 605.0


def test_the_virtual_clock_advances_but_never_goes_back():
    clock = VirtualClock()
    clock.advance_to(3.0)
    clock.advance_to(1.0)
    assert clock.now() == 3.0


@pytest.mark.parametrize("seconds", [-1.0, math.nan])
def test_time_only_moves_forward(seconds):
    clock = VirtualClock()
    with pytest.raises(ValueError, match=f"time only moves forward, got a step of {seconds} s"):
        clock.sleep(seconds)
    assert clock.now() == 0.0
