"""Who is elected, by arrivals whose times the tests make up."""

import math
import random
from statistics import mean

import pytest

from hardy.distributed.robust.election import (
    PACE_STEPS,
    Announcement,
    Election,
    Pace,
    Rules,
    ShortfallError,
    Starvation,
    rules_of,
)
from hardy.distributed.robust.fastest_config import FastestConfig


def elect(rules, *, step=5, num=6, **settings):
    settings = {"candidates": dict.fromkeys(range(num), 1), "num_live": num, "pace": Pace(), **settings}
    return Election(rules, step=step, opened_s=10.0, **settings)


def ready(rank, *, step=5, made_at=None, generation=1):
    made_at = step if made_at is None else made_at
    return Announcement(rank=rank, generation=generation, step=step, made_at=made_at)


def test_the_first_k_distinct_ranks_are_elected():
    election = elect(Rules(k=3))
    for rank, at_s in ((4, 10.1), (4, 10.2), (1, 10.3)):
        election.receive(ready(rank), at_s)
        assert election.decide(at_s) is None
    election.receive(ready(0), 10.4)
    assert election.decide(10.4) == (0, 1, 4)
    assert election.receive(ready(2), 10.5) == "late"
    assert election.decide(10.6) == (0, 1, 4)
    assert list(election.arrived) == [4, 1, 0, 2]
    assert election.offsets_s == pytest.approx({4: 0.1, 1: 0.3, 0: 0.4, 2: 0.5})


@pytest.mark.parametrize(
    ("announcement", "answer"),
    [
        (ready(0), "taken"),
        (ready(0, step=4), "old"),
        (ready(0, step=6), "early"),
        (ready(0, generation=2), "generation"),
        (ready(9), "stranger"),
        (ready(0, made_at=4), "stale"),
        (ready(0, made_at=6), "stale"),
    ],
)
def test_what_becomes_of_an_announcement(announcement, answer):
    election = elect(Rules(k=1))
    assert election.receive(announcement, 10.0) == answer
    assert (election.decide(10.0) == (0,)) == (answer == "taken")


def test_late_gradients_enter_dampened_where_the_rules_take_them():
    election = elect(Rules(k=1, takes_late=True))
    assert election.receive(ready(3, made_at=2), 10.0) == "taken"
    assert election.arrived[3].staleness == 3 and election.arrived[3].weight == 0.25
    assert ready(0).weight == 1.0
    assert election.receive(ready(4, made_at=6), 10.0) == "stale"


def test_the_expected_time_of_a_step_is_a_difference_of_harmonic_numbers():
    def harmonic(number):
        return sum(1 / i for i in range(1, number + 1))

    chance = random.Random(3)
    for k, expected_s in ((14, 1.148), (20, 3.598)):
        assert harmonic(20) - harmonic(20 - k) == pytest.approx(expected_s, abs=5e-4)
        took_s = []
        for _ in range(4000):
            election = elect(Rules(k=k), num=20)
            times_s = sorted((chance.expovariate(1.0), rank) for rank in range(20))
            for at_s, rank in times_s:
                election.receive(ready(rank), 10.0 + at_s)
                if election.decide(10.0 + at_s) is not None:
                    took_s.append(at_s)
                    break
            assert len(election.elected) == k
        assert mean(took_s) == pytest.approx(expected_s, rel=0.02)


def pace_of(*offsets_s):
    pace = Pace()
    for step, offset_s in enumerate(offsets_s):
        pace.note(step, offset_s)
    return pace


def test_the_usual_time_is_the_median_and_deviations():
    assert pace_of().usual_s(4.0) == 0.0
    assert pace_of(1.0, 2.0, 3.0, 4.0, 100.0).usual_s(4.0) == 3.0 + 4.0 * 1.0
    assert pace_of(1.0, 2.0, 3.0, 4.0, 100.0).usual_s(0.0) == 3.0
    pace = pace_of(*[1.0] * 30, *[5.0] * 29)
    assert pace.usual_s(0.0) == 1.0
    pace.forget(59)
    assert len(pace._offsets) == PACE_STEPS - 1 and pace.usual_s(0.0) == 5.0


def test_a_deadline_takes_those_who_are_only_a_little_late():
    election = elect(Rules(k=2, deadline_factor=4.0), pace=pace_of(1.0, 2.0, 3.0))  # 2 + 4 * 1 = 6
    for rank, offset_s in ((0, 1.0), (1, 2.0), (2, 5.5)):
        election.receive(ready(rank), 10.0 + offset_s)
        assert election.decide(10.0 + offset_s) is None
        assert election.due_s(10.0 + offset_s) == 16.0
    election.receive(ready(3), 16.1)
    assert election.decide(16.1) == (0, 1, 2)
    assert election.due_s(16.1) == math.inf


def test_a_deadline_is_over_when_all_are_there_or_the_kth_comes_after_it():
    quick = elect(Rules(k=2, deadline_factor=4.0), pace=pace_of(9.0), num=3)
    for rank in range(3):
        assert quick.decide(10.1) is None
        quick.receive(ready(rank), 10.1)
    assert quick.decide(10.1) == (0, 1, 2)
    late = elect(Rules(k=2, deadline_factor=0.0), pace=pace_of(0.5, 0.5, 0.5, 0.5))
    late.receive(ready(1), 10.1)
    late.receive(ready(2), 13.0)
    assert late.decide(13.0) == (1, 2)


@pytest.mark.parametrize(
    ("on_shortfall", "came", "num_live", "elected"),
    [
        ("wait", 5, 6, None),
        ("shrink", 5, 6, (0, 1, 2, 3, 4)),
        ("shrink", 2, 6, None),  # below 2f + 1
        ("shrink", 3, 6, None),  # half is not over half
        ("shrink", 3, 5, (0, 1, 2)),
    ],
)
def test_what_happens_when_too_few_come(on_shortfall, came, num_live, elected):
    rules = Rules(k=6, least=3, patience_s=2.0, on_shortfall=on_shortfall)
    election = elect(rules, num_live=num_live)
    for rank in range(came):
        election.receive(ready(rank), 10.5)
    assert election.decide(11.9) is None and election.due_s(11.9) == 12.0
    assert election.decide(12.0) == elected
    if elected is None:
        election.receive(ready(5), 12.5)
        for rank in range(came, 5):
            election.receive(ready(rank), 12.5)
        assert election.decide(12.5) == tuple(range(6))


def test_a_shortfall_may_be_an_error():
    election = elect(Rules(k=6, patience_s=2.0, on_shortfall="error"))
    election.receive(ready(1), 10.5)
    with pytest.raises(
        ShortfallError, match=r"step 5: 1 of k=6 came within 2 s \(strategy.fastest.patience_s\)"
    ):
        election.decide(12.0)


def test_a_second_election_keeps_the_arrivals_but_not_the_lost():
    election = elect(Rules(k=3))
    for rank in range(4):
        election.receive(ready(rank), 10.0 + rank)
    assert election.decide(13.0) == (0, 1, 2)
    election.lose(1)
    election.reopen()
    assert election.decide(14.0) == (0, 2, 3)
    assert election.receive(ready(1), 15.0) == "stranger"
    election.admit(1, 2)
    assert election.receive(ready(1, generation=2), 15.0) == "late"


def test_those_who_begin_are_counted_from_the_beginning():
    election = elect(Rules(k=2, patience_s=5.0))
    election.receive(ready(0), 12.0)
    election.begin(20.0)
    election.receive(ready(1), 21.0)
    assert election.offsets_s == {0: 0.0, 1: 1.0}
    assert election.due_s(20.0) == 25.0


def test_one_that_starves_is_waited_for_within_the_patience():
    rules = Rules(k=2, patience_s=5.0)
    election = elect(rules, waits_for=[4])
    for rank in range(3):
        election.receive(ready(rank), 10.5)
    assert election.decide(14.9) is None
    election.receive(ready(4), 14.9)
    assert election.decide(14.9) == (0, 1, 4)
    in_vain = elect(rules, waits_for=[4])
    for rank in range(3):
        in_vain.receive(ready(rank), 10.5)
    assert in_vain.decide(15.0) == (0, 1)
    lost = elect(rules, waits_for=[4])
    lost.lose(4)
    lost.receive(ready(0), 10.5)
    lost.receive(ready(1), 10.5)
    assert lost.decide(10.5) == (0, 1)


def test_a_replay_elects_exactly_the_logged():
    election = elect(Rules(k=2), wanted=[1, 5])
    assert not election.lacks()
    for rank in (0, 2, 5):
        election.receive(ready(rank), 10.5)
        assert election.decide(10.5) is None
    election.release(1)
    assert election.lacks()
    election.admit(1, 1)
    election.receive(ready(1), 11.0)
    assert election.decide(11.0) == (1, 5)
    lost = elect(Rules(k=2), wanted=[1, 5])
    lost.lose(1)
    lost.receive(ready(5), 11.0)
    assert lost.decide(11.0) == (5,)


def test_an_election_lacks_replicas_below_k():
    assert elect(Rules(k=7)).lacks() and not elect(Rules(k=6)).lacks()


def test_starvation_is_reported_once_and_counted_anew():
    starvation = Starvation(3)
    told = [starvation.count([0, 1], [0]) for _ in range(5)]
    assert told == [[], [], [1], [], []] and starvation.starved == (1,)
    starvation.waited(1)
    assert starvation.starved == ()
    starvation.count([0, 1], [0])
    starvation.count([0, 1], [0, 1])
    assert [starvation.count([0, 1], [0]) for _ in range(3)] == [[], [], [1]]


def test_rules_follow_the_settings_and_refuse_a_small_k():
    config = FastestConfig(k=7, deadline="mad", deadline_factor=2.0, late="dampen", timeout_s=9.0)
    rules = rules_of(config, num_faulty=2)
    assert (rules.k, rules.least, rules.deadline_factor, rules.takes_late) == (7, 5, 2.0, True)
    assert rules.patience_s == math.inf and rules.finish_s == 9.0
    assert rules_of(FastestConfig(k=3), num_faulty=0).deadline_factor is None
    with pytest.raises(ValueError, match=r"k=4 must be at least 2f \+ 1 = 5"):
        Rules(k=4, least=5)
