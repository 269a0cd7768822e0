"""Costs fitted to a run's own steps: the true coefficients come back; few steps only change the scale."""

import numpy as np
import pytest

from hardy.balance.cost import LengthCostModel, SchemeCost
from hardy.balance.plan import Scheme
from hardy.balance.refit import Work, refitted, rescaled

ALONE, BOTH = Scheme(), Scheme(context=2)


def cost(*, a=1.0, b=1.0, c=1.0):
    schemes = tuple(SchemeCost(scheme=s, a=a, b=b, c=c, cap_tokens=100) for s in (ALONE, BOTH))
    return LengthCostModel(schemes=schemes, unit="GFLOP")


def works(scheme, count, *, a, b, c):
    """Return steps that take exactly what these coefficients say, in ms."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        lengths, batches = generator.integers(1, 50, 6), int(generator.integers(1, 4))
        squares, tokens = float((lengths**2).sum()), float(lengths.sum())
        seconds = 1e-3 * (a * squares + b * tokens + c * batches)
        one = Work(
            scheme=scheme, squares=squares, tokens=tokens, micro_batches=batches, seconds=float(seconds)
        )
        found.append(one)
    return found


def test_the_true_coefficients_come_back_and_a_rare_scheme_is_scaled():
    steps = works(ALONE, 20, a=0.5, b=3.0, c=7.0)
    found = refitted(cost(), steps)
    alone, both = found.of(ALONE), found.of(BOTH)
    assert found.unit == "ms"
    assert (alone.a, alone.b, alone.c) == pytest.approx((0.5, 3.0, 7.0), rel=1e-6)
    assert both.a == both.b == both.c
    ratios = [1e3 * step.seconds / step.cost(cost().of(ALONE)) for step in steps]
    assert both.a == pytest.approx(np.median(ratios))
    assert alone.cap_tokens == 100


def test_with_too_few_steps_only_the_scale_changes():
    found = refitted(cost(), works(ALONE, 7, a=2.0, b=2.0, c=2.0)).of(ALONE)
    assert (found.a, found.b, found.c) == pytest.approx((2.0, 2.0, 2.0))


def test_new_coefficients_that_predict_worse_are_not_taken():
    # One step of a hundred times the usual pace would bend a fit of relative errors; the scale is a median.
    steps = works(ALONE, 9, a=1.0, b=1.0, c=1.0)
    steps[0] = Work(scheme=ALONE, squares=4.0, tokens=2.0, micro_batches=1, seconds=1e-5)
    found = refitted(cost(), steps).of(ALONE)
    assert (found.a, found.b, found.c) == pytest.approx((1.0, 1.0, 1.0), rel=0.2)


def test_rescaling_multiplies_all():
    found = rescaled(cost(a=1.0, b=2.0, c=3.0), 10.0).of(BOTH)
    assert (found.a, found.b, found.c) == (10.0, 20.0, 30.0)


def test_every_micro_batch_pays_its_constant():
    work = Work(scheme=ALONE, squares=5.0, tokens=7.0, micro_batches=3, seconds=1.0)
    assert work.cost(cost(a=10.0, b=100.0, c=1.0).of(ALONE)) == 753.0
