"""From measured times of micro-batches to coefficients: non-negative least squares of the relative error.

Letters: t = c + sum of (a s^2 + b s) over the sequences of a micro-batch; a, b, c at least 0.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hardy.balance.cost import Floats, LengthCostModel, SchemeCost
from hardy.balance.plan import Scheme
from hardy.config import UserError

MOST_ERROR = 0.08
"""Relative root mean square from which a fit is refused."""
FEWEST = 4
"""Measurements of one scheme, for three coefficients."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One micro-batch that was run."""

    scheme: Scheme
    lengths: tuple[int, ...]
    time: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Coefficients of one scheme and how well they fit."""

    scheme: Scheme
    a: float
    b: float
    c: float
    error: float
    """Root mean square of the relative error on the measurements."""
    held_out_error: float
    """The same where each measurement is predicted from the others."""
    worst: float
    """Largest relative error on the measurements."""
    measurements: int


def non_negative_least_squares(matrix: Floats, target: Floats) -> Floats:
    """Return x >= 0 with the least |matrix x - target|, by trying every set of positive unknowns: few only.

    Example:
        >>> found = non_negative_least_squares(np.array([[1.0, 1.0], [1.0, 2.0]]), np.array([3.0, 1.0]))
        >>> found.round(9).tolist()
        [2.0, 0.0]
    """
    size = matrix.shape[1]
    scale: Floats = np.asarray(np.maximum(np.abs(matrix).max(axis=0), 1e-300), dtype=np.float64)
    best, best_left = np.zeros(size), float(target @ target)
    for count in range(1, size + 1):
        for chosen in itertools.combinations(range(size), count):
            columns = list(chosen)
            part: Floats = np.asarray(matrix[:, columns] / scale[columns], dtype=np.float64)
            found: Floats = np.asarray(np.linalg.lstsq(part, target, rcond=None)[0], dtype=np.float64)
            left: Floats = part @ found - target
            if (found >= 0).all() and float(left @ left) < best_left * (1 - 1e-12):
                best, best_left = np.zeros(size), float(left @ left)
                best[columns] = found / scale[columns]
    return best


def fit_scheme(measured: Sequence[Measurement]) -> Fit:
    """Return the coefficients of one scheme.

    Raises:
        UserError: too few measurements, the error is too large, or attention seems to cost nothing.
    """
    scheme = measured[0].scheme
    if len({each.lengths for each in measured}) < FEWEST:
        raise UserError(
            f"{scheme}: a fit needs at least {FEWEST} different micro-batches, got {len(measured)}"
        )
    if min(each.time for each in measured) <= 0:
        raise UserError(f"{scheme}: every measured time must be above 0")
    rows = np.array([_features(each) for each in measured])
    times = np.array([each.time for each in measured])
    weighted, ones = rows / times[:, None], np.ones(times.size)
    a, b, c = non_negative_least_squares(weighted, ones).tolist()
    errors = weighted @ np.array([a, b, c]) - 1
    held_out = [
        float(weighted[k] @ non_negative_least_squares(np.delete(weighted, k, axis=0), ones[1:]) - 1)
        for k in range(times.size)
    ]
    fit = Fit(
        scheme=scheme,
        a=a,
        b=b,
        c=c,
        error=float(np.sqrt(np.mean(errors**2))),
        held_out_error=float(np.sqrt(np.mean(np.square(held_out)))),
        worst=float(np.abs(errors).max()),
        measurements=times.size,
    )
    if fit.error > MOST_ERROR:
        raise UserError(
            f"{scheme}: the fit is off by {fit.error:.1%} (limit {MOST_ERROR:.0%}): the machine was busy or "
            f"its pace changes; measure again with more repeats, or leave the shortest lengths out"
        )
    if fit.a == 0:
        raise UserError(f"{scheme}: no quadratic part was found; measure longer sequences")
    return fit


def fit_cost(
    measured: Sequence[Measurement],
    *,
    cap_tokens: int,
    facts: Sequence[tuple[str, str]] = (),
    unit: str = "ms",
) -> tuple[LengthCostModel, list[Fit]]:
    """Return the cost model of what was measured, and the fit of every scheme.

    Args:
        measured: micro-batches of one or more schemes.
        cap_tokens: most tokens that fit on one rank.
        facts: where they were measured.
        unit: of the times.
    """
    schemes = sorted({each.scheme for each in measured})
    fits = [fit_scheme([each for each in measured if each.scheme == scheme]) for scheme in schemes]
    costs = tuple(
        SchemeCost(scheme=fit.scheme, a=fit.a, b=fit.b, c=fit.c, cap_tokens=cap_tokens * fit.scheme.context)
        for fit in fits
    )
    return LengthCostModel(schemes=costs, unit=unit, facts=tuple(facts)), fits


def with_degrees(cost: LengthCostModel, degrees: Sequence[int], *, communication: float) -> LengthCostModel:
    """Return the model with context-parallel degrees that were not measured, derived from one rank's cost.

    Args:
        cost: with the scheme of one rank.
        degrees: to be had; those that were measured stay.
        communication: share by which any context parallelism makes a sequence dearer (assumed).
    """
    alone = cost.of(Scheme())
    known = {own.scheme for own in cost.schemes}
    derived = [
        SchemeCost(
            scheme=Scheme(context=degree),
            a=alone.a / degree * (1 + communication),
            b=alone.b / degree * (1 + communication),
            c=alone.c,
            cap_tokens=alone.cap_tokens * degree,
        )
        for degree in degrees
        if Scheme(context=degree) not in known
    ]
    facts = (*cost.facts, ("derived", ", ".join(str(own.scheme) for own in derived) or "none"))
    return LengthCostModel(schemes=(*cost.schemes, *derived), unit=cost.unit, facts=facts)


def _features(measured: Measurement) -> tuple[float, float, float]:
    return float(sum(s * s for s in measured.lengths)), float(sum(measured.lengths)), 1.0
