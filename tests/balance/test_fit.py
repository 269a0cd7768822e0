"""Fits of measured times."""

import numpy as np
import pytest

from hardy.balance.fit import Measurement, fit_cost, fit_scheme, non_negative_least_squares, with_degrees
from hardy.balance.plan import Scheme
from hardy.config import UserError

ROWS = [(64,), (64,) * 8, (128,), (128,) * 4, (256,), (256, 256), (512,), (1024,)]


def measured(a, b, c, *, noise=0.0, scheme=None):
    rng = np.random.default_rng(0)
    return [
        Measurement(
            scheme=scheme or Scheme(),
            lengths=row,
            time=(a * sum(s * s for s in row) + b * sum(row) + c) * (1 + noise * rng.standard_normal()),
        )
        for row in ROWS
    ]


def test_exact_times_give_their_coefficients():
    fit = fit_scheme(measured(3e-4, 0.02, 5.0))
    assert (fit.a, fit.b, fit.c) == pytest.approx((3e-4, 0.02, 5.0))
    assert fit.error < 1e-9 and fit.held_out_error < 1e-9 and fit.measurements == 8


def test_noise_shows_in_the_errors_and_held_out_is_larger():
    fit = fit_scheme(measured(3e-4, 0.02, 5.0, noise=0.03))
    assert 0.005 < fit.error < fit.held_out_error < 0.08
    assert fit.worst >= fit.error


@pytest.mark.parametrize(
    ("points", "text"),
    [
        (measured(3e-4, 0.02, 5.0, noise=0.4), "off by .*limit 8%.*measure again"),
        (measured(0.0, 0.02, 5.0), "no quadratic part.*longer sequences"),
        (measured(3e-4, 0.02, 5.0)[:3], "at least 4 different"),
        ([Measurement(scheme=Scheme(), lengths=row, time=0.0) for row in ROWS], "above 0"),
    ],
)
def test_bad_fits_are_refused(points, text):
    with pytest.raises(UserError, match=text):
        fit_scheme(points)


def test_non_negative_least_squares_is_scipys():
    optimize = pytest.importorskip("scipy.optimize", reason="to compare with")
    rng = np.random.default_rng(1)
    for _ in range(40):
        matrix, target = rng.standard_normal((7, 3)), rng.standard_normal(7)
        assert non_negative_least_squares(matrix, target) == pytest.approx(
            optimize.nnls(matrix, target)[0], abs=1e-9
        )


def test_schemes_are_fitted_apart_and_others_derived():
    points = measured(3e-4, 0.02, 5.0) + measured(2e-4, 0.01, 6.0, scheme=Scheme(context=2))
    cost, fits = fit_cost(points, cap_tokens=2048, facts=[("model_hash", "abc")])
    assert [fit.scheme for fit in fits] == [Scheme(), Scheme(context=2)]
    assert cost.of(Scheme(context=2)).cap_tokens == 4096 and dict(cost.facts)["model_hash"] == "abc"
    more = with_degrees(cost, [1, 2, 4], communication=0.1)
    assert more.of(Scheme(context=2)) == cost.of(Scheme(context=2))
    four = more.of(Scheme(context=4))
    assert (four.a, four.b, four.c) == pytest.approx((3e-4 / 4 * 1.1, 0.02 / 4 * 1.1, 5.0))
    assert four.cap_tokens == 8192 and dict(more.facts)["derived"] == "cp4"
