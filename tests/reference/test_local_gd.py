import itertools
import math
from functools import partial

import numpy
import pytest
import torch

from hardy.distributed.local.averaging import Anchored
from hardy.distributed.local.drift import drift as engine_drift
from hardy.reference import local_gd as gd

SKEWED = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


def draw(*size, seed):
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- Regression --------------------------------------------------------------------------------------------


def regression(*, sizes=(2, 3, 4), d=30, seed=0, p=None, common=True):
    """Rows with a shift on each node; targets of one truth, or of another on each node, with noise."""
    truths = draw(len(sizes), d, seed=seed + 1)
    As = [draw(n, d, seed=seed + 10 + i) + 0.5 * draw(d, seed=seed + 20 + i) for i, n in enumerate(sizes)]
    if common:
        return gd.nodes(As, [A @ truths[0] for A in As], p=p)
    return gd.nodes(As, [A @ w + 0.1 * draw(len(A), seed=3) for A, w in zip(As, truths, strict=True)], p=p)


def step_size(x, *, times=1.0):
    H = x.Z.mT @ x.Z / x.n.double()[:, None, None]
    return times / torch.linalg.eigvalsh(H).max().item()


def local_squares(x, L, *, times=1.0):
    return gd.fit if L is None else partial(gd.squares, eta=step_size(x, times=times), L=L)


@pytest.mark.parametrize("p", [None, SKEWED], ids=["equal", "skewed"])
@pytest.mark.parametrize("times", [1.0, 1.8])
@pytest.mark.parametrize("L", [1, 7, 60, None])
def test_regression_ends_at_the_interpolator_nearest_to_the_start(L, times, p):
    x, w_0 = regression(p=p), draw(30, seed=5)
    goal = gd.interpolator(w_0, x)
    assert (x.Z @ goal - x.b).abs().max() < 1e-12
    last = gd.run(w_0, x, local_squares(x, L, times=times), rounds=1500 if L == 1 else 400)[-1]
    assert relative(last, goal) < 1e-12
    assert relative(gd.interpolator(torch.zeros(30, dtype=torch.float64), x), goal) > 0.1, "start counts"


@pytest.mark.parametrize("p", [None, SKEWED], ids=["equal", "skewed"])
@pytest.mark.parametrize("times", [1.0, 1.9])
@pytest.mark.parametrize("L", [1, 4, 20, None])
def test_the_error_shrinks_by_the_predicted_rate(L, times, p):
    x, w_0 = regression(p=p, sizes=(4, 4, 4)), draw(30, seed=5)
    goal, local = gd.interpolator(w_0, x), local_squares(x, L, times=times)
    rho = gd.rate(x, eta=step_size(x, times=times), L=L)
    # Made long again, and kept in the row space: or rounding would rule before the slowest part does.
    row_space, error, ratio = torch.linalg.pinv(x.rows) @ x.rows, w_0 - goal, 0.0
    for _ in range(500):
        after = row_space @ (gd.run(goal + error, x, local, rounds=1)[0] - goal)
        ratio = (after.norm() / error.norm()).item()
        assert ratio <= rho + 1e-9
        error = after / after.norm()
    assert ratio == pytest.approx(rho, abs=5e-4)


def test_more_local_steps_never_worsen_the_rate_and_end_at_exact_solves():
    for seed in range(5):
        x = regression(seed=seed)
        rates = [gd.rate(x, eta=step_size(x), L=L) for L in (1, 2, 5, 20, 100, 10_000)]
        exact = gd.rate(x)
        assert all(b <= a + 1e-12 for a, b in itertools.pairwise(rates))
        assert rates[0] - exact > 0.01
        assert rates[-1] == pytest.approx(exact, abs=1e-3)
        assert rates[-1] >= exact - 1e-12


def test_without_a_common_fit_only_one_step_a_round_reaches_least_squares():
    x = regression(sizes=(20, 20, 20), d=5, common=False)
    goal = torch.linalg.lstsq(x.rows, x.b.reshape(-1, 1)).solution[:, 0]
    off = {}
    for L in (1, 10, 100):
        last = gd.run(torch.zeros(5), x, local_squares(x, L), rounds=600)[-1]
        off[L] = relative(last, goal)
    assert off[1] < 1e-12
    assert off[100] > off[10] > 0.05


def test_an_exact_fit_is_the_end_of_many_steps():
    x, w = regression(), draw(30, seed=5)
    torch.testing.assert_close(
        gd.squares(w, x, eta=step_size(x), L=20_000), gd.fit(w, x), rtol=1e-9, atol=1e-9
    )
    one = gd.nodes([x.Z[0, :2]], [x.b[0, :2]])
    v = gd.fit(w, one)[0]
    torch.testing.assert_close(one.Z[0] @ v, one.b[0])
    null = torch.linalg.svd(one.Z[0]).Vh[2:]
    torch.testing.assert_close(null @ v, null @ w)  # so no nearer point fits


# ---- Classification ----------------------------------------------------------------------------------------


def separable():
    """The problem of experiments/local_steps."""
    rng = numpy.random.default_rng(0)
    w_true, Zs = rng.normal(size=60), []
    for _ in range(4):
        shift = 2 * rng.normal(size=60)
        X = rng.normal(size=(6, 60)) + shift
        Zs.append(torch.from_numpy(numpy.sign(X @ w_true)[:, None] * X))
    return gd.nodes(Zs)


def small(*, sizes=(3, 3, 3), d=12, p=None, seed=0):
    """Rows of another separable problem."""
    Zs, truth = [], draw(d, seed=seed)
    for i, n in enumerate(sizes):
        X = draw(n, d, seed=seed + 1 + i) + draw(d, seed=seed + 50 + i)
        Zs.append((X @ truth).sign()[:, None] * X)
    return gd.nodes(Zs, p=p)


def descend(w, Zs, p, *, eta, steps):
    """Plain gradient descent on sum_i p_i f_i by autograd."""
    w = w.clone().requires_grad_()
    for _ in range(steps):
        f = sum(p_i * torch.nn.functional.softplus(-(Z @ w)).mean() for p_i, Z in zip(p, Zs, strict=True))
        (gradient,) = torch.autograd.grad(f, w)
        w = (w - eta * gradient).detach().requires_grad_()
    return w.detach()


def test_local_steps_are_gradient_descent_on_the_nodes_own_loss():
    x, w = small(sizes=(1, 3, 5)), draw(12, seed=9)
    v = gd.logistic(w, x, eta=0.3, L=25)
    for i, n in enumerate((1, 3, 5)):
        torch.testing.assert_close(v[i], descend(w, [x.Z[i, :n]], [1.0], eta=0.3, steps=25))
    r = regression()
    v = gd.squares(w_0 := draw(30, seed=9), r, eta=0.05, L=25)
    for i, n in enumerate((2, 3, 4)):
        u = w_0
        for _ in range(25):
            u = u - 0.05 / n * r.Z[i, :n].T @ (r.Z[i, :n] @ u - r.b[i, :n])
        torch.testing.assert_close(v[i], u)


def test_one_node_and_equal_nodes_are_gradient_descent():
    Z, w = small().Z[0], draw(12, seed=9)
    local = partial(gd.logistic, eta=0.3, L=7)
    one, four = gd.nodes([Z]), gd.nodes([Z] * 4)
    alone = [w]
    for _ in range(5):
        alone.append(local(alone[-1], one)[0])
    for x in (one, four):  # not to the last bit: some processors sum the products of one and of four apart
        for a, b in zip(gd.run(w, x, local, rounds=5), alone[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(alone[-1], descend(w, [Z], [1.0], eta=0.3, steps=35))


def test_one_step_a_round_is_central_gradient_descent():
    x, w = small(sizes=(1, 3, 5), p=SKEWED), draw(12, seed=9)
    Zs = [x.Z[i, :n] for i, n in enumerate((1, 3, 5))]
    last = gd.run(w, x, partial(gd.logistic, eta=0.5, L=1), rounds=40)[-1]
    torch.testing.assert_close(last, descend(w, Zs, SKEWED.tolist(), eta=0.5, steps=40))
    f = sum(p * torch.nn.functional.softplus(-(Z @ w)).mean() for p, Z in zip(SKEWED, Zs, strict=True))
    assert gd.loss(w, x) == pytest.approx(f.item(), rel=1e-14)


def test_what_counts_is_eta_times_steps_times_rounds():
    x, zero = separable(), torch.zeros(60)
    w_hat = gd.svm(x)
    assert 1 / w_hat.norm().item() == pytest.approx(2.06082, abs=5e-6)
    curves = {
        (total, L): gd.run(zero, x, partial(gd.logistic, eta=total / L, L=L), rounds=200)
        for total, L in ((0.2, 10), (0.2, 50), (2.0, 100), (0.2, 1))
    }
    for k in (10, 100, 200):
        gaps = [gd.cosgap(curves[0.2, L][k - 1], w_hat) for L in (10, 50)]
        assert gaps[0] == pytest.approx(gaps[1], rel=0.01)
        assert gd.cosgap(curves[2.0, 100][k - 1], w_hat) < gaps[0] / 2
    for (total, L), ws in curves.items():
        assert L == 1 or 0.235 < gd.loss(ws[-1], x) * total * 200 < 0.265


def test_the_mean_of_exact_solves_is_feasible_and_not_the_max_margin():
    x = separable()
    w_hat, ws = gd.svm(x), gd.run(torch.zeros(60), x, gd.project, rounds=120)
    gaps = [gd.cosgap(w, w_hat) for w in ws]
    assert [gaps[0], gaps[9], gaps[99]] == pytest.approx([0.0541, 6.30e-3, 1.99e-3], rel=0.02)
    assert gaps[119] == pytest.approx(gaps[99], rel=1e-3)
    found = gd.feasibility(ws[-1], x)
    assert found.separable and found.min_margin >= 0.999 and found.disagreement < 1e-3


def test_anchored_exact_solves_reach_the_max_margin_with_an_angle_like_one_over_k():
    x, zero = small(), torch.zeros(12, dtype=torch.float64)
    ws, w_hat = gd.run(zero, x, gd.project, rounds=900, anchor=zero), gd.svm(x)
    angles = [math.sqrt(2 * gd.cosgap(ws[k - 1], w_hat)) for k in (100, 300, 900)]
    assert angles[0] / angles[1] == pytest.approx(3, rel=0.1)
    assert angles[1] / angles[2] == pytest.approx(3, rel=0.1)
    assert relative(ws[-1], w_hat) < 0.01
    slow = gd.run(zero, x, gd.project, rounds=300, anchor=zero, a=lambda k: 1 / math.sqrt(k + 1))
    assert gd.cosgap(slow[-1], w_hat) > 10 * gd.cosgap(ws[299], w_hat)


def test_anchored_exact_solves_reach_the_point_nearest_to_any_anchor():
    x, anchor = small(), draw(12, seed=4)
    nearest = gd.project(anchor, gd.nodes([x.rows]), sweeps=100_000)[0]
    last = gd.run(torch.zeros(12), x, gd.project, rounds=500, anchor=anchor)[-1]
    assert relative(last, nearest) < 0.01 < relative(nearest, gd.svm(x))


def test_anchored_iterates_are_infeasible_until_rescaled():
    x, zero = separable(), torch.zeros(60, dtype=torch.float64)
    ws = gd.run(zero, x, gd.project, rounds=100, anchor=zero)
    margins = [(x.rows @ ws[k - 1]).min().item() for k in (10, 100)]
    assert margins == [pytest.approx(-0.0094, abs=1e-4), pytest.approx(0.845, abs=1e-3)]
    assert gd.cosgap(ws[99], gd.svm(x)) == pytest.approx(1.67e-4, rel=0.02)
    assert (x.rows @ (ws[-1] / margins[1])).min() >= 1 - 1e-12


def test_an_anchor_without_pull_is_the_mean_and_one_node_is_pulled_to_its_projection():
    x, w, zero = small(), draw(12, seed=9), torch.zeros(12, dtype=torch.float64)
    plain = gd.run(w, x, gd.project, rounds=5)
    free = gd.run(w, x, gd.project, rounds=5, anchor=zero, a=lambda k: 0.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, free, strict=True))
    one, last = gd.nodes([x.Z[0]]), w
    for k, w_k in enumerate(gd.run(w, one, gd.project, rounds=5, anchor=zero), start=1):
        torch.testing.assert_close(w_k, (1 - 1 / (k + 1)) * gd.project(last, one)[0])
        last = w_k


# ---- Projections -------------------------------------------------------------------------------------------


def nearest_by_trying(w, Z):
    """The projection on {v : Z v >= 1}, by trying which rows are tight."""
    found = []
    for count in range(len(Z) + 1):
        for tight in itertools.combinations(range(len(Z)), count):
            T = Z[list(tight)]
            v = w + torch.linalg.pinv(T) @ (1 - T @ w) if count else w
            if (Z @ v).min() >= 1 - 1e-10:
                found.append(v)
    return min(found, key=lambda v: (v - w).norm())


@pytest.mark.parametrize("seed", range(6))
def test_a_projection_is_the_nearest_point_with_all_margins(seed):
    x, w = small(sizes=(1, 4, 3), seed=seed), draw(12, seed=seed + 7)
    v = gd.project(w, x, sweeps=5000)
    for i, n in enumerate((1, 4, 3)):
        torch.testing.assert_close(v[i], nearest_by_trying(w, x.Z[i, :n]), rtol=0, atol=1e-9)
    torch.testing.assert_close(gd.project(v[0], gd.nodes([x.Z[0, :1]]))[0], v[0])


def proximal(c, Z, log_lam):
    """argmin f(w) + lam/2 |w - c log(1/lam)|^2 over log(1/lam), by bisection of one dual variable a time."""
    t, Q, own = -log_lam, (Z @ Z.T).tolist(), (Z @ c).tolist()
    n = len(own)
    a = [0.0] * n
    for _ in range(200):
        for j in range(n):
            rest = own[j] + sum(Q[j][i] * a[i] for i in range(n) if i != j)
            low, high = -2000.0, 50.0  # of log a_j
            for _ in range(60):
                middle = (low + high) / 2
                u = t * (rest + Q[j][j] * math.exp(middle))
                log_sigma = -max(u, 0.0) - math.log1p(math.exp(-abs(u)))
                low, high = (middle, high) if middle + math.log(n * t) - t < log_sigma else (low, middle)
            a[j] = math.exp(low)
    return c + Z.T @ torch.tensor(a, dtype=torch.float64)


def test_a_projection_is_the_limit_of_a_local_problem_whose_proximal_term_vanishes():
    Z, c = draw(3, 6, seed=1), 0.3 * draw(6, seed=10)
    limit = gd.project(c, gd.nodes([Z]))[0]
    assert relative(c, limit) > 0.5
    off = [relative(proximal(c, Z, -k * math.log(10)), limit) for k in (2, 8, 32, 128)]
    assert all(b < 0.6 * a for a, b in itertools.pairwise(off))
    assert off[-1] < 0.01


def test_a_row_of_zeros_is_refused():
    Z = draw(3, 4, seed=0)
    Z[1] = 0
    with pytest.raises(ValueError, match="row 1 of node 1 is zero: no weights give it a margin of 1; leave"):
        gd.project(torch.zeros(4, dtype=torch.float64), gd.nodes([draw(3, 4, seed=1), Z]))


def test_data_that_cannot_be_separated_are_said_not_to_be():
    x = gd.nodes([torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])])
    last = gd.run(torch.zeros(2), x, gd.project, rounds=50)[-1]
    found = gd.feasibility(last, x)
    assert not found.separable
    assert (found.min_margin, found.disagreement) == (pytest.approx(0), pytest.approx(1))


def test_the_max_margin_direction_by_hand_and_small_angles_are_not_lost():
    x = gd.nodes([torch.tensor([[2.0, 1.0]]), torch.tensor([[2.0, -1.0]])])
    torch.testing.assert_close(gd.svm(x), torch.tensor([0.5, 0.0], dtype=torch.float64))
    u = torch.tensor([3.0, 3e-9], dtype=torch.float64)
    assert gd.cosgap(u, gd.svm(x)) == pytest.approx(0.5e-18, rel=1e-6)
    assert gd.cosgap(torch.tensor([0.0, 1.0], dtype=torch.float64), gd.svm(x)) == pytest.approx(1)


# ---- Nodes and averages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["logistic", "project", "squares", "fit"])
def test_nodes_together_are_nodes_one_by_one_whatever_their_sizes(rule):
    x, w = small(sizes=(1, 5, 0), p=SKEWED), draw(12, seed=9)
    local = getattr(gd, rule)
    if rule in ("logistic", "squares"):
        local = partial(local, eta=0.01, L=30)
    v = local(w, x)
    for i, n in enumerate((1, 5)):
        torch.testing.assert_close(v[i], local(w, gd.nodes([x.Z[i, :n]]))[0], rtol=0, atol=1e-12)
        assert not torch.equal(v[i], w)
    assert torch.equal(v[2], w), "a node without rows stays"


def test_a_node_that_is_not_finite_is_left_out_and_the_others_make_up_for_it():
    v = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [3.0, 6.0], [0.0, math.inf]], dtype=torch.float64)
    p = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    torch.testing.assert_close(gd.mean(v, p), torch.tensor([2.5, 5.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="none of 2 nodes has finite weights left to average; take a small"):
        gd.mean(v[[1, 3]], torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("p", [[0.5, 0.6], [1.5, -0.5], [1.0]])
def test_weights_that_are_none_are_refused(p):
    with pytest.raises(ValueError, match="weights of 2 nodes must be 2 numbers >= 0 of sum 1, got"):
        gd.nodes([draw(1, 2, seed=0)] * 2, p=torch.tensor(p))


@pytest.mark.parametrize("anchors", ["zeros", "initial"])
def test_the_engines_anchored_rule_does_the_same(anchors):
    x, w = small(), draw(12, seed=9)
    anchor = w if anchors == "initial" else torch.zeros_like(w)
    rule, A = Anchored(anchors), w
    for w_k in gd.run(w, x, gd.project, rounds=6, anchor=anchor):
        D = A - gd.mean(gd.project(A, x), x.p)
        A = A - rule.finish(0, D, A)
        rule.commit()
        torch.testing.assert_close(A, w_k, rtol=0, atol=1e-13)


def test_drift_by_hand_and_as_the_engine_measures_it():
    w = torch.tensor([1.0, 1.0], dtype=torch.float64)
    v = w + torch.tensor([[4.0, 3.0], [4.0, -3.0]], dtype=torch.float64)
    found = gd.drift(v, w, torch.tensor([0.5, 0.5], dtype=torch.float64))
    expected = gd.Drift(mean_cosine=0.8, min_cosine=7 / 25, dispersion=9 / 16, norm_ratio=1.0)
    assert vars(found) == pytest.approx(vars(expected))
    v, w = draw(3, 8, seed=0), draw(8, seed=1)
    mine, theirs = gd.drift(v, w, SKEWED), engine_drift(w - v, SKEWED)
    got = {name: value.item() for name, value in vars(theirs).items()}
    assert [*got.values()] == pytest.approx([*vars(mine).values()])
    assert 1 < mine.norm_ratio and -1 < mine.min_cosine < mine.mean_cosine < 1
