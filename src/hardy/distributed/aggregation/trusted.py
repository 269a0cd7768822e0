"""Rules that trust one gradient, that of a small clean batch, or the norms that gradients usually have.

Papers: X. Cao et al., "FLTrust", NDSS 2021; C. Xie et al., "Zeno++", ICML 2020; S. Prakash, A. S.
Avestimehr, "Mitigating Byzantine Attacks in Federated Learning" (DiverseFL), 2020.
Letters: g_i row, g_v trusted gradient.

Differs from the papers: FLTrust, Zeno++ and DiverseFL see all rows of a step against one trusted gradient
(Zeno++ takes one gradient at a time, DiverseFL has a trusted gradient of each worker).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from hardy.config import ConfigError, NonNegativeFloat, PositiveFloat, Range
from hardy.distributed.aggregation.rule import Weighing, WeightRule
from hardy.distributed.aggregation.view import View

MOST_STRETCH = 1e30
"""A row that must be made longer than this times counts as zeros: in fp32 the product overflows."""


@dataclass(frozen=True, kw_only=True)
class TrustedRule(WeightRule):
    """Base of rules that compare each row with the trusted gradient.

    Args:
        on_bad_validation: when that gradient is 0 or not finite: "fallback" takes the trimmed mean of rows
            mixed with their nearest neighbours, "skip" leaves the step out.
        on_empty: when no row is accepted: "validation" takes the trusted gradient, "skip" leaves it
            out.
    """

    needs_reference: ClassVar[bool] = True
    is_self_reported: ClassVar[bool] = True
    on_bad_validation: Literal["fallback", "skip"] = "fallback"
    on_empty: Literal["validation", "skip"] = "validation"

    def least_rows(self, num_faulty: int) -> int:
        """Return f + 1: each row is judged by itself."""
        return num_faulty + 1

    def weigh(self, view: View, num_faulty: int, state: Mapping[str, Any]) -> Weighing:
        """Return the weights, where the trusted gradient is good."""
        if 0 < view.reference_square < math.inf:
            return self.weigh_against(view, state)
        instead = "fallback" if self.on_bad_validation == "fallback" else "nothing"
        return Weighing(weights_n=None, instead=instead, state=state, metrics={"bad_validation": 1.0})

    def weigh_against(self, view: View, state: Mapping[str, Any]) -> Weighing:
        """Return the weights against a trusted gradient that is finite and not 0."""
        raise NotImplementedError

    def average(
        self,
        view: View,
        shares_n: Tensor,
        factors_n: Tensor,
        *,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any],
    ) -> Weighing:
        """Return the average of the rows times factors by shares; with no share, what is taken then."""
        shares_n = shares_n.double()
        if self.uses_sample_weights:
            shares_n = shares_n * view.sample_weights_n
        accepted = [int(place) for place in shares_n.nonzero()[:, 0]]
        metrics = {**metrics, "accepted": accepted, "empty": float(not accepted)}
        if accepted:
            return Weighing(weights_n=factors_n * shares_n / shares_n.sum(), state=state, metrics=metrics)
        instead = "reference" if self.on_empty == "validation" else "nothing"
        return Weighing(weights_n=None, instead=instead, state=state, metrics=metrics)


@dataclass(frozen=True, kw_only=True)
class FLTrust(TrustedRule):
    """Each row brought to the trusted norm, by the cosine between the two; others count nothing."""

    name: ClassVar[str] = "fltrust"
    uses_sample_weights: ClassVar[bool] = True

    def weigh_against(self, view: View, state: Mapping[str, Any]) -> Weighing:
        """Return the weights."""
        factors_n = _to_trusted_norm(view)
        cosines_n = factors_n * view.trusted_dots_n / view.reference_square
        return self.average(view, cosines_n.clamp(min=0), factors_n, state=state, metrics={})


@dataclass(frozen=True, kw_only=True)
class ZenoPlusPlus(TrustedRule):
    """Rows brought to the trusted norm, g', are accepted when <v, g'> - rho ||g'||^2 >= -epsilon.

    Args:
        rho: how much a long row must gain.
        epsilon: how much a row may lose.
    """

    name: ClassVar[str] = "zeno_plus_plus"
    rho: NonNegativeFloat = 0.0
    epsilon: NonNegativeFloat = 0.0

    def weigh_against(self, view: View, state: Mapping[str, Any]) -> Weighing:
        """Return the weights."""
        factors_n = _to_trusted_norm(view)
        gains_n = factors_n * view.trusted_dots_n - self.rho * factors_n.square() * view.squares_n
        return self.average(view, gains_n >= -self.epsilon, factors_n, state=state, metrics={})


@dataclass(frozen=True, kw_only=True)
class DiverseFL(TrustedRule):
    """The mean of rows that point the trusted way and are not much shorter or longer than it.

    Args:
        shortest: the ratio of norms must be above this.
        longest: and below this.
    """

    name: ClassVar[str] = "diversefl"
    shortest: NonNegativeFloat = 0.5
    longest: Annotated[float, Range(above=0)] = 2.0

    def __post_init__(self) -> None:
        """Check the settings, and that there are norms between."""
        super().__post_init__()
        if self.longest <= self.shortest:
            raise ConfigError(
                f"diversefl.longest={self.longest:g} must be above diversefl.shortest={self.shortest:g}"
            )

    def weigh_against(self, view: View, state: Mapping[str, Any]) -> Weighing:
        """Return the weights."""
        ratios_n = (view.squares_n / view.reference_square).sqrt()
        accepted_n = (view.trusted_dots_n > 0) & (ratios_n > self.shortest) & (ratios_n < self.longest)
        return self.average(view, accepted_n, torch.ones_like(ratios_n), state=state, metrics={})


def _to_trusted_norm(view: View) -> Tensor:
    """Return what brings each row to the trusted norm; 0 for a row of zeros, or as good as that."""
    factors_n = stretches(view)
    return torch.where(factors_n < MOST_STRETCH, factors_n, 0.0)


def stretches(view: View) -> Tensor:
    """Return how many times as long as each row the trusted gradient is."""
    return (view.reference_square / view.squares_n).sqrt()


@dataclass(frozen=True, kw_only=True)
class NormClip(WeightRule):
    """The mean of rows, those longer than `norm` shortened to it.

    Args:
        norm: the longest that a row may be; none is the lower median of the rows' norms.
    """

    name: ClassVar[str] = "norm_clip"
    is_self_reported: ClassVar[bool] = True
    norm: PositiveFloat | None = None

    def weigh(self, view: View, num_faulty: int, state: Mapping[str, Any]) -> Weighing:
        """Return the weights."""
        norms_n = view.norms_n
        longest = _lower_median(norms_n) if self.norm is None else torch.tensor(self.norm)
        factors_n = torch.where(norms_n > longest, longest / norms_n, 1.0)
        return Weighing(weights_n=factors_n / view.num_rows, metrics={"clip_norm": float(longest)})


@dataclass(frozen=True, kw_only=True)
class NormScreen(WeightRule):
    """The mean of rows that are at most `factor` times as long as the lower median of their norms.

    Args:
        factor: see there.
    """

    name: ClassVar[str] = "norm_screen"
    is_self_reported: ClassVar[bool] = True
    factor: Annotated[float, Range(least=1, below=math.inf)] = 2.0

    def weigh(self, view: View, num_faulty: int, state: Mapping[str, Any]) -> Weighing:
        """Return the weights."""
        kept_n = view.norms_n <= self.factor * _lower_median(view.norms_n)
        return Weighing(weights_n=kept_n / kept_n.sum().double(), metrics={"accepted": _places(kept_n)})


def _lower_median(values_n: Tensor) -> Tensor:
    return values_n.sort().values[(len(values_n) - 1) // 2]


def _places(kept_n: Tensor) -> list[int]:
    return [int(place) for place in kept_n.nonzero()[:, 0]]
