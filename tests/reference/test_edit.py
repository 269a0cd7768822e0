"""Laws of the EDiT twin that need no fast code; the parts are compared with it in tests/distributed."""

from dataclasses import replace

import pytest
import torch

from hardy.reference.edit import Settings, diloco, edit, local_sgd, start, weights

NAN, INF = float("nan"), float("inf")


def draw(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def model(*, seed=0):
    return [draw(3, seed=seed), draw(4, seed=seed + 1)]


def replicas(N, *, seed, around=None, size=0.1):
    A = model() if around is None else around
    return [[a + size * draw(len(a), seed=seed + 10 * i + u) for u, a in enumerate(A)] for i in range(N)]


def same(got, wanted, *, atol=1e-12):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def mean(thetas):
    return [torch.stack(unit).mean(0) for unit in zip(*thetas, strict=True)]


def run(c, *, N=3, rounds=12, spoil=lambda thetas, r: None, size=0.1):
    """Return the states of rounds from which each replica drifts off at random."""
    states = [start(model(), N=N)]
    for r in range(rounds):
        thetas = replicas(N, seed=1000 * r, around=states[-1].A, size=size)
        spoil(thetas, r)
        states.append(edit(states[-1], thetas, c))
    return states


def test_local_sgd_is_the_mean_of_the_parameters():
    thetas = replicas(4, seed=7)
    same(edit(start(model(), N=4), thetas, local_sgd()).A, mean(thetas))


def test_a_meeting_every_step_with_inner_sgd_is_synchronous_training():
    # Each replica's loss is |theta - goal_i|^2 / 2.
    goals, x, together = replicas(3, seed=5, size=2.0), start(model(), N=3), model()
    for _ in range(20):
        thetas = [[a - 0.2 * (a - g) for a, g in zip(x.A, goal, strict=True)] for goal in goals]
        x = edit(x, thetas, local_sgd())
        together = [t - 0.2 * (t - g) for t, g in zip(together, mean(goals), strict=True)]
    same(x.A, together)


def test_diloco_is_torchs_sgd_on_the_mean_pseudo_gradient():
    params = [torch.nn.Parameter(a) for a in model()]
    sgd, x = torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True), start(model(), N=3)
    for r in range(10):
        thetas = replicas(3, seed=100 * r, around=x.A)
        for param, middle in zip(params, mean(thetas), strict=True):
            param.grad = param.detach() - middle
        sgd.step()
        x = edit(x, thetas, diloco())
        same(x.A, [param.detach() for param in params])


@pytest.mark.parametrize("nesterov", [True, False])
def test_clipping_bounds_the_move(nesterov):
    c = Settings(phi=0.05, nesterov=nesterov)
    states = run(c, size=3.0, rounds=30)
    bound = c.eta_o * c.phi / (1 - c.m_o)
    moves = [
        (b - a).norm().item()
        for x, y in zip(states, states[1:], strict=False)
        for a, b in zip(x.A, y.A, strict=True)
    ]
    momenta = [B.norm().item() for x in states for B in x.B]
    assert max(moves) <= bound and max(momenta) <= c.phi / (1 - c.m_o)
    assert states[1].B[0].norm().item() == pytest.approx(c.phi, rel=1e-4)


def test_the_limits_of_the_temperature():
    thetas = replicas(4, seed=3)
    hot = edit(start(model(), N=4), thetas, local_sgd())
    G = torch.stack(
        [torch.stack([(a - t).norm() for a, t in zip(model(), theta, strict=True)]) for theta in thetas]
    )
    cold = edit(start(model(), N=4), thetas, replace(local_sgd(), T=1e-9))
    same(cold.A, [thetas[i][u] for u, i in enumerate(G.argmin(0).tolist())])
    torch.testing.assert_close(hot.w, torch.full((4, 2), 0.25, dtype=torch.float64))
    none, steps = torch.zeros(4, dtype=torch.bool), torch.arange(1, 5, dtype=torch.float64)
    for rho, wanted in ((0.0, [0.25] * 4), (1.0, [0.1, 0.2, 0.3, 0.4]), (0.5, [0.175, 0.225, 0.275, 0.325])):
        w = weights(torch.ones_like(steps), none, steps, Settings(rho=rho))
        assert w.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("relative", [True, False])
def test_permuting_replicas_changes_no_anchor_and_scaling_no_relative_weight(relative):
    c, thetas, order = Settings(relative=relative), replicas(4, seed=3, size=1.0), [2, 0, 3, 1]
    x, y = (edit(start(model(), N=4), rows, c) for rows in (thetas, [thetas[i] for i in order]))
    same(x.A, y.A)
    torch.testing.assert_close(y.w, x.w[order], rtol=0, atol=1e-14)
    far = [[a + 5 * (t - a) for a, t in zip(model(), theta, strict=True)] for theta in thetas]
    scaled = edit(start(model(), N=4), far, c)
    assert torch.allclose(scaled.w, x.w, rtol=0, atol=1e-12) == relative


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_broken_replica_is_left_out_and_back_in_the_next_round(bad):
    def spoil(thetas, r):
        if r == 3:
            thetas[1][0][2] = bad

    states = run(Settings(), N=2, spoil=spoil)
    assert states[4].w[:, 0].tolist() == [1.0, 0.0] and (states[4].w[:, 1] > 0).all()
    assert (states[5].w > 0).all()
    for x in states[1:]:
        assert all(tensor.isfinite().all() for tensor in [*x.A, *x.B])
        torch.testing.assert_close(x.w.sum(0), torch.ones(2, dtype=torch.float64))


def test_where_nobody_is_left_anchor_and_momentum_stay():
    def spoil(thetas, r):
        if r == 3:
            for theta in thetas:
                theta[0][:] = NAN

    before, after = run(Settings(), spoil=spoil)[3:5]
    assert torch.equal(after.A[0], before.A[0]) and torch.equal(after.B[0], before.B[0])
    assert not torch.equal(after.A[1], before.A[1])
    assert after.w[:, 0].tolist() == [0.0] * 3


def level(factors, *, N, W_det=5, rounds=14):
    """Return which replicas were flagged in each round when `factors(r)[i]` times the usual comes from i."""
    flagged, x = [], start([torch.zeros(3)], N=N)
    for r in range(rounds):
        D = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64) * (1 + 0.02 * (-1) ** r)
        x = edit(x, [[x.A[0] - factor * D] for factor in factors(r)], Settings(W_det=W_det))
        flagged.append(x.bad[:, 0].tolist())
    return flagged


@pytest.mark.parametrize("N", [1, 2, 3, 4])
def test_a_lasting_jump_is_accepted_after_three_rounds(N):
    got = level(lambda r: [1.0 if r < 7 else 6.0] * N, N=N)
    assert got == [[False] * N] * 7 + [[True] * N] * 3 + [[False] * N] * 4


@pytest.mark.parametrize("N", [2, 3, 4])
def test_a_single_bad_replica_never_is_accepted(N):
    got = level(lambda r: [1.0 if r < 7 else 6.0] + [1.0] * (N - 1), N=N)
    assert got == [[False] * N] * 7 + [[True] + [False] * (N - 1)] * 7


def test_statistics_are_mean_and_population_variance_of_accepted_norms():
    states = run(Settings(W_det=100), rounds=40)
    thetas = [replicas(3, seed=1000 * r, around=x.A) for r, x in enumerate(states[:-1])]
    for i in range(3):
        for u in range(2):
            G = torch.stack(
                [(x.A[u] - theta[i][u]).norm() for x, theta in zip(states[:-1], thetas, strict=True)]
            )
            s = states[-1].stats[i][u]
            assert (s.mu, s.v, s.c) == pytest.approx(
                (G.mean().item(), G.var(correction=0).item(), 40), rel=1e-12
            )
