"""The choice of a strategy for a batch."""

import numpy as np
import pytest

from hardy.balance.cost import LengthCostModel, SchemeCost
from hardy.balance.cost_presets import cost_preset, published_strategies
from hardy.balance.lengths import draw_lengths, fit_lengths
from hardy.balance.plan import Scheme
from hardy.balance.planner import SequenceTooLongError
from hardy.balance.strategies import plan_strategies, strategy_text
from hardy.config import UserError
from hardy.reference import hydraulis as twin

COST = cost_preset("hydraulis-32b")
PUBLISHED = published_strategies()
BIG, MIDDLE, SMALL = Scheme(tensor=16), Scheme(tensor=8), Scheme(tensor=4)


def lengths(count, *, seed=0, most=32768):
    drawn = draw_lengths("wikipedia", count, np.random.default_rng(seed))
    return fit_lengths(drawn, most_tokens=most, overlong="truncate").lengths


def choose(given, strategies=PUBLISHED, **changes):
    return plan_strategies(given, world_size=64, cost=COST, strategies=strategies, **changes)


def test_the_best_of_all_is_taken_and_another_candidate_never_costs():
    for seed in range(4):
        given = lengths(200, seed=seed)
        single = [choose(given, [strategy]).plan.cost for strategy in PUBLISHED if holds(strategy, given)]
        several = choose(given)
        assert several.plan.cost == pytest.approx(min(single))
        fewer = [choose(given, PUBLISHED[:k]).plan.cost for k in (1, 3, 5)]
        assert fewer == sorted(fewer, reverse=True) and several.plan.cost <= fewer[-1]
        assert several.plan.gap >= 0 and several.plan.lower_bound <= min(single)


def holds(strategy, given):
    return max(COST.of(scheme).cap_tokens for scheme in strategy) >= given.max()


def test_every_sequence_once_on_replicas_that_hold_it():
    given = lengths(200)
    choice = choose(given)
    taken = [i for slot in choice.plan.slots for batch in slot for i in batch.sequences]
    assert sorted(taken) == list(range(200))
    for slot in choice.plan.slots:
        assert [batch.group.scheme for batch in slot] == list(PUBLISHED[choice.index])
        for batch in slot:
            assert batch.tokens <= COST.of(batch.group.scheme).cap_tokens


def test_the_cost_of_changing_is_in_the_objective():
    given = lengths(200)
    free = choose(given)
    other = 0 if free.index else 1
    stays = choose(given, previous=other, switch_cost=1e9)
    assert stays.index == other
    moves = choose(given, previous=other, switch_cost=1.0)
    assert moves.index == free.index and moves.plan.cost == pytest.approx(free.plan.cost + 1.0)
    assert moves.plan.lower_bound <= moves.plan.cost


def test_a_tie_keeps_the_strategy_of_the_step_before():
    twice = [PUBLISHED[1], PUBLISHED[1]]
    assert choose(lengths(50), twice, previous=1).index == 1
    assert choose(lengths(50), twice, previous=0).index == 0
    assert choose(lengths(50), twice).index == 0


def test_strategies_too_small_for_the_longest_are_left_out():
    given = np.array([32768, 100])
    assert choose(given).index < 4
    with pytest.raises(SequenceTooLongError, match="more than 7,808"):
        choose(given, [(SMALL,) * 16])


def small_cost():
    schemes = (
        SchemeCost(scheme=Scheme(), a=1.0, b=5.0, c=30.0, cap_tokens=40),
        SchemeCost(scheme=Scheme(tensor=2), a=0.6, b=2.6, c=25.0, cap_tokens=90),
        SchemeCost(scheme=Scheme(pipeline=2), a=0.5, b=2.5, c=15.0, cap_tokens=60),
    )
    return LengthCostModel(schemes=schemes)


def test_near_the_best_of_all_assignments():
    cost = small_cost()
    strategies = [(Scheme(tensor=2), Scheme()), (Scheme(pipeline=2), Scheme())]
    rng, over = np.random.default_rng(0), []
    for _ in range(15):
        given = rng.integers(1, 60, 4).tolist()
        plain = [
            [
                twin.Replica(k.a, k.b, k.c, k.cap_tokens, k.scheme.ranks, k.scheme.pipeline)
                for k in map(cost.of, strategy)
            ]
            for strategy in strategies
        ]
        best = twin.best_strategy(plain, given, bridge=20.0, before=1)
        found = plan_strategies(
            given, world_size=3, cost=cost, strategies=strategies, previous=1, switch_cost=20.0
        )
        assert found.plan.lower_bound <= best * (1 + 1e-12)
        over.append(found.plan.cost / best - 1)
    assert min(over) >= -1e-12 and np.mean(over) < 0.03


@pytest.mark.parametrize(
    ("strategies", "text"),
    [([], "no strategies"), ([(BIG,) * 5], "5x tp16.* 80 ranks, not 1 to 64"), ([()], "0 ranks")],
)
def test_what_cannot_be_is_refused(strategies, text):
    with pytest.raises(UserError, match=text):
        choose(np.array([5]), strategies)


def test_words():
    assert strategy_text((BIG, MIDDLE, MIDDLE)) == "1x tp16 + 2x tp8"


def test_the_bridge_is_in_the_objective():
    """Of every strategy, also of the one that stays; the choice turns where its time outweighs the gain."""
    given = lengths(200)
    free = choose(given)
    single = {k: choose(given, [s]).plan.cost for k, s in enumerate(PUBLISHED) if holds(s, given)}
    other = sorted(single, key=single.get)[1]
    gain = single[other] - single[free.index]
    for moved, index in ((0.9 * gain, free.index), (1.1 * gain, other)):
        found = choose(given, bridge=lambda s, moved=moved: moved if s == PUBLISHED[free.index] else 0.0)
        assert found.index == index
        assert found.plan.cost == pytest.approx(single[index] + (moved if index == free.index else 0.0))
        assert found.plan.lower_bound <= found.plan.cost
    everywhere = choose(given, bridge=lambda _: 1e4, previous=free.index)
    assert everywhere.index == free.index and everywhere.plan.cost == pytest.approx(free.plan.cost + 1e4)
    assert everywhere.plan.lower_bound == pytest.approx(free.plan.lower_bound + 1e4)
    both = choose(given, bridge=lambda _: 7.0, previous=other, switch_cost=0.5 * gain)
    assert both.index == free.index and both.plan.cost == pytest.approx(free.plan.cost + 7.0 + 0.5 * gain)
