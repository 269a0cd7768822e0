"""The estimated distance to the mean: exact where all are heard from, by hand, and of what messages hold."""

import math

import pytest
import torch

from hardy.distributed.gossip.exchange import Gain
from hardy.distributed.gossip.spread import distance_to_mean, squares_to


@pytest.mark.parametrize("n", [2, 3, 7])
def test_heard_from_all_the_mean_of_squares_is_exact_and_each_lies_between_own_and_mean(n):
    z = torch.randn(n, 5, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    true = (z - z.mean(0)).square().sum(1)
    others = [[j for j in range(n) if j != i] for i in range(n)]
    squares = [[(z[i] - z[j]).square().sum().item() for j in others[i]] for i in range(n)]
    got = torch.tensor([distance_to_mean(row, num_replicas=n) for row in squares], dtype=torch.float64)
    torch.testing.assert_close(got.square().mean(), true.mean())
    torch.testing.assert_close(got.square(), (true + true.mean()) / 2)


def test_a_few_heard_from_stand_for_all_and_agreement_gives_zero():
    assert distance_to_mean([0.0, 0.0], num_replicas=4) == 0.0
    assert distance_to_mean([9.0, 7.0], num_replicas=4) == pytest.approx(math.sqrt(8 * 3 / 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_are_between_debiased_parameters_and_nothing_is_changed(dtype):
    """A share 0.25 of mass 2 brings 0.5 of mass; a running sum brings what is new in it, by factor 1."""
    own = [torch.full((3,), 6.0), torch.full((2,), 3.0)]  # mass 3: z = 2, 1
    told = {"sender_mass": math.nan, "sketch_m": None, "sender": 1}
    shared = [torch.full((3,), 2.0, dtype=dtype), torch.full((2,), 8.0, dtype=dtype), torch.ones(4)]
    gains = [
        Gain(vectors=shared, factor=0.25, mass=0.5, **told),  # z = 1, 4; what comes after does not count
        Gain(vectors=[torch.full((3,), 0.5), torch.full((2,), 0.25)], factor=1.0, mass=0.25, **told),
    ]
    assert squares_to(own, 3.0, gains).tolist() == pytest.approx([3 * 1.0 + 2 * 9.0, 0.0], rel=1e-6)
    assert own[0][0] == 6 and gains[0].vectors[1][0] == 8
