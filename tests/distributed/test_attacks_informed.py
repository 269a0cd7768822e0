"""Attacks that see honest gradients: formulas by hand, bounds that hold and are tight, what breaks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.distributed.attacks_informed import Alie, Fang, Identical, Ipm, MinMax, MinSum, alie_z

HONEST = torch.tensor([[1.0, -2.0, 0.0], [3.0, -2.0, 6.0], [2.0, 1.0, -3.0]], dtype=torch.float64)
MU = torch.tensor([2.0, -1.0, 1.0], dtype=torch.float64)
SIGMA = torch.tensor([1.0, 3**0.5, 21**0.5], dtype=torch.float64)
SEEDS = st.integers(0, 10_000)


def played(attack, honest=HONEST, *, liars=2, **named):
    """Return the liars' rows, which stand first and last."""
    fill = torch.full_like(honest[:1], torch.nan)  # what the attackers held must not matter
    rows = torch.cat([fill, honest, fill.expand(liars - 1, -1)])
    places = [0, *range(len(rows) - liars + 1, len(rows))]
    attack([rows], attackers=places, **named)
    assert torch.equal(rows[1 : 1 + len(honest)], honest)
    return rows[places]


def cloud(seed, *, rows=12, columns=40, mean=0.3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) + mean


@pytest.mark.parametrize("strength", [0.5, 10.0])
def test_ipm_is_the_mean_turned_round_and_scaled(strength):
    assert torch.equal(played(Ipm(strength=strength)), (-strength * MU).expand(2, -1))


@pytest.mark.parametrize("sign", [-1, 1])
def test_alie_is_some_deviations_off_the_mean(sign):
    torch.testing.assert_close(played(Alie(z=1.5, sign=sign)), (MU + sign * 1.5 * SIGMA).expand(2, -1))


def test_alie_takes_the_papers_z():
    # n = 20, f = 8: s = 3 honest rows are needed, Phi(z) = 9 / 12.
    assert alie_z(20, 8) == pytest.approx(0.67449, abs=1e-5)
    # n = 50, f = 24, the case of the paper's own example: s = 2, Phi(z) = 24 / 26.
    assert alie_z(50, 24) == pytest.approx(1.42608, abs=1e-5)
    assert alie_z(14, 8) == pytest.approx(0.96742, abs=1e-5)  # a majority: as if one row were needed, 5 / 6
    assert alie_z(2, 1) == alie_z(3, 1) == 0
    rows = cloud(0)
    z = alie_z(20, 8)
    torch.testing.assert_close(played(Alie(), rows, liars=8)[0], rows.mean(0) - z * rows.std(0))
    told = played(Alie(), rows, liars=8, num_faulty=0)[0]
    torch.testing.assert_close(told, rows.mean(0) - z * rows.std(0))  # what the rule was told does not matter


def diameter(rows):
    return torch.cdist(rows, rows).max()


def largest_sum(rows):
    return torch.cdist(rows, rows).square().sum(1).max()


@settings(max_examples=60)
@given(seed=SEEDS, direction=st.sampled_from(["deviation", "mean", "sign"]), rows=st.integers(2, 9))
def test_min_max_and_min_sum_reach_their_bounds_and_no_farther(seed, direction, rows):
    honest = cloud(seed, rows=rows, columns=6)
    mu = honest.mean(0)
    p = {"deviation": -honest.std(0), "mean": -mu / mu.norm(), "sign": -mu.sign()}[direction]
    for attack, measure, bound in (
        (MinMax, lambda v: torch.cdist(v[None], honest).max(), diameter(honest)),
        (MinSum, lambda v: torch.cdist(v[None], honest).square().sum(), largest_sum(honest)),
    ):
        vector = played(attack(direction=direction), honest)[0]
        gamma = (vector - mu) @ p / (p @ p)
        assert gamma > 0
        torch.testing.assert_close(vector, mu + gamma * p)
        assert 0.999 * bound <= measure(vector) <= bound
        assert measure(mu + 1.001 * gamma * p) > bound


def test_equal_honest_rows_leave_no_room():
    rows = torch.full((4, 3), 2.0)
    for attack in (MinMax(), MinSum(), MinMax(direction="mean"), Identical(), Alie()):
        assert torch.equal(played(attack, rows), torch.full((2, 3), 2.0))


def test_fang_lies_beyond_all_honest_values_on_the_harmful_side():
    honest = torch.tensor([[1.0, -1.0, -1.0, 1.0, -4.0], [3.0, 4.0, -3.0, -4.0, 4.0]]).repeat(1, 2000)
    vectors = played(Fang(b=3.0), honest, liars=3).view(3, 2000, 5)
    for column, (low, high) in enumerate([(1 / 3, 1), (-3, -1), (-1, -1 / 3), (1, 3), (-12, -4)]):
        values = vectors[:, :, column]
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
    assert (vectors[0] != vectors[1]).double().mean() > 0.99


@settings(max_examples=60)
@given(seed=SEEDS, honest=st.integers(5, 15), data=st.data())
def test_identical_vectors_are_nearest_to_the_median_of_all_rows_and_point_against_mu(seed, honest, data):
    liars = data.draw(st.integers(1, honest - 1))
    rows = cloud(seed, rows=honest, columns=300, mean=0.1)
    vectors = played(Identical(), rows, liars=liars)
    assert (vectors == vectors[0]).all()
    everyone = torch.cat([rows, vectors])
    n = len(everyone)
    ordered = everyone.sort(0).values
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    away = (everyone - median).norm(dim=1)
    assert (away[honest:] < away[:honest].min()).all()
    assert (away[honest:] > 0.8 * away[:honest].min()).all()
    mu = rows.mean(0)
    assert vectors[0] @ mu < 0.3 * mu @ mu or liars == 1
    assert (vectors[0] - median) @ mu < 0


def aksel(rows, count):
    n, ordered = len(rows), rows.sort(0).values
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return rows[(rows - median).norm(dim=1).argsort()[:count]].mean(0)


def krum(rows, f):
    distances = torch.cdist(rows, rows).square().sort(1).values[:, 1 : len(rows) - f - 1]
    return rows[distances.sum(1).argmin()]


def trimmed(rows, f):
    return rows.sort(0).values[f : len(rows) - f].mean(0)


def agreement(vector, rows):
    mu = rows.mean(0)
    return (vector @ mu / (vector.norm() * mu.norm())).item()


RULES = {
    "aksel": lambda rows: aksel(rows, (len(rows) + 1) // 2),
    "krum": lambda rows: krum(rows, 8),
    "trimmed mean": lambda rows: trimmed(rows, 8),
    "median": lambda rows: trimmed(rows, (len(rows) - 1) // 2),
    "mean": lambda rows: rows.mean(0),
}


@pytest.mark.parametrize(
    ("attack", "rule"),
    [
        (Ipm(strength=0.5), "median"),
        (Ipm(strength=0.5), "krum"),
        (Ipm(strength=10.0), "mean"),
        (Alie(z=1.5), "median"),
        (Alie(z=1.5), "krum"),
        (MinMax(direction="sign"), "krum"),
        (MinMax(direction="mean"), "krum"),
        (MinSum(direction="sign"), "krum"),
        (MinSum(direction="mean"), "trimmed mean"),
        (Fang(), "median"),
        (Identical(), "aksel"),
    ],
    ids=str,
)
def test_each_breaks_a_rule_that_is_sound_without_it(attack, rule):
    # As late in training: noise of a row is twenty times as long as the mean gradient.
    rows, more = cloud(1, columns=2000, mean=0.0), cloud(2, rows=8, columns=2000, mean=0.0)
    signal = cloud(3, rows=1, columns=2000)[0]
    rows, more = signal + 4 * rows, signal + 4 * more
    sound = agreement(RULES[rule](torch.cat([rows, more])), rows)
    broken = agreement(RULES[rule](torch.cat([rows, played(attack, rows, liars=8)])), rows)
    assert sound > 0.2
    assert broken < 0.5 * sound, f"{sound} without, {broken} with"
    assert math.isfinite(broken)
