"""Packing inside a replica."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.balance.cost import SchemeCost
from hardy.balance.plan import Scheme, stage_time
from hardy.balance.replica import best_fit, first_fit, pack_replica
from hardy.config import UserError
from hardy.reference import hydraulis as twin

FLAT = SchemeCost(scheme=Scheme(), a=0.1, b=1.0, c=7.0, cap_tokens=20)
PIPE = SchemeCost(scheme=Scheme(pipeline=3), a=0.1, b=1.0, c=7.0, cap_tokens=20)


def lengths_of(values):
    return np.array(sorted(values, reverse=True), dtype=np.int64)


def time_of(lengths, packs, cost):
    costs = [cost.c + float(cost.times(lengths[pack]).sum()) for pack in packs if pack.size]
    return stage_time(costs, pipeline=cost.scheme.pipeline)


@settings(max_examples=80)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=15), st.sampled_from([FLAT, PIPE]))
def test_every_sequence_once_and_caps(values, cost):
    lengths = lengths_of(values)
    packs = pack_replica(lengths, cost)
    assert sorted(np.concatenate(packs).tolist()) == list(range(lengths.size))
    assert all(lengths[pack].sum() <= 20 and pack.size for pack in packs)


@pytest.mark.parametrize("cost", [FLAT, PIPE])
def test_near_the_best_there_is(cost):
    rng, over = np.random.default_rng(0), []
    for _ in range(12):
        lengths = lengths_of(rng.integers(1, 20, 5))
        k = twin.Replica(cost.a, cost.b, cost.c, 20, p=cost.scheme.pipeline)
        best = twin.best_packing(k, lengths.tolist())
        over.append(time_of(lengths, pack_replica(lengths, cost), cost) / best - 1)
    assert min(over) >= -1e-12
    assert np.mean(over) < 0.01 and max(over) < 0.06


def test_more_packs_where_the_pipeline_gains():
    cheap = SchemeCost(scheme=Scheme(pipeline=4), a=0.1, b=1.0, c=0.1, cap_tokens=20)
    lengths = lengths_of([4] * 5)
    assert len(pack_replica(lengths, cheap)) == 5
    util = SchemeCost(scheme=Scheme(pipeline=4), a=0.1, b=1.0, c=0.1, cap_tokens=20, util_tokens=20)
    assert len(pack_replica(lengths, util)) == 1


def test_order_is_most_tokens_first_and_small_ends_in_a_pipeline():
    lengths = lengths_of([18, 15, 12, 9])
    assert [int(lengths[p].sum()) for p in pack_replica(lengths, FLAT, num_packs=4)] == [18, 15, 12, 9]
    assert [int(lengths[p].sum()) for p in pack_replica(lengths, PIPE, num_packs=4)] == [9, 15, 18, 12]


def test_a_fixed_number_of_packs():
    lengths = lengths_of([10, 10, 6, 6, 4, 4])
    packs = pack_replica(lengths, FLAT, num_packs=2)
    assert [int(lengths[p].sum()) for p in packs] == [20, 20]
    with pytest.raises(UserError, match="6 sequences of 40 tokens do not fit into 1 .* a cap of 50 tokens"):
        pack_replica(lengths, FLAT, num_packs=1)


def test_fits_by_hand():
    lengths = np.array([7, 6, 3, 3, 1])
    assert first_fit(lengths, capacity_tokens=10).tolist() == [0, 1, 0, 1, 1]
    assert best_fit(np.array([6, 7, 3, 1]), capacity_tokens=10).tolist() == [0, 1, 1, 0]
