"""Distances: one round late, by copies or sketches, of numerators or de-biased weights."""

import pytest
import torch
from torch import nn

from hardy.distributed.comm import Alone
from hardy.distributed.gossip.config import WeightsConfig
from hardy.distributed.gossip.distances import Distances
from hardy.distributed.gossip.vectors import Vectors


def make(**settings):
    model = nn.Linear(50, 20, bias=False)
    config = WeightsConfig(name="adaptive", **settings)
    return Distances(config, Vectors(model, []), Alone(), seed=0)


def test_unseen_neighbours_count_as_near():
    distances = make(v=0.1)
    assert distances.shares([3, 5]) == pytest.approx({3: 0.09 / 1.1 / 3, 5: 0.09 / 1.1 / 3})
    assert distances.last == {3: 0.0, 5: 0.0}


@pytest.mark.parametrize("of", ["numerator", "debiased"])
def test_copies_give_exact_distances(of):
    distances = make(scale="raw", k=1.0, distance_mode="exact", distance_of=of)
    x, y = [torch.full((1000,), 2.0)], [torch.full((1000,), 3.0)]
    assert distances.sketch(x, 2.0) is None
    distances.note_own(x, None, 2.0)
    distances.note(4, y, None, 1.5)
    distances.shares([4, 6])
    assert distances.last == pytest.approx({4: 1000.0, 6: 0.0})  # 2 and 3, or 1 and 2
    x[0].zero_()
    distances.shares([4])
    assert distances.last[4] == pytest.approx(1000.0)  # copies


def test_sketches_estimate_and_broken_ones_are_ignored():
    distances = make(scale="per_parameter", k=1.0)
    x, y = [torch.randn(1000)], [torch.randn(1000)]
    own, other = distances.sketch(x, 1.0), distances.sketch(y, 1.0)
    distances.note_own(x, own, 1.0)
    distances.note_sketch(2, other)
    distances.note_sketch(3, torch.full_like(other, torch.nan))
    distances.note_sketch(4, None)
    distances.shares([2, 3, 4])
    assert distances.last[2] == pytest.approx(float((x[0] - y[0]).square().mean()), rel=0.1)
    assert distances.last[3] == distances.last[4] == 0.0


def test_relative_distances_go_by_the_own_norm_and_masses_by_division():
    distances = make(distance_of="debiased")
    x, y = [torch.full((1000,), 3.0)], [torch.full((1000,), 4.0)]
    distances.note_own(x, distances.sketch(x, 3.0), 3.0)  # z = 1
    distances.note(1, y, distances.sketch(y, 2.0), 2.0)  # z = 2
    distances.shares([1])
    assert distances.last[1] == pytest.approx(1.0, rel=0.1)
