"""Laws that link the update rules: limits in which one must become another, and where they must differ."""

import pytest
import torch

from hardy.ops import updates_eager
from hardy.ops.factorize import compress, expand, matrix_shape
from hardy.ops.updates import AdamTask, Place, Rounding, SweepTask
from hardy.reference import apollo, galore, smmf
from hardy.reference.adaptive import adamw

ONE = torch.ones(1, 1, dtype=torch.float64)


def draw(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(shape, steps):
    return [draw(*shape, seed=t + 1) for t in range(steps)]


def test_without_memory_all_rules_are_sign_descent():
    """One row, betas 0, no eps: Adam, APOLLO, SMMF and GaLore all move each weight by eta."""
    W, Gs = draw(1, 12, seed=0), gradients((1, 12), 5)
    signs = W - 0.1 * sum(G.sign() for G in Gs)
    none = {"eta": 0.1, "b1": 0.0, "b2": 0.0, "eps": 0.0}
    ends = {
        "adam": adamw(W, Gs, **none, lam=0.0)[-1],
        "apollo": apollo.apollo(W, Gs, lambda epoch: ONE, apollo.Settings(**none, limiter="off"))[-1].W,
        "galore": galore.galore(W, Gs, galore.Settings(r=1, alpha=1.0, **none))[-1],
        "smmf": smmf.smmf(W, Gs, smmf.Settings(eta=0.1, beta=None, gamma=0.0, eps=0.0))[-1].W,
    }
    for name, end in ends.items():
        torch.testing.assert_close(end, signs, rtol=0, atol=1e-13, msg=name)


def test_one_row_of_apollo_without_momentum_is_adam():
    W, Gs = draw(1, 20, seed=0), gradients((1, 20), 24)
    letters = {"eta": 0.01, "b1": 0.0, "b2": 0.99, "lam": 0.1}
    adam = adamw(W, Gs, **letters, eps=0.0)[-1]
    c = apollo.Settings(**letters, eps=0.0, limiter="off")
    torch.testing.assert_close(apollo.apollo(W, Gs, lambda e: -ONE, c)[-1].W, adam, rtol=0, atol=1e-13)
    with_momentum = apollo.Settings(eta=0.01, b2=0.99, lam=0.1, eps=0.0, limiter="off")
    other = apollo.apollo(W, Gs, lambda epoch: ONE, with_momentum)[-1].W
    momentum = adamw(W, Gs, eta=0.01, b1=0.9, b2=0.99, eps=0.0, lam=0.1)[-1]
    assert (other - momentum).abs().max() > 0.01  # the sign is the gradient's, not the momentum's


def test_a_whole_basis_makes_apollo_the_rule_with_full_moments():
    """P = 1: each channel is as long as Adam's step, in the gradient's direction."""
    W, Gs = draw(7, 5, seed=0), gradients((7, 5), 12)
    identity = torch.eye(5, dtype=torch.float64)
    c = apollo.Settings(eta=0.1, eps=0.0, limiter="off")
    states = [apollo.start(W, r=5), *apollo.apollo(W, Gs, lambda epoch: identity, c)]
    m = v = torch.zeros_like(W)
    for t, G in enumerate(Gs, start=1):
        m, v = 0.9 * m + 0.1 * G, 0.999 * v + 0.001 * G * G
        adam = 0.1 * (m / (1 - 0.9**t)) / (v / (1 - 0.999**t)).sqrt()
        change = states[t].W - states[t - 1].W
        torch.testing.assert_close(change.norm(dim=1), adam.norm(dim=1), rtol=1e-11, atol=0)
        torch.testing.assert_close(change / G, (change / G)[:, :1].expand(7, 5), rtol=1e-10, atol=0)


def test_apollo_moves_in_full_rank_where_galore_moves_in_rank_r():
    W, (G,), r = torch.zeros(24, 16), gradients((24, 16), 1), 3
    P = apollo.svd_basis(G, r)
    ours = apollo.apollo(W, [G], lambda epoch: P, apollo.Settings())[0].W
    theirs = galore.galore(W, [G], galore.Settings(r=r))[0]
    ranks = [torch.linalg.matrix_rank(change, rtol=1e-10).item() for change in (ours, theirs)]
    assert ranks == [16, r]
    torch.testing.assert_close(P.abs(), galore.basis(G, r).T.abs(), rtol=1e-12, atol=1e-14)  # one basis


def test_mini_with_the_limiter_off_and_eta_over_alpha_is_the_tensor_rule():
    W, Gs = draw(9, 6, seed=0), gradients((9, 6), 10)
    P = draw(1, 6, seed=99)
    mini = apollo.mini(eta=0.01, limiter="off")
    plain = apollo.Settings(eta=0.01 * 128**0.5, scale_type="tensor", limiter="off")
    ends = [apollo.apollo(W, Gs, lambda epoch: P, c)[-1].W for c in (mini, plain)]
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-14)


def test_smmf_on_one_column_at_gamma_minus_one_divides_by_the_mean_square():
    """beta2 = 1 - 1/t makes v the plain mean of squares, to which Adam's corrected v tends as b2 nears 1."""
    W, Gs = draw(30, seed=0), gradients((30,), 15)
    c = smmf.Settings(eta=0.01, growth=1.0, gamma=-1.0, eps=0.0)
    m = torch.zeros_like(W)
    wanted = W
    for t, G in enumerate(Gs, start=1):
        m = 0.9 * m + 0.1 * G
        v = sum(g * g for g in Gs[:t]) / t
        wanted = wanted - 0.01 * m / v.sqrt()
    torch.testing.assert_close(smmf.smmf(W, Gs, c, matrix=(30, 1))[-1].W, wanted, rtol=0, atol=1e-13)
    b2 = 1 - 1e-9
    corrected = adamw(W, Gs, eta=0.01, b1=0.0, b2=b2, eps=0.0, lam=0.0)[-1]
    no_momentum = smmf.Settings(eta=0.01, beta=None, gamma=-1.0, eps=0.0)
    end = smmf.smmf(W, Gs, no_momentum, matrix=(30, 1))[-1].W
    torch.testing.assert_close(end, corrected, rtol=0, atol=1e-7)


def test_factorising_is_exact_on_rank_one_and_not_on_more():
    row, col = draw(6, seed=0).abs(), draw(4, seed=1).abs()
    for extra, exact in ((0.0, True), (1.0, False)):
        matrix = torch.outer(row, col) + extra * torch.outer(row.flip(0), col.flip(0))
        again = expand(*compress(matrix.sum(1), matrix.sum(0)))
        assert torch.allclose(again, matrix, rtol=1e-12, atol=0) is exact


@pytest.mark.parametrize("numel", [101, 96])
def test_the_eager_sweeps_of_smmf_and_adam_agree_where_smmf_keeps_everything(numel):
    """A prime number of weights is one column: SMMF's sweep then is Adam's with the same betas."""
    W, Gs = draw(numel, 1, seed=0), gradients((numel, 1), 6)
    height, width = matrix_shape(numel, policy="exact")
    adam, swept = W.clone(), W.clone()
    m, v = torch.zeros_like(W), torch.zeros_like(W)
    factors = [torch.zeros(size, dtype=W.dtype) for size in (height, width, height, width)]
    sign = torch.zeros(numel, 1, dtype=torch.uint8)
    place = Place(base=0, stride=1)
    rounding = Rounding(mode="nearest", key=0, step=torch.tensor(0.0), place=place)
    for G in Gs:
        numbers = [1, 0.9, 0.8, 0.01, 1, 1e-8, 0.99, 0.1, 2]  # active, betas, step, root, eps, keep, l2, 1/q
        updates_eager.adam(
            [
                AdamTask(
                    param=adam,
                    grad=G,
                    exp_avg=m,
                    exp_avg_sq=v,
                    coefficients=torch.tensor(numbers, dtype=W.dtype),
                    rounding=rounding,
                )
            ]
        )
        numbers = [1, 0.9, 0.8, 0.01, 0.99, 0.1, 1e-8, 2, float("inf")]
        sums = torch.empty(2 * (height + width) + 1, dtype=W.dtype)
        updates_eager.sweep(
            [
                SweepTask(
                    param=swept,
                    grad=G,
                    row_m=factors[0],
                    col_m=factors[1],
                    row_v=factors[2],
                    col_v=factors[3],
                    sign=sign,
                    packed=True,
                    coefficients=torch.tensor(numbers, dtype=W.dtype),
                    skip_zeros=True,
                    place=place,
                    sums=sums,
                    rounding=rounding,
                )
            ]
        )
        parts = sums[:-1].split([height, width, height, width])
        factors = [*compress(*parts[:2]), *compress(*parts[2:])]
    assert torch.allclose(swept, adam, rtol=0, atol=1e-13) is (width == 1)
