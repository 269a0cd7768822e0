import math
import random

import pytest
import torch

from hardy.reference.adaptive import Decay, Guard, adamw, perf_exp_decay


def draw(*size, seed):
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_adamw_is_torchs():
    W, gs = draw(5, 4, seed=0), [draw(5, 4, seed=t) for t in range(1, 21)]
    param = torch.nn.Parameter(W.clone())
    torch_adam = torch.optim.AdamW([param], lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for g, got in zip(gs, adamw(W, gs, eta=0.02, b1=0.8, b2=0.95, eps=1e-6, lam=0.1), strict=True):
        param.grad = g
        torch_adam.step()
        torch.testing.assert_close(got, param.detach(), rtol=0, atol=1e-14)


# ---- GradGuard ---------------------------------------------------------------------------------------------


def with_norm(norm, *, seed=0):
    """Two gradients whose common norm is `norm`."""
    gs = [draw(3, seed=seed), draw(2, 2, seed=seed + 1)]
    size = math.sqrt(sum(g.square().sum().item() for g in gs))
    return [g * (norm / size) for g in gs]


def test_the_applied_norm_keeps_both_limits_and_the_history_grows_slowly():
    guard, rng = Guard(max_norm=3.0, warmup=5), random.Random(0)
    for t in range(300):
        n = rng.lognormvariate(0, 1) * (1000 if t % 31 == 30 else 1)
        old, (guard, c, skip) = guard, guard.see(with_norm(n))
        assert not skip
        limit = min(3.0, 2 * old.gam) if old.count >= 5 else 3.0
        assert c * n <= limit * (1 + 1e-12)
        assert c == 1 or c * n == pytest.approx(limit, rel=1e-12)
        if old.count >= 50:
            assert guard.gam <= old.gam * 1.02 * (1 + 1e-12)
    assert guard.count == 300
    assert 0 < guard.clipped < 300


def test_the_history_is_a_mean_first_and_fades_later():
    guard = Guard(max_norm=None, beta=0.5)
    for n in (1.0, 3.0):
        guard, c, _ = guard.see(with_norm(n))
        assert c == 1.0
    assert guard.gam == pytest.approx(2.0)
    guard, _, _ = guard.see(with_norm(4.0))
    assert guard.gam == pytest.approx(3.0)  # beta 1/2 from the second on; the mean would be 8/3


def test_history_remembers_clipped_norms():
    guard, c, _ = Guard(max_norm=1.0).see(with_norm(10.0))
    assert (c, guard.gam, guard.clipped) == (pytest.approx(0.1), pytest.approx(1.0), 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_and_changes_no_history(bad):
    guard, _, _ = Guard().see(with_norm(0.5))
    spoiled = with_norm(0.5)
    spoiled[1][0, 0] = bad
    after, c, skip = guard.see(spoiled)
    assert (c, skip) == (1.0, True)
    assert (after.gam, after.count, after.skipped, after.run) == (guard.gam, guard.count, 1, 1)
    assert after.see(with_norm(0.5))[0].run == 0


def test_a_zero_gradient_is_not_remembered():
    guard, _, _ = Guard().see(with_norm(0.5))
    after, c, skip = guard.see([torch.zeros(3)])
    assert (after, c, skip) == (guard, 1.0, False)


# ---- PerfExpDecay ------------------------------------------------------------------------------------------


def curve(d, t, final):
    return d.eta_0 * final ** ((t - d.w) / (d.T - d.w))


def test_by_time_alone_it_is_the_slow_exponential():
    d = Decay(eta_0=0.1, T=200, w=20, mode="time")
    etas = perf_exp_decay([1.0] * 200, d)
    assert etas[:20] == pytest.approx([0.1 * t / 20 for t in range(1, 21)], rel=1e-14)
    for t in range(21, 201):
        assert etas[t - 1] == pytest.approx(curve(d, t, 0.3), rel=1e-12)
    flat = perf_exp_decay([1.0] * 200, Decay(eta_0=0.1, T=200, w=0, mode="time", final_slow=1.0))
    assert flat == [0.1] * 200


@pytest.mark.parametrize("better", ["min", "max"])
def test_improving_by_the_target_follows_the_slow_curve(better):
    d = Decay(eta_0=1.0, T=100, w=10, better=better)
    metrics = [(0.995 if better == "min" else 1.0051) ** t for t in range(100)]
    for t, eta in enumerate(perf_exp_decay(metrics, d), start=1):
        assert t <= 10 or eta == pytest.approx(curve(d, t, 0.3), rel=1e-12)


def test_a_metric_that_stands_still_follows_the_fast_curve_from_the_second_observation():
    d = Decay(eta_0=1.0, T=110, w=10, interval=5)
    etas = perf_exp_decay([2.0] * 110, d)
    k_slow, k_fast = (-math.log(final) / 100 for final in (0.3, 0.01))
    for t in range(11, 111):  # the second interval ends with step 20
        slow = min(t, 20) - 10
        C = slow * k_slow + (t - 10 - slow) * k_fast
        assert etas[t - 1] == pytest.approx(max(math.exp(-C), 0.01), rel=1e-12)


def test_a_late_mean_acts_later():
    d = Decay(eta_0=1.0, T=110, w=10, interval=5, delay=3)
    etas, prompt = (perf_exp_decay([2.0] * 110, x) for x in (d, Decay(eta_0=1.0, T=110, w=10, interval=5)))
    first_apart = next(t for t in range(110) if etas[t] != prompt[t]) + 1
    assert first_apart == 21
    falls = [math.log(a / b) for a, b in zip(etas, etas[1:], strict=False)]
    assert falls[21] == pytest.approx(falls[12])  # steps 22 and 23: still slow
    assert falls[22] > 1.5 * falls[21]  # step 24 is the first after 20 + 3


def test_the_rate_stays_between_the_curves_and_never_rises_whatever_the_metric():
    rng = random.Random(1)
    for _ in range(20):
        d = Decay(eta_0=0.5, T=80, w=rng.randrange(10), interval=rng.randrange(1, 6), delay=rng.randrange(4))
        metrics = [rng.choice([rng.gauss(0, 1), rng.random(), 0.0, math.nan, math.inf]) for _ in range(80)]
        etas = perf_exp_decay(metrics, d)
        for t in range(d.w + 1, 81):
            assert curve(d, t, 0.01) * (1 - 1e-12) <= etas[t - 1] <= curve(d, t, 0.3) * (1 + 1e-12)
        assert all(b <= a for a, b in zip(etas[d.w :], etas[d.w + 1 :], strict=False))


def test_plateau_halves_after_patience_and_then_waits():
    d = Decay(eta_0=1.0, T=100, w=0, mode="plateau", patience=2, cooldown=2)
    metrics = [3.0, 2.0, 2.0, 1.9999, 0.0, 5.0, 1.0, 1.0, 1.0, 1.0]
    # Best 2.0; two that do not beat it by 0.1 %: half. Two are ignored, 0.0 among them. Then 1.0 is best.
    assert perf_exp_decay(metrics, d) == pytest.approx([1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25])
