"""The Moreau weight: its bounds, that columns add up, and how distances are counted."""

import math

import pytest

from hardy.distributed.gossip.config import WeightsConfig
from hardy.distributed.gossip.weights import moreau_shares, scaled_distance, self_share


@pytest.mark.parametrize("v", [0.01, 0.1, 0.9])
@pytest.mark.parametrize("size", [1, 2, 5, 50])
def test_shares_lie_in_their_bounds_and_add_up_to_one(v, size):
    distances = dict(enumerate([0.0, 1e-9, 1e-3, 1.0, 1e9, math.inf] * 9))
    distances = {receiver: distances[receiver] for receiver in range(size - 1)}
    shares = moreau_shares(distances, num_receivers=size, v=v, k=2.0)
    least, most = v * (1 - v) / ((1 + v) * size), (1 - v) / size
    slack = 1e-15
    assert all(least - slack <= w <= most + slack for w in shares.values())
    own = self_share(shares)
    assert math.fsum([own, *shares.values()]) == pytest.approx(1, abs=1e-15)
    assert 1 / size + v * (size - 1) / size - slack <= own <= 1 - (size - 1) * least + slack


def test_shares_grow_with_the_distance_from_the_least_to_the_most():
    shares = moreau_shares({1: 0.0, 2: 0.1, 3: 0.2, 4: math.inf}, num_receivers=5, v=0.1, k=3.0)
    assert shares[1] == pytest.approx(0.1 * 0.9 / 1.1 / 5) and shares[4] == pytest.approx(0.9 / 5)
    assert shares[1] < shares[2] < shares[3] < shares[4]
    want = 0.9 / 1.1 * (1.1 - math.exp(-0.3)) / 5
    assert shares[2] == pytest.approx(want, rel=1e-14)


def test_tiny_distances_are_not_rounded_away():
    at, near = (moreau_shares({1: d}, num_receivers=2, v=1e-6, k=1.0)[1] for d in (0.0, 1e-16))
    assert near - at == pytest.approx(1e-16 / 2, rel=1e-3, abs=0)


def test_nobody_to_send_to_keeps_all():
    assert moreau_shares({}, num_receivers=1, v=0.1, k=1.0) == {} and self_share({}) == 1.0


@pytest.mark.parametrize(("scale", "want"), [("raw", 8.0), ("relative", 2.0), ("per_parameter", 0.08)])
def test_distances_are_counted_as_asked(scale, want):
    config = WeightsConfig(name="adaptive", scale=scale, k=1.0)
    assert scaled_distance(8.0, config, own_square=4.0, num_parameters=100) == pytest.approx(want)


def test_zero_weights_and_nan_are_no_accident_of_division():
    config = WeightsConfig(name="adaptive")
    assert scaled_distance(0.0, config, own_square=0.0, num_parameters=1) == 0.0
    with pytest.raises(ValueError, match="a squared distance is NaN"):
        scaled_distance(math.nan, config, own_square=1.0, num_parameters=1)
