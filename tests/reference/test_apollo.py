"""Laws of the APOLLO twin that need no fast code; the eager back end is compared with it in tests/ops."""

from dataclasses import replace

import pytest
import torch

from hardy.reference.apollo import Settings, apollo, factor, mini, start, step, svd_basis


def draw(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(shape, steps, *, first=1):
    return [draw(*shape, seed=first + t) for t in range(steps)]


def projection(r, d):
    return lambda epoch: draw(r, d, seed=10_000 + epoch) / r**0.5


def run(shape, r, c, Gs, *, W=None):
    return apollo(draw(*shape, seed=0) if W is None else W, Gs, projection(r, min(shape)), c)


@pytest.mark.parametrize("shape", [(64, 48), (48, 64)])
def test_the_update_has_full_rank_and_each_channel_follows_its_gradient(shape):
    (G,) = gradients(shape, 1)
    W = draw(*shape, seed=0)
    change = run(shape, 4, Settings(eta=0.1), [G], W=W)[0].W - W
    assert torch.linalg.matrix_rank(change) == 48
    ratio = change / G if shape[0] >= shape[1] else (change / G).T
    assert (ratio < 0).all()
    torch.testing.assert_close(ratio, ratio.mean(1, keepdim=True).expand_as(ratio), rtol=1e-10, atol=0)


def test_tensor_scale_has_one_factor():
    (G,) = gradients((8, 6), 1)
    W = draw(8, 6, seed=0)
    ratio = (run((8, 6), 1, mini(eta=0.1), [G], W=W)[0].W - W) / G
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-11, atol=0)


@pytest.mark.parametrize("limiter", ["reference", "corrected"])
def test_the_norm_grows_by_gamma_at_most_and_does_so_under_spikes(limiter):
    Gs = [G * (100 if t % 7 == 3 else 1) for t, G in enumerate(gradients((20, 12), 40))]
    states = run((20, 12), 4, Settings(limiter=limiter), Gs)
    growth = torch.tensor([b.nu / a.nu for a, b in zip(states, states[1:], strict=False)])
    assert growth.max() == pytest.approx(1.01, rel=1e-12)
    free = run((20, 12), 4, Settings(limiter="off"), Gs)
    assert max(b.nu / a.nu for a, b in zip(free, free[1:], strict=False)) > 1.5


def test_the_corrected_limiter_sees_the_bias_correction():
    (G,) = gradients((6, 4), 1)
    reference, corrected = (
        run((6, 4), 2, Settings(limiter=kind), [G])[0] for kind in ("reference", "corrected")
    )
    assert corrected.nu / reference.nu == pytest.approx(0.001**0.5 / 0.1, rel=1e-12)
    assert torch.equal(corrected.W, reference.W)  # there is no memory yet


@pytest.mark.parametrize("c", [Settings(eps=0.0), mini(eps=0.0)])
def test_the_scale_of_gradients_does_not_matter(c):
    Gs = gradients((9, 7), 12)
    Gs[6] = Gs[6] * 30  # the limiter acts
    large, small = (run((9, 7), 1, c, [G * size for G in Gs])[-1].W for size in (1.0, 1e-6))
    torch.testing.assert_close(small, large, rtol=0, atol=1e-13)


def test_one_row_has_the_size_of_adams_step():
    Gs, W = gradients((1, 30), 20), draw(1, 30, seed=0)
    minus_one = torch.full((1, 1), -1.0)
    states = apollo(W, Gs, lambda epoch: minus_one, Settings(eta=0.01, eps=0.0, limiter="off"))
    m = v = torch.zeros(1, 30, dtype=torch.float64)
    for t, (before, after, G) in enumerate(zip([start(W, r=1), *states], states, Gs, strict=False), start=1):
        m, v = 0.9 * m + 0.1 * G, 0.999 * v + 0.001 * G * G
        adam = 0.01 * (m / (1 - 0.9**t)) / (v / (1 - 0.999**t)).sqrt()
        torch.testing.assert_close((after.W - before.W).abs(), adam.abs(), rtol=1e-10, atol=1e-15)


def test_one_channel_makes_channel_and_tensor_the_same():
    Gs = gradients((1, 1), 5)
    channel, tensor = (run((1, 1), 1, Settings(scale_type=kind), Gs)[-1].W for kind in ("channel", "tensor"))
    assert torch.equal(channel, tensor)


@pytest.mark.parametrize("c", [Settings(eps=0.0), Settings(eps=0.0, scale_type="tensor")])
def test_a_projections_signs_do_not_matter_and_its_scale_divides_the_step(c):
    Gs, W, P = gradients((10, 8), 10), draw(10, 8, seed=0), projection(3, 8)
    signs = torch.tensor([[1.0], [-1.0], [-1.0]], dtype=torch.float64)
    plain = apollo(W, Gs, P, c)[-1].W
    torch.testing.assert_close(apollo(W, Gs, lambda e: signs * P(e), c)[-1].W, plain, rtol=0, atol=1e-15)
    longer = apollo(W, Gs, lambda e: 7.0 * P(e), c)[-1].W
    torch.testing.assert_close(longer - W, (plain - W) / 7, rtol=1e-9, atol=0)
    other = apollo(W, Gs, projection(2, 8), c)[-1].W
    assert (other - plain).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("scale_type", "r"),
    [*(("tensor", r) for r in (4, 16, 64, 128)), *(("channel", r) for r in (16, 64, 128))],
)
def test_the_factor_of_a_sketch_is_root_r_over_d_of_the_whole(scale_type, r):
    d, n, steps, ratios = 128, 256, 60, []
    whole, low = start(torch.zeros(d, n), r=d), start(torch.zeros(d, n), r=r)
    P, identity, c = projection(r, d)(0), torch.eye(d, dtype=torch.float64), Settings(eps=1e-12)
    for G in gradients((d, n), steps):
        whole, low = step(whole, G, identity, c), step(low, G, P, c)
        s_whole, s_low = (
            factor(R, x.M / (x.V.sqrt() + c.eps), channel=0, scale_type=scale_type)
            for R, x in ((G, whole), (P @ G, low))
        )
        ratios.append(s_low / s_whole)
    # The median, and not for 4 rows: the ratio of a channel then has a heavy tail.
    assert torch.cat(ratios[10:]).median().item() == pytest.approx((r / d) ** 0.5, rel=0.03)


def test_a_projection_keeps_lengths_within_the_proven_limits():
    x, r, epsilon = draw(200, seed=0), 64, 0.5
    ratios = torch.stack(
        [((projection(r, 200)(e) @ x).square().sum() / x.square().sum()) for e in range(400)]
    )
    outside = ((ratios - 1).abs() > epsilon).double().mean()
    assert outside <= 2 * torch.tensor(-r * epsilon**2 / 8).exp()
    assert ratios.mean().item() == pytest.approx(1.0, abs=4 * (2 / r / 400) ** 0.5)


def test_a_zero_first_gradient_does_not_freeze_the_weight():
    Gs = gradients((16, 12), 3)
    zero = torch.zeros(16, 12)
    late = run((16, 12), 4, Settings(), [zero, *Gs])
    usual = run((16, 12), 4, Settings(), Gs)
    assert late[0].t == 0
    for a, b in zip(late[1:], usual, strict=True):
        assert torch.equal(a.W, b.W)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_step_without_a_usable_gradient_changes_nothing(bad):
    Gs = gradients((6, 5), 4)
    spoiled = torch.zeros(6, 5) if bad == 0 else Gs[0].clone()
    spoiled[2, 3] = bad
    x = run((6, 5), 2, Settings(lam=0.1), Gs)[-1]
    assert step(x, spoiled, projection(2, 5)(0), Settings(lam=0.1)) is x


def test_decay_mode_lets_moments_and_weights_fade_and_keeps_the_limiters_memory():
    c = Settings(lam=0.1, eta=0.01, zero_grad="decay")
    x = run((6, 5), 2, c, gradients((6, 5), 4))[-1]
    after = step(x, torch.zeros(6, 5), projection(2, 5)(0), c)
    torch.testing.assert_close(after.W, x.W * (1 - 0.01 * 0.1), rtol=1e-15, atol=0)
    torch.testing.assert_close(after.M, 0.9 * x.M, rtol=1e-15, atol=0)
    assert (after.t, after.nu) == (x.t + 1, x.nu)
    assert step(x, torch.zeros(6, 5), projection(2, 5)(0), replace(c, eta=0.0)) is x  # the initialising step


def test_a_channel_without_gradient_does_not_move():
    Gs = gradients((6, 5), 3)
    for G in Gs:
        G[2] = 0
    W = draw(6, 5, seed=0)
    after = run((6, 5), 2, Settings(), Gs, W=W)[-1].W
    assert torch.equal(after[2], W[2])
    assert (after != W).sum() == 25


def test_projections_change_by_calls_skipped_ones_too_and_moments_stay():
    asked = []

    def projected(epoch):
        asked.append(epoch)
        return projection(2, 5)(epoch)

    Gs = gradients((6, 5), 7)
    Gs[1] = torch.zeros(6, 5)
    states = apollo(draw(6, 5, seed=0), Gs, projected, Settings(T=3))
    assert asked[-7:] == [0, 0, 0, 1, 1, 1, 2]
    R = Gs[3] @ projection(2, 5)(1).T
    torch.testing.assert_close(states[3].M, 0.9 * states[2].M + 0.1 * R, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
def test_the_svd_basis_is_orthonormal_leading_and_has_a_sign(shape):
    G, r = draw(*shape, seed=3), 3
    P = svd_basis(G, r)
    assert P.shape == (r, 6)
    torch.testing.assert_close(P @ P.T, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-13)
    R = G @ P.T if shape[0] >= shape[1] else P @ G
    leading = torch.linalg.svdvals(G)[:r]
    torch.testing.assert_close(torch.linalg.svdvals(R), leading, rtol=1e-12, atol=0)
    assert (P.gather(1, P.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(svd_basis(-G, r), P, rtol=0, atol=1e-12)


def test_a_whole_svd_basis_keeps_the_length_of_each_channel():
    G = draw(9, 6, seed=3)
    R = G @ svd_basis(G, 6).T
    torch.testing.assert_close(R.norm(dim=1), G.norm(dim=1), rtol=1e-13, atol=0)
