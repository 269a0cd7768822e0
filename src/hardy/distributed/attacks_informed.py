"""Attacks of colluding workers that see the honest workers' gradients.

Papers: ALIE, Baruch et al. 2019; IPM, Xie et al. 2020; Fang et al. 2020; min-max and min-sum, Shejwalkar and
Houmansadr 2021. Identical is ours.
Letters: N rows, f of them attackers, H honest rows x_i, mu their mean, sigma their unbiased standard
deviation of each column, p direction, gamma how far along it.

Differs from the papers: gamma of min-max and min-sum is the root of a quadratic, not found by bisection.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, Literal

import torch
from torch import Tensor

from hardy.config import Range
from hardy.distributed.attacks_stage import (
    Attack,
    Chunk,
    Finite,
    Stage,
    deviation_of,
    dot,
    safe_ratio,
)

FEASIBLE = 1 - 1e-4
"""Of the largest step that a bound allows: what rounding adds stays inside."""


@dataclass(kw_only=True)
class Ipm(Attack):
    """Inner product manipulation: -strength x mu.

    Example:
        >>> rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
        >>> Ipm(strength=0.5)([rows], attackers=[2])
        >>> rows[2]
        tensor([-1.0000, -1.5000])
    """

    needs = "honest"
    strength: Finite = 0.5
    """epsilon: 0.5 hides among the honest, 10 is crude."""

    def play(self, stage: Stage) -> None:
        """Write -strength mu."""
        stage.write(lambda chunk: -self.strength * stage.honest_rows(chunk).mean(0))


@dataclass(kw_only=True)
class Alie(Attack):
    """A little is enough: mu - z sigma, so near the mean that honest rows lie farther out."""

    needs = "honest"
    z: Finite | None = None
    """Standard deviations from the mean; none takes the paper's, by the numbers of workers and attackers."""
    sign: Literal[-1, 1] = -1
    """On which side of the mean."""

    def play(self, stage: Stage) -> None:
        """Write mu + sign z sigma."""
        z = alie_z(len(stage.blocks[0]), len(stage.attackers)) if self.z is None else self.z

        def shifted(chunk: Chunk) -> Tensor:
            rows_Hc = stage.honest_rows(chunk)
            return rows_Hc.mean(0) + self.sign * z * deviation_of(rows_Hc)

        stage.write(shifted)


def alie_z(num_rows: int, num_attackers: int) -> float:
    """Return the paper's z: within it lie so many honest rows that the attackers and the rest are a majority.

    Where the attackers are a majority by themselves they count as if they needed one row.

    Example:
        >>> round(alie_z(20, 8), 4)
        0.6745
    """
    honest = num_rows - num_attackers
    wanted = max(num_rows // 2 + 1 - num_attackers, 1)
    share = (honest - wanted) / honest
    return NormalDist().inv_cdf(share) if share > 0.5 else 0.0


@dataclass(kw_only=True)
class MinMax(Attack):
    """As far from mu as some honest row is from another: max_i ||. - x_i|| <= max_ij ||x_i - x_j||."""

    needs = "honest"
    direction: Literal["deviation", "mean", "sign"] = "deviation"
    """p: -sigma, -mu or -sign(mu)."""

    def play(self, stage: Stage) -> None:
        """Write mu + gamma p with the largest gamma that the bound allows."""
        gamma = self._reach(*self._geometry(stage)) * FEASIBLE

        def moved(chunk: Chunk) -> Tensor:
            mu_c, p_c, _ = self._parts(stage, chunk)
            return mu_c + gamma * p_c

        stage.write(moved)

    def _parts(self, stage: Stage, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """Return mu, p and the honest rows less mu."""
        rows_Hc = stage.honest_rows(chunk)
        mu_c = rows_Hc.mean(0)
        if self.direction == "deviation":
            p_c = -deviation_of(rows_Hc)
        else:
            p_c = -mu_c if self.direction == "mean" else -mu_c.sign()
        return mu_c, p_c, rows_Hc - mu_c

    def _geometry(self, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
        """Return the products [H, H] of the rows less mu, <mu - x_i, p> [H] and ||p||^2."""

        def products(chunk: Chunk) -> Tensor:
            _, p_c, centred_Hc = self._parts(stage, chunk)
            stack = torch.cat([centred_Hc, p_c[None]]).double()
            return stack @ stack.T

        G = stage.sum(products)
        return G[:-1, :-1], -G[:-1, -1], G[-1, -1]

    def _reach(self, G_HH: Tensor, b_H: Tensor, p2: Tensor) -> Tensor:
        """Return gamma: the smallest of those that the rows allow."""
        a_H = G_HH.diagonal()
        bound = squared_distances(G_HH).max()
        return largest_root(p2, b_H, a_H - bound).min()


@dataclass(kw_only=True)
class MinSum(MinMax):
    """As far off in sum as the worst honest row: sum_i ||. - x_i||^2 <= max_i sum_j ||x_i - x_j||^2."""

    def _reach(self, G_HH: Tensor, b_H: Tensor, p2: Tensor) -> Tensor:
        bound = squared_distances(G_HH).sum(1).max()
        return largest_root(len(b_H) * p2, b_H.sum(), G_HH.trace() - bound)


def squared_distances(G_HH: Tensor) -> Tensor:
    """Return ||x_i - x_j||^2 from the products of the rows."""
    squares_H = G_HH.diagonal()
    return (squares_H[:, None] + squares_H - 2 * G_HH).clamp(min=0)


def largest_root(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return the larger x with a x^2 + 2 b x + c = 0, where a >= 0 >= c; 0 where a is 0.

    Example:
        >>> largest_root(torch.tensor(1.0), torch.tensor(-1.0), torch.tensor(-3.0))
        tensor(3.)
    """
    c = c.clamp(max=0)  # not above 0 but for rounding
    return safe_ratio((b * b - a * c).sqrt() - b, a)


@dataclass(kw_only=True)
class Fang(Attack):
    """In each column beyond all honest values, away from the mean's sign; drawn anew for each row."""

    needs = "honest"
    b: Annotated[float, Range(above=1, below=math.inf)] = 2.0
    """How far beyond: up to b times the outermost value."""

    def play(self, stage: Stage) -> None:
        """Write between min / b and min if min > 0, else between b min and min; mirrored for mu < 0."""

        def beyond(chunk: Chunk) -> Tensor:
            rows_Hc = stage.honest_rows(chunk)
            side_c = torch.where(rows_Hc.mean(0) < 0, -1.0, 1.0).to(rows_Hc.dtype)
            edge_c = (rows_Hc * side_c).amin(0)  # as if the mean were above 0 everywhere
            far_c = torch.where(edge_c > 0, edge_c / self.b, edge_c * self.b)
            share_Ac = stage.draws(chunk, self.seed, "fang").to(rows_Hc.dtype)
            return side_c * (edge_c + share_Ac * (far_c - edge_c))

        stage.write(beyond)


@dataclass(kw_only=True)
class Identical(Attack):
    """The same vector from all attackers, nearer to the median of all rows than any honest one, against mu.

    Breaks rules that keep the rows nearest to the median (Aksel). Values on the far side of the honest middle
    move the median of a column to a known honest value m, however far out they are. From m the attackers go
    against mu, `reach` of the way to the nearest honest row, so that they are all kept before any honest one.
    Ours.
    """

    needs = "honest"
    reach: Finite = 0.95
    """Of the distance between the median and the honest row that is nearest to it."""

    def play(self, stage: Stage) -> None:
        """Write m - L mu / ||mu||."""

        def numbers(chunk: Chunk) -> Tensor:
            rows_Hc = stage.honest_rows(chunk)
            mu_c = rows_Hc.mean(0)
            away_Hc = rows_Hc - self._median(stage, rows_Hc)
            return torch.cat([dot(away_Hc, away_Hc), dot(mu_c, mu_c)[None]])

        *squares_H, mu2 = stage.sum(numbers)
        length = self.reach * torch.stack(squares_H).min().sqrt()
        per_mu = safe_ratio(length, mu2.sqrt())

        def vector(chunk: Chunk) -> Tensor:
            rows_Hc = stage.honest_rows(chunk)
            return self._median(stage, rows_Hc) - per_mu * rows_Hc.mean(0)

        stage.write(vector)

    def _median(self, stage: Stage, rows_Hc: Tensor) -> Tensor:
        """Return m [c]: the median of all rows, attackers lying on the side away from the mean's sign."""
        side_c = torch.where(rows_Hc.mean(0) < 0, -1.0, 1.0).to(rows_Hc.dtype)
        sorted_Hc = (rows_Hc * side_c).sort(0).values
        num_rows, num_attackers = len(stage.blocks[0]), len(stage.attackers)
        middle = [(num_rows - 1) // 2 - num_attackers, num_rows // 2 - num_attackers]
        lower, upper = (sorted_Hc[max(place, 0)] for place in middle)
        return side_c * (lower + upper) / 2
