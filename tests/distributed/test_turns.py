"""Who runs when, and that every way to fail ends the run."""

import threading
import time

import pytest

from hardy.distributed.turns import CollectiveMismatchError, Letter, MemberLostError, Outcome, Turns


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


# ---- Some meet while others go on --------------------------------------------------------------------------


def test_several_meetings_are_open_at_once_and_do_not_wait_for_each_other():
    turns = Turns(4)

    def body(member):
        pair = (0, 2) if member.rank % 2 == 0 else (3, 1)
        turns.advance(member, float(member.rank))
        heard = turns.meet(member, "pair", member.rank, share, pair)
        first_s = member.now_s
        return heard, first_s, turns.meet(member, "all", member.rank, share), member.now_s

    assert turns.run(body) == [
        ([0, 2], 2.0, [0, 1, 2, 3], 3.0),
        ([3, 1], 3.0, [0, 1, 2, 3], 3.0),
        ([0, 2], 2.0, [0, 1, 2, 3], 3.0),
        ([3, 1], 3.0, [0, 1, 2, 3], 3.0),
    ]


def test_a_meeting_of_some_ends_before_those_who_are_ahead_go_on():
    turns, order = Turns(3), []

    def body(member):
        if member.rank == 2:
            turns.advance(member, 5.0)
        else:
            turns.meet(member, "pair", None, lambda values: share(values, seconds=1.0), (0, 1))
        order.append((member.now_s, member.rank))

    turns.run(body)
    assert order == [(1.0, 0), (1.0, 1), (5.0, 2)]


def test_members_that_do_not_agree_on_who_meets_are_named():
    turns = Turns(3)

    def body(member):
        turns.meet(member, "sum", None, share, [(0, 1), (1, 2), (0, 1, 2)][member.rank])

    with pytest.raises(CollectiveMismatchError) as mismatch:
        turns.run(body)
    assert "  rank 0: sum among 0, 1\n  rank 1: sum among 1, 2\n  rank 2: sum" in str(mismatch.value)


def test_who_meets_is_among_those_who_meet():
    turns = Turns(3)
    with pytest.raises(ValueError, match=r"member 2 meets among \(0, 1\), but is none of them"):
        turns.run(lambda member: turns.meet(member, "sum", None, share, (0, 1)))


# ---- Births and deaths -------------------------------------------------------------------------------------


def test_a_member_begins_at_its_birth():
    turns, order = Turns(3, births={0: 2.5}), []

    def body(member):
        order.append((member.now_s, member.rank))
        turns.advance(member, 1.0)
        turns.meet(member, "all", None, share)
        return member.now_s, member.idle_s

    assert turns.run(body) == [(3.5, 2.5), (3.5, 2.5), (3.5, 2.5)]
    assert order == [(0.0, 1), (0.0, 2), (2.5, 0)]


@pytest.mark.parametrize(("dies_s", "steps"), [(3.0, 2), (3.5, 3), (0.0, 0), (2.999, 2)])
def test_what_would_end_at_a_death_or_later_does_not_happen(dies_s, steps):
    turns, done = Turns(2, deaths={1: dies_s}), []

    def body(member):
        for step in range(5):
            turns.advance(member, 1.0)
            if member.rank == 1:
                done.append(step)
        return "lived"

    assert turns.run(body) == ["lived", None]
    assert len(done) == steps and turns.members[1].died_s == turns.members[1].now_s == dies_s


def meets(turns, member, *, among=None, seconds=0.0):
    """Meet; return when it ended, and who was found dead."""
    try:
        turns.meet(member, "sum", None, lambda values: share(values, seconds=seconds), among)
    except MemberLostError as error:
        return member.now_s, error.ranks
    return member.now_s, ()


@pytest.mark.parametrize(
    ("dies_s", "heard"),
    [
        (2.0, [(3.0, (1,)), None, (4.5, (1,)), (3.0, (1,))]),  # before it comes
        (2.8, [(3.8, (1,)), None, (4.5, (1,)), (3.8, (1,))]),  # while it waits for the last
        (4.0, [(5.0, (1,)), None, (5.0, (1,)), (5.0, (1,))]),  # in the meeting
        (4.5, [(5.5, (1,)), None, (5.5, (1,)), (5.5, (1,))]),  # as it ends
        (4.6, [(4.5, ()), None, (4.5, ()), (4.5, ())]),  # after it
    ],
)
def test_those_who_wait_notice_after_the_death_and_their_own_arrival(dies_s, heard):
    turns = Turns(4, deaths={1: dies_s}, detect_s=1.0)

    def body(member):
        turns.advance(member, [0.5, 2.5, 3.5, 1.0][member.rank])
        answer = meets(turns, member, seconds=1.0)
        turns.advance(member, 10.0)
        return answer

    assert turns.run(body) == heard


def test_a_death_of_its_own_will_ends_a_member_wherever_it_is():
    turns, cleaned = Turns(3, detect_s=0.25), []

    def body(member):
        if member.rank == 0:
            try:
                turns.advance(member, 1.0)
                turns.die(member)
            except Exception:
                return "held back"
            finally:
                cleaned.append(member.now_s)
                turns.meet(member, "farewell", None, share)  # the dead do not meet
        return meets(turns, member)

    assert turns.run(body) == [None, (1.25, (0,)), (1.25, (0,))] and cleaned == [1.0]
    assert turns.members[0].died_s == 1.0


def test_two_deaths_are_both_told_and_the_living_meet_without_them():
    turns = Turns(4, deaths={0: 1.0, 3: 1.5}, detect_s=1.0)

    def body(member):
        turns.advance(member, 0.5 if member.rank in (1, 2) else 3.0)
        first = meets(turns, member)
        return first, meets(turns, member, among=(1, 2))

    assert turns.run(body) == [None, *[((2.0, (0, 3)), (2.0, ()))] * 2, None]


def test_the_dead_concern_only_those_who_meet_them():
    turns = Turns(4, deaths={3: 0.5})

    def body(member):
        among, answers = ((0, 1) if member.rank < 2 else (2, 3)), []
        for _ in range(3):
            turns.advance(member, 0.25)
            answers.append(meets(turns, member, among=among))
        return answers

    untouched = [(0.25, ()), (0.5, ()), (0.75, ())]
    assert turns.run(body) == [untouched, untouched, [(0.25, ()), (1.5, (3,)), (2.75, (3,))], None]


def test_time_adds_up_for_those_who_die_and_those_who_notice():
    turns = Turns(3, deaths={2: 3.0}, detect_s=0.5)
    worked = [0.0] * 3

    def body(member):
        for _ in range(4):
            before_s = member.now_s
            try:
                turns.advance(member, 1.0 + member.rank / 4)
            finally:
                worked[member.rank] += member.now_s - before_s
            meets(turns, member, seconds=0.125)

    turns.run(body)
    for member in turns.members:
        assert member.now_s == worked[member.rank] + member.idle_s + member.meeting_s


def test_waiting_for_one_who_ended_well_is_a_mismatch_and_not_a_loss():
    turns = Turns(3, deaths={2: 5.0})

    def body(member):
        if member.rank == 0:
            turns.meet(member, "pair", None, share, (0, 1))
        if member.rank == 2:
            turns.advance(member, 10.0)

    with pytest.raises(
        CollectiveMismatchError, match="rank 0: pair among 0, 1\n  rank 1: has ended\n  rank 2: has d"
    ):
        turns.run(body)


# ---- Letters -----------------------------------------------------------------------------------------------


def letter(value, member, *, link_s=0.0, latency_s=0.0):
    left_s = member.now_s + link_s
    return Letter(value=value, posted_s=member.now_s, left_s=left_s, arrives_s=left_s + latency_s)


def test_a_letter_is_taken_when_it_arrives_and_its_way_is_counted():
    turns = Turns(2)

    def body(member):
        if member.rank == 0:
            turns.advance(member, 1.0)
            turns.post(member, 1, "a", letter("first", member, link_s=2.0, latency_s=0.5))
            turns.post(member, 1, "a", letter("second", member, link_s=4.0))
            return member.now_s
        taken = [(turns.take(member, 0, "a", name="a"), member.now_s) for _ in range(2)]
        turns.advance(member, 5.0)
        return taken, member.idle_s, member.meeting_s

    assert turns.run(body) == [1.0, ([("first", 3.5), ("second", 5.0)], 1.0, 4.0)]


def test_a_letter_that_is_there_already_costs_no_time():
    turns = Turns(2)

    def body(member):
        if member.rank == 0:
            turns.post(member, 1, "a", letter("x", member, latency_s=1.0))
            return None
        turns.advance(member, 3.0)
        return turns.take(member, 0, "a", name="a"), member.now_s, member.idle_s, member.meeting_s

    assert turns.run(body) == [None, ("x", 3.0, 0.0, 0.0)]


def test_letters_are_told_apart_by_sender_and_key():
    turns = Turns(3)

    def body(member):
        if member.rank < 2:
            for key in ("a", "b"):
                turns.post(member, 2, key, letter((member.rank, key), member))
            return None
        return [turns.take(member, source, key, name="x") for key in ("b", "a") for source in (1, 0)]

    assert turns.run(body)[2] == [(1, "b"), (0, "b"), (1, "a"), (0, "a")]


def test_a_letter_that_nobody_posts_is_named():
    turns = Turns(3)

    def body(member):
        if member.rank == 1:
            turns.take(member, 0, "a", name="take of a from rank 0")
        elif member.rank == 2:
            turns.meet(member, "sum", None, share)

    text = (
        "waited for that nobody posts:\n  rank 0: has ended\n  rank 1: take of a from rank 0\n  rank 2: sum"
    )
    with pytest.raises(CollectiveMismatchError, match=text):
        turns.run(body)


@pytest.mark.parametrize("begins_s", [0.0, 4.0], ids=["waits already", "comes later"])
def test_who_waits_for_a_dead_one_notices_in_due_time_but_takes_what_had_left(begins_s):
    turns = Turns(2, deaths={0: 2.0}, detect_s=0.25)

    def body(member):
        if member.rank == 0:
            turns.post(member, 1, "a", letter("left", member, link_s=2.0, latency_s=5.0))
            turns.post(member, 1, "b", letter("cut off", member, link_s=2.5))
            turns.advance(member, 10.0)
        if begins_s:
            turns.advance(member, begins_s)
        with pytest.raises(MemberLostError, match="died: 0"):
            turns.take(member, 0, "b", name="b")
        noticed_s = member.now_s
        return noticed_s, member.idle_s, turns.take(member, 0, "a", name="a"), member.now_s

    waits_s = max(begins_s, 2.0) + 0.25
    idle_s = waits_s - begins_s
    assert turns.run(body)[1] == (waits_s, idle_s, "left", 7.0)


def test_one_who_dies_waiting_for_a_letter_dies_in_time():
    turns = Turns(2, deaths={1: 3.0})

    def body(member):
        if member.rank == 0:
            turns.advance(member, 2.0)
            turns.post(member, 1, "a", letter("late", member, latency_s=4.0))
            return "posted"
        turns.take(member, 0, "a", name="a")
        return "taken"

    assert turns.run(body) == ["posted", None]
    assert turns.members[1].died_s == turns.members[1].now_s == 3.0


def test_posting_to_a_dead_one_fails_once_there_was_time_to_notice():
    turns = Turns(2, deaths={1: 1.0}, detect_s=0.5)

    def body(member):
        turns.advance(member, 1.25)
        turns.post(member, 1, "a", letter("lost", member))
        turns.advance(member, 0.25)
        with pytest.raises(MemberLostError, match="died: 1"):
            turns.post(member, 1, "a", letter("refused", member))
        return member.now_s

    assert turns.run(body) == [1.5, None]


def test_one_may_wait_for_a_letter_while_others_meet():
    turns = Turns(3)

    def body(member):
        if member.rank == 2:
            return turns.take(member, 0, "a", name="a"), member.now_s
        turns.advance(member, 1.0 + member.rank)
        turns.meet(member, "pair", None, share, (0, 1))
        if member.rank == 0:
            turns.post(member, 2, "a", letter("after", member, latency_s=0.5))
        return None

    assert turns.run(body)[2] == ("after", 2.5)
