"""The solver against its twin, alone and with rows spread over workers; refusals; stop rules."""

import math

import pytest
import torch

from hardy.config import UserError
from hardy.distributed.comm import Alone
from hardy.distributed.simulation import SimWorld
from hardy.linear.config import SolverConfig
from hardy.linear.solver import solve
from hardy.reference import perceptron as twin
from hardy.rng import generator_for

STEPPED = ("normalized_logistic", "logistic")


def drawn(n=40, d=5, *, name="rows", gap=0.3):
    """Return rows z that a hidden direction separates with a gap."""
    generator = generator_for(0, name, n, d)
    direction = torch.randn(d, generator=generator, dtype=torch.float64)
    rows = torch.randn(3 * n, d, generator=generator, dtype=torch.float64)
    distance = rows @ direction / direction.norm()
    rows = rows * distance.sign()[:, None]
    return rows[distance.abs() > gap][:n]


def ones(rows):
    return torch.ones(len(rows), 1)


def settings(method, gamma=None, **more):
    return SolverConfig(method=method, gamma=gamma if method in STEPPED else None, **more)


@pytest.mark.parametrize("gamma", [0.1, 10.0, 1e6])
@pytest.mark.parametrize("method", twin.METHODS)
def test_every_step_is_the_twins(method, gamma):
    Z = drawn()
    thetas = list(zip(range(8), twin.path(twin.METHODS[method], Z, gamma), strict=False))
    for t, theta in thetas[1:]:
        seen = solve(Z, ones(Z), settings(method, gamma, max_iter=t), trace=True)
        if seen.num_iter < t:
            break
        # The best weights need not be the last; the trace tells of the last.
        assert seen.trace.misclassified[t, 0] == (Z @ theta <= 0).sum()
        torch.testing.assert_close(seen.trace.min_margin[t, 0], (Z @ theta).min() / theta.norm())
        if method in STEPPED:
            s = torch.sigmoid(-(Z @ theta))
            assert seen.trace.loss[t, 0].item() == pytest.approx(twin.loss(Z, theta))
            torch.testing.assert_close(seen.trace.gradient_norm[t, 0], twin.gradient(Z, theta).norm())
            if s.square().sum() > 0:
                torch.testing.assert_close(seen.trace.effective_rows[t, 0], s.sum() ** 2 / s.square().sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", twin.METHODS)
def test_the_separating_weights_are_the_twins(method, dtype):
    Z = drawn()
    theta, count = twin.separate(twin.METHODS[method], Z, gamma=1.0)
    found = solve(Z, ones(Z), settings(method, 1.0), dtype=dtype)
    assert found.num_iter.tolist() == [count] and found.converged.tolist() == [True]
    torch.testing.assert_close(
        found.theta_CD[0].double(), theta, rtol=1e-3 if dtype == torch.float32 else 1e-10, atol=1e-6
    )
    assert found.num_misclassified.tolist() == [0]
    torch.testing.assert_close(
        found.min_margin[0].double(), (Z @ theta).min() / theta.norm(), rtol=1e-3, atol=1e-5
    )


def test_signs_times_features_are_the_rows():
    Z = drawn()
    signs = torch.where(torch.arange(len(Z)) % 3 == 0, -1, 1)[:, None]
    assert torch.equal(solve(Z * signs, signs).theta_CD, solve(Z, ones(Z)).theta_CD)


def test_problems_side_by_side_are_as_alone():
    rows = drawn()
    others = torch.where(torch.stack([rows[:, 0] > 0.3, torch.arange(len(rows)) < 20], 1), 1.0, -1.0)
    signs = torch.cat([ones(rows), others], 1)
    config = SolverConfig(max_iter=300)
    together = solve(rows, signs, config)
    assert len(set(together.num_iter.tolist())) > 1, "one ends before the others"
    for k in range(3):
        alone = solve(rows, signs[:, k : k + 1], config)
        torch.testing.assert_close(together.theta_CD[k], alone.theta_CD[0], rtol=1e-9, atol=1e-9)
        for name in ("num_iter", "num_misclassified", "converged"):
            assert getattr(together, name)[k] == getattr(alone, name)[0]


@pytest.mark.parametrize("method", twin.METHODS)
@pytest.mark.parametrize("problems", ["separate", "joint"])
def test_rows_spread_over_workers_change_nothing(method, problems):
    Z = drawn(42)
    signs = torch.where(torch.arange(42)[:, None] % 3 == torch.arange(3), 1, -1)
    rows = torch.cat([Z, torch.eye(3, dtype=torch.float64)[torch.arange(42) % 3]], 1)
    weights = 1.0 + torch.arange(42) % 2
    config = settings(method, 3.0, max_iter=30, problems=problems)
    whole = solve(rows, signs, config, weights_N=weights, trace=True)
    parts = [slice(0, 5), slice(5, 6), slice(6, 42), slice(42, 42)]

    def body(comm):
        part = parts[comm.rank]
        return solve(rows[part], signs[part], config, weights_N=weights[part], workers=comm, trace=True)

    found = SimWorld(4).run(body)
    for other in [*found, solve(rows, signs, config, weights_N=weights, workers=Alone(), trace=True)]:
        torch.testing.assert_close(other.theta_CD, whole.theta_CD, rtol=1e-12, atol=1e-12)
        assert torch.equal(other.num_iter, whole.num_iter)
        assert torch.equal(other.num_misclassified, whole.num_misclassified)
        torch.testing.assert_close(other.trace.loss, whole.trace.loss, equal_nan=True, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other.margin_upper, whole.margin_upper, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(found[0].theta_CD, other.theta_CD) for other in found)


def test_local_normalisers_would_be_far_off():
    Z = drawn(42)
    _, theta, second = (theta for _, theta in zip(range(3), twin.path(twin.nlr, Z, 3.0), strict=False))
    local = torch.stack([twin.nlr(part, theta, 1, 3.0) for part in (Z[:5], Z[5:6], Z[6:])]).mean(0)
    assert (local - second).norm() > 0.1 * (second - theta).norm()


def test_a_fault_at_one_worker_is_refused_by_all():
    rows = torch.ones(4, 2)
    rows[3, 1] = math.nan

    def body(comm):
        with pytest.raises(UserError, match="features hold NaN or Inf in 1 rows"):
            solve(rows[2 * comm.rank :][:2], torch.ones(2, 1), workers=comm)
        return True

    assert SimWorld(2).run(body) == [True, True]


@pytest.mark.parametrize("look_every", [1, 7, 10])
def test_looking_seldom_changes_nothing(look_every):
    Z = drawn()
    signs = torch.cat([ones(Z), torch.where(torch.arange(len(Z))[:, None] < 5, 1.0, -1.0)], 1)
    often = solve(Z, signs, SolverConfig(gamma=0.1, max_iter=105, look_every=1))
    seldom = solve(Z, signs, SolverConfig(gamma=0.1, max_iter=105, look_every=look_every))
    assert often.converged[0]
    for name in ("theta_CD", "num_iter", "min_margin", "margin_upper"):
        assert torch.equal(getattr(often, name), getattr(seldom, name))


def test_weights_are_repetitions_and_zero_is_absence():
    Z = drawn(20)
    weights = torch.tensor([0.0, 1.0, 3.0, 2.0] * 5)
    repeated = Z.repeat_interleave(weights.long(), 0)
    for method in ("normalized_logistic", "logistic", "batch_perceptron", "normalized_batch_perceptron"):
        config = settings(method, 0.3, max_iter=25)
        a, b = solve(Z, ones(Z), config, weights_N=weights), solve(repeated, ones(repeated), config)
        torch.testing.assert_close(a.theta_CD, b.theta_CD, rtol=1e-11, atol=1e-11)
        assert a.num_iter.tolist() == b.num_iter.tolist()
    assert solve(Z, ones(Z), weights_N=weights).gamma == solve(repeated, ones(repeated)).gamma


def test_a_row_of_weight_0_is_neither_missed_nor_has_a_margin():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    found = solve(rows, torch.ones(2, 1), weights_N=torch.tensor([1.0, 0.0]))
    assert found.converged.tolist() == [True] and found.min_margin.tolist() == [1.0]


def test_data_that_nothing_separates_keeps_the_best_and_a_certificate():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.5, 1.0], [0.4, 1.0]])
    found = solve(rows, torch.ones(4, 1), SolverConfig(max_iter=400))
    assert (found.converged.tolist(), found.num_misclassified.tolist()) == ([False], [1])
    assert found.num_iter.tolist() == [400]
    assert 0 < found.margin_upper.item() < 0.1


def test_the_certificates_enclose_the_largest_margin_and_beat_the_theorem():
    Z = drawn(60, 6, gap=0.05)
    best = solve(Z, ones(Z), SolverConfig(gamma=1.0, stop="margin", patience=400))
    assert 1 <= best.margin_upper / best.min_margin < 1.1
    R, checked = Z.norm(dim=1).max().item(), 0
    for method in twin.METHODS:
        for steps in (1, 3, 5):
            found = solve(Z, ones(Z), settings(method, 0.1, max_iter=steps))
            if found.converged:
                continue
            checked += 1
            assert found.min_margin <= best.margin_upper and best.min_margin <= found.margin_upper
            # The bound on the steps, solved for the margin.
            theorem = math.sqrt(twin.most_steps(twin.METHODS[method], len(Z), R, 1.0, 0.1) / steps)
            assert found.margin_upper <= theorem
    assert checked >= 10


def test_the_margin_rule_goes_on_to_the_largest_margin():
    Z = drawn()
    first, last = (solve(Z, ones(Z), SolverConfig(gamma=1.0, stop=stop)) for stop in ("separated", "margin"))
    assert first.num_iter < last.num_iter < 10_000
    assert first.min_margin < 0.9 * last.min_margin
    assert last.converged and last.num_misclassified == 0
    patient = solve(Z, ones(Z), SolverConfig(gamma=1.0, stop="margin", patience=1000))
    assert patient.num_iter > last.num_iter + 900
    assert patient.min_margin > 0.98 * patient.margin_upper
    hasty = solve(Z, ones(Z), SolverConfig(gamma=1.0, stop="margin", tol=10.0))
    assert hasty.num_iter < last.num_iter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.float16])
def test_other_dtypes_are_computed_in_fp32(dtype):
    rows = torch.tensor([[2, -1], [-1, -3]]).to(dtype)
    found = solve(rows, torch.tensor([[1], [-1]]))
    assert found.theta_CD.dtype == torch.float32 and found.converged


@pytest.mark.parametrize("method", STEPPED)
def test_margins_of_any_size_make_finite_steps(method):
    Z = drawn()
    found = solve(1e4 * Z, ones(Z), settings(method, 1e6, max_iter=300), dtype=torch.float32, trace=True)
    assert found.theta_CD.isfinite().all() and found.converged
    far = solve(
        drawn(gap=2.0), ones(drawn(gap=2.0)), SolverConfig(gamma=1e6, stop="margin"), dtype=torch.float32
    )
    assert far.theta_CD.isfinite().all() and far.min_margin > 2


@pytest.mark.parametrize(
    ("rows", "signs", "weights", "text"),
    [
        ([[math.inf, 0.0], [1.0, 1.0]], [[1], [1]], None, "features hold NaN or Inf in 1 rows"),
        ([[1.0, 0.0], [0.0, 0.0]], [[1], [1]], None, "1 rows are all zeros"),
        ([[1.0]], [[0]], None, "signs must be +1 or -1, those of 1 rows are not"),
        ([[1.0]], [[1]], [-1.0], "weights must be finite and not negative, 1 are not"),
        ([[1.0]], [[1]], [0.0], "there are no rows, or all have weight 0"),
        ([[1.0]], [[1], [1]], None, "features and signs must be tables with a row for each other"),
        ([[1.0]], [[1]], [1.0, 1.0], "weights must be one number for each of 1 rows"),
    ],
)
def test_what_cannot_work_is_refused(rows, signs, weights, text):
    weights = None if weights is None else torch.tensor(weights)
    with pytest.raises(UserError) as error:
        solve(torch.tensor(rows), torch.tensor(signs), weights_N=weights)
    assert str(error.value).startswith(text)


def test_a_joint_problem_wants_one_right_class():
    with pytest.raises(UserError, match="wants one \\+1 among the signs of each row, 2 have none or several"):
        solve(torch.ones(2, 1), torch.tensor([[1, 1], [-1, -1]]), SolverConfig(problems="joint"))


def test_weights_that_overflow_are_refused():
    with pytest.raises(UserError, match="makes weights that torch.float32 cannot hold"):
        solve(torch.tensor([[1e30], [2e30]]), torch.ones(2, 1), SolverConfig(gamma=1e30))


def test_a_length_that_overflows_is_no_fault_of_its_row():
    rows = torch.tensor([[1e200, 1e200], [1e200, math.nan]], dtype=torch.float64)
    with pytest.raises(UserError, match="features hold NaN or Inf in 1 rows"):
        solve(rows, torch.ones(2, 1))


def test_one_row_takes_one_step():
    found = solve(torch.tensor([[3.0, 4.0]]), torch.tensor([[-1]]))
    assert found.num_iter.tolist() == [1] and found.min_margin.item() == pytest.approx(5)
