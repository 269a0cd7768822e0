"""Laws of large steps: the paper's table, its theorems, and what must not change the answer."""

import math

import pytest
import torch

from hardy.linear.config import SolverConfig
from hardy.linear.solver import solve
from hardy.reference import perceptron as twin
from hardy.rng import generator_for

STEPPED = ("normalized_logistic", "logistic")
TABLE = {  # n: NLR for gamma 0.1, 1, 10, 100; LR for gamma 10, 100, 1e5
    100: ([110, 11, 2, 2], [55, 31, 31]),
    500: ([143, 15, 2, 2], [338, 154, 151]),
    1000: ([157, 16, 2, 2], [729, 308, 301]),
    2000: ([171, 18, 2, 2], [1563, 616, 601]),
}


def settings(method, gamma=None, **more):
    return SolverConfig(method=method, gamma=gamma if method in STEPPED else None, **more)


def found(Z, method="normalized_logistic", gamma=None, *, dtype=torch.float64, **more):
    return solve(Z, torch.ones(len(Z), 1), settings(method, gamma, **more), dtype=dtype)


def count(*args, **named):
    solution = found(*args, **named)
    assert solution.converged.all()
    return solution.num_iter.item()


def separable(seed, n=40, d=5, gap=0.2):
    generator = generator_for(seed, "separable")
    direction = torch.randn(d, generator=generator, dtype=torch.float64)
    rows = torch.randn(4 * n, d, generator=generator, dtype=torch.float64)
    distance = rows @ direction / direction.norm()
    return (rows * distance.sign()[:, None])[distance.abs() > gap][:n]


def largest_margin(Z):
    """Return nearly the largest margin, from below."""
    best = found(Z, gamma=10.0, stop="margin", max_iter=400)
    return best.min_margin.item()


@pytest.mark.parametrize(
    ("n", "dtype"), [*((n, torch.float64) for n in TABLE), (100, torch.float32), (1000, torch.float32)]
)
def test_the_papers_worst_case(n, dtype):
    Z, (normalised, plain) = twin.worst_case(n), TABLE[n]
    assert [count(Z, gamma=g, dtype=dtype) for g in (0.1, 1.0, 10.0, 100.0)] == normalised
    assert [count(Z, "logistic", g, dtype=dtype) for g in (10.0, 100.0, 1e5)] == plain
    assert count(Z, gamma=1e6, dtype=dtype) == 2
    assert count(Z, dtype=dtype) <= 20, "with the default step size"
    batch = next(k for k in range(n) if k > 0.3 * n + 0.2)
    assert count(Z, "batch_perceptron", dtype=dtype) == batch
    assert count(Z, "normalized_batch_perceptron", dtype=dtype) == 2


def test_plain_gradient_descent_needs_hundreds_where_the_normalised_one_needs_eleven():
    assert count(twin.worst_case(100), "logistic", 1.0) == 561


def test_large_steps_divided_by_their_size_are_the_batch_perceptrons():
    Z = separable(0, gap=0.02)
    limits = list(zip(range(13), twin.path(twin.bp, Z), strict=False))
    furthest = []
    for gamma in (1e1, 1e3, 1e6, 1e9):
        path = twin.path(twin.lr, Z, gamma)
        furthest.append(max((next(path) / gamma - limit).abs().max().item() for _, limit in limits))
    assert furthest == sorted(furthest, reverse=True)
    assert furthest[0] > 1e-2 and furthest[-1] < 1e-12


def test_the_loss_explodes_one_step_before_all_is_solved():
    Z = twin.two_points()
    for gamma, losses, norms in (
        (100.0, (0.693, 12.5, 0.0), (0.901, 0.7071, 0.0)),
        (10.0, (0.693, 1.289, 0.0006), None),
    ):
        solution = solve(Z, torch.ones(2, 1), settings("logistic", gamma), trace=True)
        assert solution.num_iter.tolist() == [2] and solution.converged.all()
        assert solution.trace.loss[:, 0].tolist() == pytest.approx(losses, abs=6e-4)
        assert solution.trace.misclassified[:, 0].tolist() == [2, 1, 0]
        if norms:
            assert solution.trace.gradient_norm[:, 0].tolist() == pytest.approx(norms, abs=6e-4)
    torch.testing.assert_close(
        found(Z, "logistic", 1e6).theta_CD[0] / 1e6, torch.tensor([1.0, 0.25], dtype=torch.float64)
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_theorems_bounds_hold(seed):
    Z = separable(seed)
    R, mu = Z.norm(dim=1).max().item(), largest_margin(Z)
    for method, step in twin.METHODS.items():
        for gamma in (0.1, 10.0) if method == "normalized_logistic" else (1.0,):
            if method != "logistic":
                assert count(Z, method, gamma) <= twin.most_steps(step, len(Z), R, mu, gamma)
    n = len(Z)
    default = found(Z)
    assert default.gamma == pytest.approx(2 * math.log(2 * n - 1) / R**2)
    assert default.num_iter.item() <= 2 * R**2 / mu**2


def test_no_normalised_step_is_longer_than_gamma_times_the_longest_row():
    Z = separable(1)
    R, path = Z.norm(dim=1).max(), twin.path(twin.nlr, Z, 7.0)
    thetas = torch.stack([next(path) for _ in range(50)])
    lengths = thetas.diff(dim=0).norm(dim=1)
    assert 0 < lengths.min() and lengths.max() <= 7.0 * R
    ours = [found(Z, gamma=7.0, max_iter=t).theta_CD[0] for t in (1,)]
    torch.testing.assert_close(ours[0], thetas[1])


@pytest.mark.parametrize("method", STEPPED)
def test_scaling_rows_and_step_changes_nothing_but_the_scale(method):
    Z = separable(2)
    one, other = found(Z, method, 3.0), found(8.0 * Z, method, 3.0 / 64)
    assert one.num_iter == other.num_iter
    torch.testing.assert_close(one.theta_CD, 8.0 * other.theta_CD, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", twin.METHODS)
def test_turning_the_features_turns_the_weights(method):
    Z = separable(3)
    Q, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator_for(0, "turn"), dtype=torch.float64))
    one, other = found(Z, method, 3.0), found(Z @ Q, method, 3.0)
    assert one.num_iter == other.num_iter
    torch.testing.assert_close(one.theta_CD @ Q, other.theta_CD, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", [name for name in twin.METHODS if name != "perceptron"])
def test_order_and_copies_of_rows_change_nothing(method):
    Z = separable(4)
    one = found(Z, method, 3.0)
    for other in (found(Z.flip(0), method, 3.0), found(torch.cat([Z, Z]), method, 3.0)):
        assert one.num_iter == other.num_iter
        torch.testing.assert_close(one.theta_CD, other.theta_CD, rtol=1e-10, atol=1e-10)


def test_small_steps_begin_along_the_mean_row_and_agree_with_plain_ones():
    Z = separable(5)
    mean = Z.mean(0)
    for method, factor in (("normalized_logistic", 1.0), ("logistic", 0.5)):
        theta = found(Z, method, 1e-6, max_iter=1).theta_CD[0]
        torch.testing.assert_close(theta / 1e-6, factor * mean, rtol=1e-5, atol=1e-8)


def test_the_normalised_method_tends_to_the_largest_margin_and_the_plain_one_does_not_soon():
    Z = separable(6)
    mu = largest_margin(Z)
    margins = {}
    for method in STEPPED:
        path = twin.path(twin.METHODS[method], Z, 1.0)
        theta = [next(path) for _ in range(2001)][-1]
        margins[method] = ((Z @ theta).min() / theta.norm()).item() / mu
    assert margins["normalized_logistic"] > 0.99
    assert margins["logistic"] < margins["normalized_logistic"] - 0.005


def test_weights_that_solve_two_classes_jointly_are_those_of_the_one_problem():
    Z = separable(7)
    signs = torch.where(torch.arange(len(Z)) % 2 == 0, 1.0, -1.0)[:, None]
    rows = Z * signs
    joint = solve(rows, torch.cat([signs, -signs], 1), settings("normalized_logistic", 0.5, problems="joint"))
    alone = solve(rows, signs, settings("normalized_logistic", 1.0))
    assert joint.num_iter == alone.num_iter
    torch.testing.assert_close(
        joint.theta_CD[0] - joint.theta_CD[1], alone.theta_CD[0], rtol=1e-10, atol=1e-10
    )
