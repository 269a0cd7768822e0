"""Laws of the SMMF twin that need no fast code; the eager back end is compared with it in tests/ops."""

import math
from dataclasses import replace

import pytest
import torch

from hardy.reference.smmf import Settings, dense, factors, schedules, shape, smmf, start, step


def draw(*size, seed):
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(size, steps):
    return [draw(*size, seed=t + 1) for t in range(steps)]


def test_shapes():
    assert [shape(N) for N in (96 * 40, 33 * 35, 101, 4096, 1)] == [
        (64, 60),
        (35, 33),
        (101, 1),
        (64, 64),
        (1, 1),
    ]


def test_a_prime_number_of_weights_loses_nothing():
    Gs, c = gradients((101,), 30), Settings(lam=0.1)
    W = draw(101, seed=0)
    for x, whole in zip(smmf(W, Gs, c), dense(W, Gs, c), strict=True):
        torch.testing.assert_close(x.W, whole, rtol=0, atol=1e-15)


def test_a_rank_one_pattern_with_fixed_signs_loses_nothing_and_a_generic_one_does():
    W = draw(12, 8, seed=0)
    pattern = torch.outer(draw(12, seed=1).abs(), draw(8, seed=2).abs()) * draw(12, 8, seed=3).sign()
    sizes = draw(30, seed=4).abs()
    Gs, c = [size * pattern for size in sizes], Settings(eta=0.01)
    matrix = (12, 8)
    torch.testing.assert_close(smmf(W, Gs, c, matrix=matrix)[-1].W, dense(W, Gs, c)[-1], rtol=0, atol=1e-14)
    generic = gradients((12, 8), 30)
    apart = smmf(W, generic, c, matrix=matrix)[-1].W - dense(W, generic, c)[-1]
    assert apart.abs().max() > 0.01


def test_the_factors_keep_row_and_column_sums():
    for x in smmf(draw(9, 10, seed=0), gradients((9, 10), 20), Settings(), matrix=(10, 9)):
        for row, col, X in ((x.r_V, x.c_V, x.v), (x.r_M, x.c_M, x.m.abs())):
            again, X = torch.outer(row, col), X.reshape(10, 9)
            torch.testing.assert_close(again.sum(1), X.sum(1), rtol=1e-13, atol=0)
            torch.testing.assert_close(again.sum(0), X.sum(0), rtol=1e-13, atol=0)


def test_the_first_step_moves_every_weight_by_a_tenth_of_eta():
    W, (G,) = draw(7, 5, seed=0), gradients((7, 5), 1)
    W_new = smmf(W, [G], Settings(eta=0.01))[0].W
    torch.testing.assert_close(W - W_new, 0.01 * 0.1 * G / (G.abs() + 1e-8), rtol=1e-12, atol=0)


def largest_update(x, beta1, beta2, G):
    """The bound of the specification, 3.3, with the old factors of `x`."""
    k = torch.arange(G.numel()).view(G.shape)
    i, j = k // len(x.c_M), k % len(x.c_M)
    old_m = beta1 * x.r_M[i] * x.c_M[j]
    v = beta2 * x.r_V[i] * x.c_V[j] + (1 - beta2) * G * G
    return (old_m + (1 - beta1) * G.abs()) / v.sqrt()


def test_the_direction_is_bounded():
    Gs = [G * (1000 if t == 25 else 1) for t, G in enumerate(gradients((8, 6), 40))]
    x = start(draw(8, 6, seed=0))
    for t, G in enumerate(Gs, start=1):
        beta1, beta2 = schedules(t, Settings())
        bound = largest_update(x, beta1, beta2, G)
        x = step(x, G, Settings())
        assert (x.u.abs() <= bound * (1 + 1e-12)).all()
    # On a quiet weight the bound is (1 - beta1) t^0.4, and a spike reaches it.
    quiet = replace(start(torch.zeros(4)), t=2000)
    spike = step(quiet, torch.tensor([0.0, 1e3, 0.0, 0.0]), Settings())
    assert spike.u.abs().max().item() == pytest.approx((1 - 0.9 * 0.999**2000) * 2001**0.4, rel=1e-9)
    assert spike.u.abs().max().item() == pytest.approx(18.37, abs=0.005)
    clamped = step(quiet, torch.tensor([0.0, 1e3, 0.0, 0.0]), Settings(max_update=10.0))
    assert clamped.u.abs().max().item() == 10.0


@pytest.mark.parametrize("c", [Settings(eps=0.0), Settings(eps=0.0, beta=None)])
def test_the_scale_of_gradients_does_not_matter(c):
    W, Gs = draw(6, 7, seed=0), gradients((6, 7), 20)
    large, small = (smmf(W, [G * size for G in Gs], c)[-1].W for size in (1.0, 1e-5))
    torch.testing.assert_close(small, large, rtol=0, atol=1e-13)


def test_only_the_flat_order_matters():
    W, Gs = draw(6, 10, seed=0), gradients((6, 10), 10)
    matrix = smmf(W, Gs, Settings())[-1].W
    flat = smmf(W.flatten(), [G.flatten() for G in Gs], Settings())[-1].W
    cube = smmf(W.view(3, 2, 10), [G.view(3, 2, 10) for G in Gs], Settings())[-1].W
    assert torch.equal(matrix.flatten(), flat)
    assert torch.equal(matrix.flatten(), cube.flatten())


def test_rows_that_get_no_gradient_stay_with_the_mask_and_drift_upwards_without():
    W = torch.zeros(24, 10)  # matrix 16 x 15: a matrix row holds parts of two tensor rows
    Gs = gradients((24, 10), 300)
    for G in Gs:
        G[::2] = 0
    masked = smmf(W, Gs, Settings(eta=0.001))[-1].W
    assert (masked[::2] == 0).all()
    assert (masked[1::2] != 0).all()
    published = smmf(W, Gs, Settings(eta=0.001, mask=False))[-1].W
    assert (published[::2] > 0).all()  # the fault that the mask is for
    aligned = torch.zeros(16, 16)
    Gs = gradients((16, 16), 50)
    for G in Gs:
        G[::2] = 0
    assert (smmf(aligned, Gs, Settings(mask=False))[-1].W[::2] == 0).all()  # whole matrix rows: no drift


def test_no_momentum_is_a_momentum_of_zero():
    W, Gs = draw(6, 7, seed=0), gradients((6, 7), 10)
    none, zero = (smmf(W, Gs, Settings(beta=beta))[-1].W for beta in (None, 0.0))
    assert torch.equal(none, zero)


def test_the_dense_recursion_is_what_a_column_does():
    W, Gs, c = draw(60, seed=0), gradients((60,), 15), Settings(lam=0.1, decay="l2", max_update=0.5)
    column = smmf(W, Gs, c, matrix=(60, 1))[-1].W
    torch.testing.assert_close(column, dense(W, Gs, c)[-1], rtol=0, atol=1e-15)


def test_schedules_of_the_specification():
    c = Settings()
    for t, beta1 in ((1, 0.900), (100, 0.815), (1000, 0.331), (2000, 0.122), (5000, 0.006)):
        assert schedules(t, c)[0] == pytest.approx(beta1, abs=5e-4)
    for t, beta2 in ((1, 0.0), (2, 0.426), (3, 0.585), (10, 0.842), (100, 0.975), (1000, 0.9960)):
        assert schedules(t, c)[1] == pytest.approx(beta2, abs=5e-4)
    assert schedules(100, replace(c, gamma=-0.5))[1] == pytest.approx(0.900, abs=5e-4)
    assert schedules(10**6, replace(c, beta1_floor=0.3))[0] == 0.3


def test_the_initialising_step_changes_nothing():
    x = start(draw(4, 5, seed=0))
    assert step(x, torch.zeros(4, 5), Settings(eta=0.0, lam=0.1)) is x
    counted = step(x, torch.zeros(4, 5), Settings())
    assert counted.t == 1
    assert torch.equal(counted.W, x.W)
    assert not any(factor.any() for factor in (counted.r_M, counted.c_M, counted.r_V, counted.c_V))


def test_factors_of_nothing_have_no_nan():
    i, j = torch.arange(6) // 2, torch.arange(6) % 2
    row, col = factors(torch.zeros(6), i, j, torch.zeros(3), torch.zeros(2))
    assert not row.any()
    assert not col.any()


def test_average_regret_falls_at_least_like_the_root_of_time():
    """Random linear losses in a box, learning rate 1 / sqrt(t), as in the convergence proofs of Adam."""
    n, horizon, seeds = 24, 1024, 5
    marks = [64, 256, 1024]
    regrets = torch.zeros(len(marks), dtype=torch.float64)
    for seed in range(seeds):
        drift = 0.3 * draw(n, seed=50 + seed)
        noise = draw(horizon, n, seed=100 + seed)
        x, lost, total = start(torch.zeros(n, dtype=torch.float64)), 0.0, torch.zeros(n, dtype=torch.float64)
        for t in range(1, horizon + 1):
            g = drift + noise[t - 1]
            lost, total = lost + (g @ x.W).item(), total + g
            x = step(x, g, Settings(eta=1.0 / t**0.5))
            x = replace(x, W=x.W.clamp(-1, 1))
            if t in marks:
                regrets[marks.index(t)] += (lost + total.abs().sum().item()) / t / seeds
    slopes = (regrets[1:] / regrets[:-1]).log() / math.log(4)
    assert (regrets > 0).all()
    assert (slopes < -0.45).all()
    assert (slopes > -0.9).all()  # not 1 / t: a bound on the rate, and the test measures it
