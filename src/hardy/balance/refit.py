"""Costs fitted again to the steps of a run: what workers computed and how long they took.

Paper: Hydraulis (arXiv 2412.07894). Letters as in `cost`: a worker's step takes the sum over its
micro-batches of c + sum of (a s^2 + b s).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hardy.balance.cost import Floats, LengthCostModel, SchemeCost
from hardy.balance.fit import non_negative_least_squares
from hardy.balance.plan import Scheme

FEWEST = 8
"""Steps of workers under one scheme from which its three coefficients are fitted."""
SECONDS_PER_UNIT = {"ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one worker computed in one step under one scheme."""

    scheme: Scheme
    squares: float
    """Sum of s^2 over its sequences."""
    tokens: float
    """Sum of s."""
    micro_batches: int
    seconds: float
    """How long it took, above 0."""

    def cost(self, own: SchemeCost) -> float:
        """Return what these coefficients predict."""
        return own.a * self.squares + own.b * self.tokens + own.c * self.micro_batches


def refitted(cost: LengthCostModel, works: Sequence[Work]) -> LengthCostModel:
    """Return costs in ms that predict what was measured.

    A scheme with enough steps gets new coefficients, where these are closer to its steps than a common
    factor; the others are multiplied by the median of measured over predicted time.

    Args:
        cost: what predicted so far, in any unit.
        works: what was measured; at least one.

    Example:
        >>> old = LengthCostModel(schemes=(SchemeCost(scheme=Scheme(), a=0.0, b=1.0, c=0.0, cap_tokens=8),))
        >>> work = Work(scheme=Scheme(), squares=4.0, tokens=4.0, micro_batches=1, seconds=0.02)
        >>> refitted(old, [work]).of(Scheme()).b
        5.0
    """
    ratios = [1e3 * work.seconds / work.cost(cost.of(work.scheme)) for work in works]
    common = float(np.median(ratios))
    return replace(rescaled(cost, common), schemes=tuple(_better(own, common, works) for own in cost.schemes))


def rescaled(cost: LengthCostModel, factor: float) -> LengthCostModel:
    """Return costs in ms, all multiplied by `factor`."""
    return replace(cost, schemes=tuple(_times(own, factor) for own in cost.schemes), unit="ms")


def _times(own: SchemeCost, factor: float) -> SchemeCost:
    return replace(own, a=own.a * factor, b=own.b * factor, c=own.c * factor)


def _better(own: SchemeCost, common: float, works: Sequence[Work]) -> SchemeCost:
    """Return new coefficients of one scheme."""
    scaled = _times(own, common)
    mine = [work for work in works if work.scheme == own.scheme]
    if len(mine) < FEWEST:
        return scaled
    times: Floats = np.array([1e3 * work.seconds for work in mine])
    rows: Floats = (
        np.array([(work.squares, work.tokens, work.micro_batches) for work in mine]) / times[:, None]
    )
    a, b, c = non_negative_least_squares(rows, np.ones(times.size)).tolist()
    if a + b == 0:
        return scaled
    fitted = replace(own, a=a, b=b, c=c)
    return min((fitted, scaled), key=lambda found: _off(rows, found))


def _off(rows: Floats, own: SchemeCost) -> float:
    """Return the median relative error."""
    return float(np.median(np.abs(rows @ np.array([own.a, own.b, own.c]) - 1)))
