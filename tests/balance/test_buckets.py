"""Planning by buckets of lengths."""

import itertools

import numpy as np
import pytest

from hardy.balance.buckets import bucket_edges, bucketed_groups
from hardy.balance.cost import DecoderSizes, analytic_cost
from hardy.balance.planner import plan
from hardy.config import UserError

COST = analytic_cost(DecoderSizes(4, 64, 160, 4, 4, 16, 512), cap_tokens=100, degrees=(1, 2, 4, 8))


def lengthened(lengths, edges):
    return int((edges[np.searchsorted(edges, lengths)] - lengths).sum())


@pytest.mark.parametrize("num_buckets", [1, 2, 3, 7, 9])
def test_edges_lengthen_least_of_all_choices(num_buckets):
    lengths = np.random.default_rng(num_buckets).integers(1, 60, 24)
    edges = bucket_edges(lengths, num_buckets)
    assert edges.size == num_buckets and (np.diff(edges) > 0).all() and edges[-1] == lengths.max()
    least = min(
        lengthened(lengths, np.array([*inner, lengths.max()]))
        for inner in itertools.combinations(np.unique(lengths)[:-1].tolist(), num_buckets - 1)
    )
    assert lengthened(lengths, edges) == least


def test_as_many_buckets_as_lengths_change_nothing():
    lengths = np.random.default_rng(0).integers(1, 90, 40)
    enough = np.unique(lengths).size
    assert bucket_edges(lengths, enough).tolist() == np.unique(lengths).tolist()
    ours = plan(lengths, world_size=8, cost=COST)
    assert bucketed_groups(lengths, world_size=8, cost=COST, num_buckets=enough).hash() == ours.hash()


@pytest.mark.parametrize("objective", ["lock_step", "free_running"])
def test_times_are_those_of_the_lengths_and_caps_hold(objective):
    for seed in range(4):
        lengths = np.random.default_rng(seed).integers(1, 300, 60)
        made = bucketed_groups(lengths, world_size=8, cost=COST, objective=objective, num_buckets=3)
        whole = plan(lengths, world_size=8, cost=COST, objective=objective)
        taken = [i for slot in made.slots for batch in slot for i in batch.sequences]
        assert sorted(taken) == list(range(60))
        for batch in itertools.chain.from_iterable(made.slots):
            own = lengths[list(batch.sequences)]
            scheme = COST.of(batch.group.scheme)
            assert batch.tokens == own.sum() <= scheme.cap_tokens
            assert batch.cost == pytest.approx(scheme.times(own).sum() + scheme.c if own.size else 0)
        assert made.lower_bound == whole.lower_bound
        assert made.cost >= whole.cost
        if objective == "lock_step":
            assert made.cost > whole.cost
            assert made.cost == pytest.approx(sum(max(b.cost for b in slot) for slot in made.slots))


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="num_buckets=0 must be at least 1"):
        bucketed_groups([1, 2], world_size=1, cost=COST, num_buckets=0)
    with pytest.raises(UserError, match="an empty batch"):
        bucketed_groups([], world_size=1, cost=COST)
