"""Attacks on the trusted gradient, on the actual rule, and those that learn whom to copy."""

import pytest
import torch

from hardy.config import ConfigError
from hardy.distributed.attacks_adaptive import Cosine, Edge, Mimic, Optimal


def cloud(seed, *, rows=9, columns=30, mean=0.3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) + mean


def played(attack, honest, *, liars=2, **named):
    rows = torch.cat([honest, torch.full_like(honest[:liars], torch.nan)])
    attack([rows], attackers=range(len(honest), len(rows)), **named)
    assert torch.equal(rows[: len(honest)], honest)
    return rows[len(honest) :]


def lower(numbers):
    return sorted(numbers.tolist())[(len(numbers) - 1) // 2]


@pytest.mark.parametrize("count", [8, 9])
def test_edge_lies_inside_the_middle_distance_and_agrees_by_a_hair(count):
    rows, g_v = cloud(0, rows=count), cloud(1, rows=1)[0]
    first, second = played(Edge(), rows, references=[g_v])
    assert torch.equal(first, second)
    middle = lower((rows - g_v).norm(dim=1))
    assert (first - g_v).norm().item() == pytest.approx(0.95 * middle)
    assert (first @ g_v / (g_v @ g_v)).item() == pytest.approx(1e-3)
    across = first - 1e-3 * g_v
    mu = rows.mean(0)
    u = mu - (mu @ g_v) / (g_v @ g_v) * g_v
    torch.testing.assert_close(across / across.norm(), -u / u.norm())


def test_edge_where_the_middle_is_nearer_than_zero_stays_on_the_trusted_gradient():
    g_v = cloud(1, rows=1)[0]
    vectors = played(Edge(along=0.5), g_v + 1e-3 * cloud(0), references=[g_v])
    torch.testing.assert_close(vectors, (0.5 * g_v).expand(2, -1))


@pytest.mark.parametrize(
    ("q", "cosine"), [(1.05, None), (0.5, None), (0.1, 0.1), (0.49, 0.49), (50.0, 0.99), (5e-1 + 1e-9, None)]
)
def test_cosine_turns_away_as_far_as_asked(q, cosine):
    rows, g_v = cloud(0, rows=8), cloud(1, rows=1)[0]
    vector = played(Cosine(q=q), rows, references=[g_v])[0]
    cosines = rows @ g_v / (rows.norm(dim=1) * g_v.norm())
    expected = q * lower(cosines) if cosine is None else cosine
    assert 0.02 < expected <= 0.99
    assert vector.norm().item() == pytest.approx(g_v.norm().item())
    assert (vector @ g_v / (g_v @ g_v)).item() == pytest.approx(expected)
    mu = rows.mean(0)
    assert vector @ (mu - (mu @ g_v) / (g_v @ g_v) * g_v) < 0


def test_cosine_is_never_below_its_floor():
    g_v = cloud(1, rows=1)[0]
    vector = played(Cosine(), -cloud(0).abs() * g_v.sign(), references=[g_v])[0]
    assert (vector @ g_v / (g_v @ g_v)).item() == pytest.approx(0.02)


def test_a_trusted_gradient_of_zeros_makes_no_nan():
    rows = cloud(0)
    edge = played(Edge(), rows, references=[torch.zeros(30)])[0]
    assert edge.norm().item() == pytest.approx(0.95 * lower(rows.norm(dim=1)))
    assert torch.equal(played(Cosine(), rows, references=[torch.zeros(30)]), torch.zeros(2, 30).double())


def clip(limit):
    """Return a rule that leaves out rows longer than `limit`: the worst strength of ipm is just inside."""

    def rule(blocks):
        (rows,) = blocks
        return [rows[rows.norm(dim=1) <= limit].mean(0)]

    return rule


@pytest.mark.parametrize("worst", [0.7, 3.0, 25.0, 400.0])
def test_optimal_finds_the_worst_strength_for_the_actual_rule(worst):
    rows = torch.ones(6, 4, dtype=torch.float64)
    vectors = played(Optimal(), rows, rule=clip(worst * 2.0 + 1e-9 if worst > 1 else 2.0))
    strength = -vectors[0, 0].item()
    assert 0.75 * max(worst, 1) <= strength <= max(worst, 1)


@pytest.mark.parametrize("evaluations", [1, 2, 20])
def test_optimal_tries_the_rule_as_often_as_allowed_and_leaves_the_best(evaluations):
    rows, tried = cloud(0), []

    def rule(blocks):
        assert torch.equal(blocks[0][:9], rows)
        tried.append(blocks[0][9:].clone())
        return [blocks[0].sort(0).values[5]]

    left = played(Optimal(base="alie", evaluations=evaluations), rows, rule=rule)
    assert len(tried) == evaluations
    mu, sigma = rows.mean(0), rows.std(0)
    moved = [(torch.cat([rows, v]).sort(0).values[5] - mu).norm() for v in tried]
    found = (torch.cat([rows, left]).sort(0).values[5] - mu).norm()
    assert found >= max(moved) * (1 - 1e-5)
    z = [((mu - v[0]) / sigma).mean().item() for v in tried]
    assert z[:3] == pytest.approx([0, 10, 30][:evaluations], abs=1e-9)
    for v in tried:
        torch.testing.assert_close(v[0], mu - ((mu - v[0]) / sigma).mean() * sigma)


def test_optimal_takes_a_skipped_step_for_one_that_moves_nothing():
    rows, tried = torch.ones(3, 4).double(), []

    def rule(blocks):
        tried.append(blocks[0][3, 0].item())
        return None if tried[-1] < -5 else [torch.ones(4)]  # harmless, or skipped: mu is lost

    vector = played(Optimal(), rows, rule=rule)[0]
    assert vector[0] < -5


def test_optimal_asks_for_the_rule():
    with pytest.raises(ConfigError, match="attack 'optimal' tries out the actual rule: pass rule="):
        played(Optimal(), cloud(0))


@pytest.mark.parametrize(("worker", "copied"), [(0, 0), (4, 4), (11, 2)])
def test_mimic_copies_one_honest_worker(worker, copied):
    rows = cloud(0)
    assert torch.equal(played(Mimic(worker=worker), rows), rows[copied].expand(2, -1))


@pytest.mark.parametrize("seed", range(5))  # z comes out with either sign
def test_mimic_learns_the_direction_of_largest_variance_and_then_stays(seed):
    generator = torch.Generator().manual_seed(0)
    mimic, axis = Mimic(warmup_steps=30, seed=seed), torch.zeros(30, dtype=torch.float64)
    axis[7] = 1.0
    place = torch.tensor([0.1, 0.2, -0.3, 0.4, -3.0, 0.2, 0.5, 1.5, 1.4])  # worker 4 stands out
    for _ in range(30):
        noise = torch.randn(9, 30, generator=generator, dtype=torch.float64)
        played(mimic, 5 + place[:, None] * axis + 0.2 * noise)
    z = mimic.state_dict()["direction/0"]
    assert abs(z[7]) / z.norm() > 0.95
    rows = 5 + place[:, None] * axis
    assert torch.equal(played(mimic, rows), rows[4].expand(2, -1))
    turned = rows.flip(0)  # others stand out now; the attackers keep to their worker
    assert torch.equal(played(mimic, turned), turned[4].expand(2, -1))
    assert mimic.state_dict()["seen"] == 30


def test_mimic_copies_from_the_first_step_of_its_warm_up():
    rows = cloud(0)
    vector = played(Mimic(warmup_steps=3), rows)[0]
    assert (rows == vector).all(1).any()
