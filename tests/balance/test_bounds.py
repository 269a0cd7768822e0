"""Lower bounds: below the best there is, and by hand."""

import numpy as np
import pytest

from hardy.balance.bounds import alone, charged, fewest_slots, groups_bound, replicas_bound
from hardy.balance.cost import SchemeCost
from hardy.balance.plan import Scheme
from hardy.reference import hydraulis as twin


def own(a=1.0, b=0.0, c=0.0, cap=10, **degrees):
    return SchemeCost(scheme=Scheme(**degrees), a=a, b=b, c=c, cap_tokens=cap)


def lengths(*values):
    return np.array(values, dtype=np.int64)


def test_one_long_sequence_is_the_bound_and_is_named():
    found = replicas_bound(lengths(9, 1, 1), [own(), own()])
    assert found == (81.0, 0)


def test_work_over_ranks_is_the_bound():
    assert replicas_bound(lengths(2, 2, 2, 2, 2, 2, 2, 2), [own()] * 4).time == 8.0


def test_two_in_one_replica():
    assert replicas_bound(lengths(9, 9, 8, 1), [own()] * 2).time == pytest.approx(9 * 9 + 8 * 8)


def test_long_sequences_have_fewer_ranks():
    small = own(cap=4)
    found = replicas_bound(lengths(8, 8, 8, 1), [own(), small, small, small])
    assert found.time == pytest.approx(3 * 64)


def test_two_long_ones_share_the_only_replica_that_holds_them():
    found = replicas_bound(lengths(8, 7, 1), [own(), own(cap=4), own(cap=4)])
    assert found.time == pytest.approx(8 * 8 + 7 * 7)


def test_a_replica_that_holds_nothing_shares_nothing():
    assert replicas_bound(lengths(8, 7), [own(), own(cap=4)]).time == pytest.approx(8 * 8 + 7 * 7)


def test_unlike_speeds_for_the_same_ranks():
    replicas = [own(tensor=4), own(a=2.0, tensor=4)]
    found = replicas_bound(lengths(*[3] * 9), replicas)
    assert found.time == pytest.approx(9 * 9 / 1.5)


def test_the_constant_is_charged_by_the_token():
    cost = own(a=0.0, b=1.0, c=10.0, cap=5)
    assert charged(cost, lengths(5, 1)).tolist() == [15.0, 3.0]
    assert charged(cost, lengths(6)).tolist() == [np.inf]
    assert alone(own(c=3.0, pipeline=2), lengths(2)).tolist() == [14.0]


def test_groups_in_lock_step_pay_a_constant_for_every_slot():
    schemes = [own(c=2.0), own(a=0.5, c=2.0, cap=20, context=2)]
    assert fewest_slots(lengths(*[10] * 5), schemes, world_size=2) == 3
    found = groups_bound(lengths(*[10] * 5), schemes, world_size=2, objective="lock_step")
    assert found.time == pytest.approx(3 * 2.0 + 5 * 100 / 2)


@pytest.mark.parametrize("seed", range(20))
def test_never_above_the_best_there_is(seed):
    rng = np.random.default_rng(seed)
    kinds = [
        own(a=1.0, b=5.0, c=30.0, cap=40),
        own(a=0.6, b=2.0, c=20.0, cap=90, tensor=2),
        own(a=0.4, b=2.0, c=9.0, cap=60, pipeline=2),
    ]
    replicas = [kinds[1], *(kinds[k] for k in rng.integers(0, 3, 1))]
    tokens = np.sort(rng.integers(1, 90, 4))[::-1]
    plain = [twin.Replica(k.a, k.b, k.c, k.cap_tokens, k.scheme.ranks, k.scheme.pipeline) for k in replicas]
    best = twin.best_dispatch(plain, tokens.tolist())
    assert replicas_bound(tokens, replicas).time <= best * (1 + 1e-12)
