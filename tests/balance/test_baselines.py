"""What others do."""

import numpy as np
import pytest

from hardy.balance.baselines import (
    RULES,
    baseline,
    best_equal_groups,
    equal_groups,
    karmarkar_karp,
)
from hardy.balance.cost import DecoderSizes, LengthCostModel, SchemeCost, analytic_cost
from hardy.balance.plan import Scheme
from hardy.balance.planner import SequenceTooLongError, plan
from hardy.config import UserError

COST = analytic_cost(DecoderSizes(4, 64, 160, 4, 4, 16, 512), cap_tokens=100, degrees=(1, 2, 4, 8))


def drawn(count=60, *, most=100, seed=0):
    return np.random.default_rng(seed).integers(1, most + 1, count)


def made_by(name, lengths, **changes):
    options = {"world_size": 4, "cost": COST, "generator": np.random.default_rng(0)} | changes
    return baseline(name, lengths, **options)


@pytest.mark.parametrize("objective", ["lock_step", "free_running"])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_keeps_caps_and_gives_each_sequence_once(name, objective):
    lengths = drawn()
    made = made_by(name, lengths, objective=objective)
    taken = [i for slot in made.slots for batch in slot for i in batch.sequences]
    assert sorted(taken) == list(range(60))
    assert max(batch.tokens for slot in made.slots for batch in slot) <= 100
    assert made.gap >= 0
    assert all([len(batch.group.ranks) for batch in slot] == [1] * 4 for slot in made.slots)


@pytest.mark.parametrize("name", RULES)
def test_the_planner_is_no_worse_than_any_rule(name):
    for seed in range(5):
        lengths = drawn(seed=seed)
        ours = plan(lengths, world_size=4, cost=COST, mode="dispatch", objective="free_running")
        assert ours.cost <= made_by(name, lengths, objective="free_running").cost * 1.01


def test_rules_that_draw_differ_by_the_generator_alone():
    lengths = drawn()
    for name in ("random", "token_ffd_shuffled"):
        a, b, c = (made_by(name, lengths, generator=np.random.default_rng(s)).hash() for s in (1, 1, 2))
        assert a == b != c


def test_differencing_by_hand():
    parts = karmarkar_karp(np.array([8.0, 7.0, 6.0, 5.0, 4.0]), 2)
    assert sorted(np.bincount(parts, weights=[8, 7, 6, 5, 4]).tolist()) == [14, 16]
    three = karmarkar_karp(np.array([5.0, 5.0, 5.0, 5.0, 5.0, 5.0]), 3)
    assert np.bincount(three).tolist() == [2, 2, 2]
    assert karmarkar_karp(np.array([3.0, 2.0]), 1).tolist() == [0, 0]


def test_differencing_beats_longest_first_on_average():
    rng, wins = np.random.default_rng(0), 0
    for _ in range(60):
        times = np.sort(rng.random(12))[::-1]
        parts = np.bincount(karmarkar_karp(times, 3), weights=times).max()
        loads = np.zeros(3)
        for value in times:
            loads[loads.argmin()] += value
        wins += parts < loads.max() - 1e-12
    assert wins > 30


def test_equal_groups_have_nine_tenths_of_their_cap_and_each_a_share():
    lengths = drawn(30, most=90)
    for degree in (1, 2, 4):
        made = equal_groups(lengths, world_size=8, cost=COST, degree=degree)
        taken = sorted(i for slot in made.slots for batch in slot for i in batch.sequences)
        assert taken == list(range(30))
        assert all(batch.sequences for batch in made.slots[0])
        capacity = max(90 * degree, int(lengths.max()))
        assert max(batch.tokens for slot in made.slots for batch in slot) <= capacity


def test_equal_groups_split_the_fullest_pack_for_a_group_that_has_none_and_for_none_else():
    made = equal_groups([50, 39, 30, 30, 30], world_size=4, cost=COST, degree=1)
    assert sorted(batch.tokens for batch in made.slots[0]) == [30, 39, 50, 60]
    more = equal_groups([60, 60, 60, 20, 10, 50, 30], world_size=4, cost=COST, degree=1)
    assert [[batch.tokens for batch in slot] for slot in more.slots] == [[90, 90, 60, 50]]
    last = equal_groups([60, 60, 60, 60, 50, 40], world_size=4, cost=COST, degree=1)
    assert [[batch.tokens for batch in slot] for slot in last.slots] == [[60, 60, 60, 60], [90, 0, 0, 0]]


def test_equal_groups_without_enough_sequences():
    made = equal_groups([5, 4], world_size=4, cost=COST, degree=1)
    assert [len(batch.sequences) for batch in made.slots[0]] == [1, 1, 0, 0]


def test_the_best_degree_is_chosen_for_each_batch():
    short, long = drawn(40, most=50), np.array([700, 3, 2])
    best = best_equal_groups(short, world_size=8, cost=COST)
    every = [equal_groups(short, world_size=8, cost=COST, degree=d).cost for d in (1, 2, 4, 8)]
    assert best.cost == min(every)
    assert best_equal_groups(long, world_size=8, cost=COST).slots[0][0].group.scheme.context == 8
    with pytest.raises(UserError, match="no degree holds a sequence of 900"):
        best_equal_groups([900], world_size=8, cost=COST)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="there is no rule 'lpt'"):
        made_by("lpt", [3])
    with pytest.raises(SequenceTooLongError):
        made_by("random", [101])
    with pytest.raises(UserError, match="needs 8 ranks, the world has 4"):
        made_by("random", [3], scheme=Scheme(context=8))
    with pytest.raises(UserError, match="degree=2 does not divide the world of 3"):
        equal_groups([3], world_size=3, cost=COST, degree=2)


def test_packs_by_tokens_alone_do_not_see_squares():
    squares = LengthCostModel(schemes=(SchemeCost(scheme=Scheme(), a=1.0, b=0.0, c=0.0, cap_tokens=10),))
    made = made_by("token_ffd", [10, 5, 5, *[1] * 10], cost=squares, world_size=3)
    assert sorted(batch.cost for batch in made.slots[0]) == [10.0, 50.0, 100.0]
