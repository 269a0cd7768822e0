"""Strategies worth keeping ready."""

import numpy as np
import pytest

from hardy.balance.cost import LengthCostModel, SchemeCost
from hardy.balance.cost_presets import cost_preset, published_strategies
from hardy.balance.lengths import draw_lengths, fit_lengths, token_batches
from hardy.balance.plan import Scheme
from hardy.balance.proposal import candidate_strategies, propose, trace_strategies, trace_table
from hardy.balance.strategies import plan_strategies
from hardy.config import UserError
from hardy.reference import hydraulis as twin

SMALL = LengthCostModel(
    schemes=(
        SchemeCost(scheme=Scheme(), a=1.0, b=3.0, c=2.0, cap_tokens=3),
        SchemeCost(scheme=Scheme(tensor=2), a=0.5, b=1.8, c=3.0, cap_tokens=9),
        SchemeCost(scheme=Scheme(pipeline=2), a=0.5, b=1.4, c=1.0, cap_tokens=9),
    )
)
PLAIN = [
    twin.Replica(own.a, own.b, own.c, own.cap_tokens, own.scheme.ranks, own.scheme.pipeline)
    for own in SMALL.schemes
]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_program_is_its_recursion(seed, ranks):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, 6)
    times, _ = trace_table(lengths, world_size=ranks, cost=SMALL, length_step=1)
    assert times[-1, -1] == pytest.approx(twin.proposal_time(lengths.tolist(), PLAIN, ranks))


def test_time_falls_with_ranks_and_grows_with_lengths():
    lengths = np.random.default_rng(0).integers(1, 9, 40)
    times, _ = trace_table(lengths, world_size=6, cost=SMALL, length_step=1)
    assert (np.diff(times[1:], axis=0)[np.isfinite(times[1:-1])] <= 1e-9).all()
    finite = times[-1][np.isfinite(times[-1])]
    assert (np.diff(finite) >= -1e-9).all()


def test_traces_are_strategies_that_fit():
    lengths = np.random.default_rng(0).integers(1, 10, 60)
    found = trace_strategies(lengths, world_size=5, cost=SMALL, length_step=3)
    assert found and len(set(found)) == len(found)
    assert all(0 < sum(scheme.ranks for scheme in each) <= 5 for each in found)
    assert any(max(SMALL.of(scheme).cap_tokens for scheme in each) >= lengths.max() for each in found)
    with pytest.raises(UserError, match="rank_step=2 does not divide"):
        trace_strategies(lengths, world_size=5, cost=SMALL, length_step=3, rank_step=2)


def test_candidates_use_all_ranks_and_hold_the_longest():
    cost = cost_preset("hydraulis-32b")
    found = candidate_strategies(cost, world_size=64, longest=32768)
    assert len(found) > 100 and len(set(found)) == len(found)
    assert {sum(scheme.ranks for scheme in each) for each in found} == {64}
    assert all(max(cost.of(scheme).cap_tokens for scheme in each) >= 32768 for each in found)


def batches(count):
    drawn = draw_lengths("wikipedia", 6000, np.random.default_rng(0))
    lengths = fit_lengths(drawn, most_tokens=32768, overlong="truncate").lengths
    return [lengths[place] for place in token_batches(lengths, budget_tokens=200_000)][:count]


def test_each_addition_is_the_best_there_is():
    cost, published, given = cost_preset("hydraulis-32b"), published_strategies(), batches(3)

    def mean(strategies):
        plans = [plan_strategies(b, world_size=64, cost=cost, strategies=strategies).plan.cost for b in given]
        return float(np.mean(plans))

    found = propose(given, world_size=64, cost=cost, candidates=published, first=published[0])
    assert found.strategies[0] == published[0] and found.num_candidates == 7
    assert list(found.times) == sorted(found.times, reverse=True)
    for k in range(1, len(found.strategies)):
        before = list(found.strategies[:k])
        assert found.times[k] == pytest.approx(min(mean([*before, each]) for each in published))
        assert found.times[k] == pytest.approx(mean(list(found.strategies[: k + 1])))
    left = min(mean([*found.strategies, each]) for each in published)
    assert left > found.times[-1] * (1 - 0.0051)


def test_at_most_so_many():
    cost, published = cost_preset("hydraulis-32b"), published_strategies()
    found = propose(batches(2), world_size=64, cost=cost, candidates=published, most=1)
    assert len(found.strategies) == 1


def test_what_cannot_be_proposed_is_said():
    cost = cost_preset("hydraulis-32b")
    with pytest.raises(UserError, match="no candidate strategy holds"):
        propose(batches(2), world_size=64, cost=cost, candidates=[(Scheme(tensor=4),) * 16])
    with pytest.raises(UserError, match="needs candidates and batches"):
        propose([], world_size=64, cost=cost, candidates=published_strategies())


def test_what_the_bridge_takes_is_weighed():
    cost, published, given = cost_preset("hydraulis-32b"), published_strategies(), batches(2)
    free = propose(given, world_size=64, cost=cost, candidates=published, most=1)
    dear = free.strategies[0]
    found = propose(
        given, world_size=64, cost=cost, candidates=published, most=1, bridge=lambda s: 1e6 * (s == dear)
    )
    assert found.strategies[0] != dear and found.times[0] >= free.times[0]
    same = propose(given, world_size=64, cost=cost, candidates=published, most=1, bridge=lambda _: 50.0)
    assert same.strategies == free.strategies and same.times[0] == pytest.approx(free.times[0] + 50.0)


@pytest.mark.parametrize("each", [20.0, 100.0])
def test_the_best_with_its_bridge_is_found(each):
    """Bounds spare most of the planning; one that counted the bridge twice would leave out the best."""
    cost, published, given = cost_preset("hydraulis-32b"), published_strategies(), batches(2)

    def bridge(strategy):
        return each * len(strategy)

    def time(strategy):
        plans = [plan_strategies(b, world_size=64, cost=cost, strategies=[strategy]).plan for b in given]
        return float(np.mean([made.cost for made in plans])) + bridge(strategy)

    holding = [s for s in published if max(cost.of(k).cap_tokens for k in s) >= max(b.max() for b in given)]
    best = min(holding, key=time)
    found = propose(given, world_size=64, cost=cost, candidates=published, most=1, bridge=bridge)
    assert found.strategies == (best,) and found.times[0] == pytest.approx(time(best))
