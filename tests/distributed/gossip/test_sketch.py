"""Sketches: unbiased, as exact as promised, linear, and the same however the vector is cut."""

import pytest
import torch

from hardy.distributed.gossip.sketch import Sketcher
from hardy.rng import generator_for

CPU = torch.device("cpu")


def vectors(n=5000):
    gauss = torch.randn(n, generator=generator_for(0, "gauss"))
    sparse, strided = torch.zeros(n), torch.zeros(n)
    sparse[torch.randperm(n, generator=generator_for(0, "places"))[:50]] = gauss[:50]
    strided[::64] = 1.0
    low_rank = torch.outer(gauss[:50], gauss[100:200]).flatten()
    return {
        "random": gauss,
        "sparse": sparse,
        "strided": strided,
        "constant": torch.ones(n),
        "low_rank": low_rank,
    }


@pytest.mark.parametrize("kind", vectors())
def test_estimates_are_unbiased_and_spread_as_promised(kind):
    x_n, m = vectors()[kind], 256
    squares = torch.stack(
        [Sketcher(m, seed=seed, device=CPU).sketch([(0, x_n)]).double().square().sum() for seed in range(200)]
    )
    ratios = squares / x_n.double().square().sum()
    promised = (2 / m) ** 0.5
    assert abs(float(ratios.mean()) - 1) < 3 * float(ratios.std()) / 200**0.5 + 1e-6
    assert float(ratios.std()) < 1.5 * promised  # signs of rows and places, so patterns spread a little more


def test_the_spread_of_a_random_vector_is_the_promised_one():
    x_n = vectors()["random"]
    squares = [float(Sketcher(64, seed=s, device=CPU).sketch([(0, x_n)]).square().sum()) for s in range(300)]
    ratios = torch.tensor(squares) / float(x_n.square().sum())
    assert float(ratios.std()) == pytest.approx((2 / 64) ** 0.5, rel=0.15)


def test_rows_are_shifted_each_in_its_own_way():
    """Without shifts aligned rows of one sign pattern would cancel or pile up."""
    sketcher, m = Sketcher(64, seed=0, device=CPU), 64
    one_per_row = torch.zeros(200 * m)
    one_per_row[::m] = 1.0
    assert (sketcher.sketch([(0, one_per_row)]) != 0).sum() > 40


def test_sketches_are_linear_and_tell_distances():
    sketcher = Sketcher(1024, seed=1, device=CPU)
    a, b = vectors()["random"], vectors()["constant"]
    s_a, s_b = sketcher.sketch([(0, a)]), sketcher.sketch([(0, b)])
    torch.testing.assert_close(sketcher.sketch([(0, a - b)]), s_a - s_b, rtol=0, atol=1e-4)
    assert float((s_a - s_b).square().sum()) == pytest.approx(float((a - b).square().sum()), rel=0.15)


@pytest.mark.parametrize("by_slices", [True, False])
def test_any_way_to_cut_a_vector_gives_its_sketch(by_slices):
    sketcher, x_n = Sketcher(128, seed=0, device=CPU), vectors()["random"]
    want = sketcher.sketch([(0, x_n)])
    sketcher._by_slices = by_slices  # the two ways are for two kinds of machine
    for cuts in ([0, 5000], [0, 1, 127, 128, 129, 1000, 5000], [0, 3, 200, 4096, 4999, 5000]):
        pieces = [(a, x_n[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
        torch.testing.assert_close(sketcher.sketch(pieces[::-1]), want, rtol=0, atol=1e-4)
        torch.testing.assert_close(sum(sketcher.sketch([piece]) for piece in pieces), want, rtol=0, atol=1e-4)
    assert torch.equal(sketcher.sketch([]), torch.zeros(128))


def test_other_seeds_give_other_sketches_and_fp64_is_taken():
    x_n = vectors()["random"]
    first, other = (Sketcher(64, seed=seed, device=CPU).sketch([(0, x_n)]) for seed in (0, 1))
    assert not torch.allclose(first, other)
    again = Sketcher(64, seed=0, device=CPU).sketch([(0, x_n.double())])
    assert again.dtype == torch.float32 and torch.allclose(again, first, atol=1e-4)
