"""Who runs when, and that every way to fail ends the run."""

import threading
import time

import pytest

from hardy.distributed.turns import CollectiveMismatchError, Outcome, Turns


def share(values, *, seconds=0.0):
    """A meeting in which each learns everyone's value."""
    return Outcome(answers=[list(values) for _ in values], seconds=seconds)


def test_the_one_furthest_behind_goes_first_then_the_lowest_rank():
    turns, order = Turns(8), []

    def body(member):
        for _ in range(6):
            order.append((member.now_s, member.rank))
            turns.advance(member, [7.0, 1.0, 1.0, 5.0, 2.0, 0.0, 3.0, 4.0][member.rank])

    turns.run(body)
    assert order == sorted(order) and len(order) == 48


def test_only_one_runs_at_a_time():
    turns, inside, most = Turns(4), [], []

    def body(member):
        for _ in range(5):
            inside.append(member.rank)
            time.sleep(0.001)  # invites the interpreter to switch threads
            most.append(len(inside))
            inside.remove(member.rank)
            turns.advance(member, 1.0)

    turns.run(body)
    assert set(most) == {1}


def test_a_meeting_ends_at_the_latest_arrival_plus_its_length():
    turns = Turns(3)

    def body(member):
        turns.advance(member, float(member.rank))
        heard = turns.meet(member, "talk", member.rank, lambda values: share(values, seconds=0.5))
        return heard, member.now_s, member.idle_s, member.meeting_s

    assert turns.run(body) == [([0, 1, 2], 2.5, 2.0 - rank, 0.5) for rank in range(3)]


def test_different_calls_are_told_to_everyone():
    turns, told = Turns(4), []

    def body(member):
        turns.meet(member, "hello", None, share)
        try:
            turns.meet(member, "left" if member.rank % 2 else "right", None, share)
        except CollectiveMismatchError as error:
            told.append(str(error))
            raise

    with pytest.raises(CollectiveMismatchError, match="collective number 2") as mismatch:
        turns.run(body)
    assert "  rank 0, 2: right\n  rank 1, 3: left" in str(mismatch.value)
    assert told == [str(mismatch.value)] * 4


def test_a_member_that_ends_early_leaves_nobody_waiting():
    turns = Turns(3)

    def body(member):
        if member.rank != 1:
            turns.meet(member, "sum", None, share)

    with pytest.raises(CollectiveMismatchError, match="rank 0, 2: sum\n  rank 1: has ended"):
        turns.run(body)


def test_a_failing_member_ends_the_run_with_its_own_error():
    turns, cleaned = Turns(3), []

    def body(member):
        try:
            if member.rank == 2:
                raise KeyError("mine")
            turns.meet(member, "wait", None, share)
        except Exception as error:  # must not hold the members that are stopped
            if member.rank != 2:
                return "went on"
            raise error
        finally:
            cleaned.append(member.rank)

    before = threading.active_count()
    with pytest.raises(KeyError, match="mine") as failure:
        turns.run(body)
    assert failure.value.__notes__ == ["raised in simulated worker 2 of 3"]
    assert sorted(cleaned) == [0, 1, 2]
    assert threading.active_count() == before


def test_a_member_that_meets_while_it_is_stopped_does_not_hang():
    turns = Turns(2)

    def body(member):
        if member.rank == 1:
            raise KeyError("mine")
        try:
            turns.meet(member, "wait", None, share)
        finally:
            turns.meet(member, "farewell", None, share)

    with pytest.raises(KeyError):
        turns.run(body)


def test_a_fault_in_the_meeting_itself_is_raised():
    def broken(_values):
        raise ZeroDivisionError("in the meeting")

    turns = Turns(2)
    with pytest.raises(ZeroDivisionError, match="in the meeting"):
        turns.run(lambda member: turns.meet(member, "divide", 1, broken))


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_time_runs_forward(seconds):
    turns = Turns(1)
    with pytest.raises(ValueError, match="time only moves forward"):
        turns.run(lambda member: turns.advance(member, seconds))
