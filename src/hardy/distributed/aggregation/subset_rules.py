"""Rules that look for the rows lying closest together, or for the direction in which some stick out.

Papers: E. M. El Mhamdi et al., ICML 2018 (MDA, minimum diameter averaging); Y. Allouah et al., "On the
Privacy-Robustness-Utility Trilemma in Distributed Learning", ICML 2023 (SMEA); Y. Allouah et al., 2025 (CAF);
V. Shejwalkar, A. Houmansadr, "Manipulating the Byzantine", NDSS 2021 (DnC); A. Boussetta et al., "AKSEL: Fast
Byzantine SGD", 2020.
Letters: n rows, f faulty, K Gram matrix of centred rows, a top eigenvector, c trust left.

Differs from the papers: DnC takes the exact top direction, by default of all coordinates at once.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hardy.config import PositiveFloat, PositiveInt
from hardy.distributed.aggregation.coordinate import Median
from hardy.distributed.aggregation.rule import Weighing, WeightRule, average_of, smallest
from hardy.distributed.aggregation.view import View

MOST_SUBSETS = 1_000_000
"""More subsets than this are refused: each is tried."""
SUBSETS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class SubsetRule(WeightRule):
    """Base of rules that average the n - f rows which are best together, found by trying all subsets."""

    needs_gram: ClassVar[bool] = True

    def is_feasible(self, num_rows: int, num_faulty: int) -> bool:
        """Return whether all subsets can be tried."""
        return math.comb(num_rows, num_faulty) <= MOST_SUBSETS

    def weigh(self, view: View, num_faulty: int, state: Mapping[str, Any]) -> Weighing:
        """Return the weights; of equally good subsets the first in the order of the dictionary counts."""
        if num_faulty == 0:
            return Weighing(weights_n=average_of(torch.arange(view.num_rows), view.num_rows))
        K_nn = view.centred_nn()
        best, best_score = None, torch.inf
        for subsets_bk in _subsets(view.num_rows, view.num_rows - num_faulty):
            scores_b = self.scores(K_nn, subsets_bk)
            place = int(scores_b.argmin())
            if best is None or scores_b[place] < best_score:
                best, best_score = subsets_bk[place], scores_b[place]
        assert best is not None, "there is a subset"
        return Weighing(weights_n=average_of(best, view.num_rows))

    def scores(self, K_nn: Tensor, subsets_bk: Tensor) -> Tensor:
        """Return how far apart the rows of each subset are."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class MinimumDiameter(SubsetRule):
    """MDA: the mean of the n - f rows whose largest distance is smallest."""

    name: ClassVar[str] = "mda"

    def scores(self, K_nn: Tensor, subsets_bk: Tensor) -> Tensor:
        """Return the squared diameters."""
        squares_n = K_nn.diagonal()
        D2_nn = squares_n[:, None] + squares_n[None, :] - 2 * K_nn
        return D2_nn[subsets_bk[:, :, None], subsets_bk[:, None, :]].flatten(1).amax(1)


@dataclass(frozen=True, kw_only=True)
class SmallestVariance(SubsetRule):
    """SMEA: the mean of the n - f rows whose variance along its largest direction is smallest."""

    name: ClassVar[str] = "smea"

    def scores(self, K_nn: Tensor, subsets_bk: Tensor) -> Tensor:
        """Return the largest eigenvalues of the covariances, times the number of rows."""
        K_bkk = K_nn[subsets_bk[:, :, None], subsets_bk[:, None, :]]
        K_bkk = K_bkk - K_bkk.mean(1, keepdim=True)
        return torch.linalg.eigvalsh(K_bkk - K_bkk.mean(2, keepdim=True))[:, -1]


def _subsets(num_rows: int, size: int) -> Iterator[Tensor]:
    """Yield all subsets in the order of the dictionary, many at once: [b, size]."""
    subsets = itertools.combinations(range(num_rows), size)
    while batch := list(itertools.islice(subsets, SUBSETS_AT_ONCE)):
        yield torch.tensor(batch)


@dataclass(frozen=True, kw_only=True)
class CAF(WeightRule):
    """Covariance-bound agnostic filter: takes trust from rows that stick out along the top direction.

    Until all but 2f of the trust is left; the average with the smallest top variance on the way counts.
    """

    name: ClassVar[str] = "caf"
    needs_gram: ClassVar[bool] = True

    def weigh(self, view: View, num_faulty: int, state: Mapping[str, Any]) -> Weighing:
        """Return the weights."""
        K_nn, n = view.centred_nn(), view.num_rows
        c_n = torch.ones(n, dtype=torch.float64)
        best_n, smallest_value = c_n / n, torch.inf
        while c_n.sum() > n - 2 * num_faulty:
            weights_n = c_n / c_n.sum()
            Kw_n = K_nn @ weights_n
            centred_nn = K_nn - Kw_n[:, None] - Kw_n[None, :] + weights_n @ Kw_n
            root_n = c_n.sqrt()
            values_n, vectors_nn = torch.linalg.eigh(root_n[:, None] * centred_nn * root_n / c_n.sum())
            if values_n[-1] < smallest_value:
                best_n, smallest_value = weights_n, values_n[-1]
            # Of the norms by trust: a huge row that still has a little must lose that too.
            if values_n[-1] <= 1e-12 * weights_n @ view.squares_n:
                break
            scores_n = (centred_nn @ (root_n * vectors_nn[:, -1])).square()
            scores_n = torch.where(c_n > 0, scores_n, 0.0)
            c_n = c_n * (1 - scores_n / scores_n.max())
        return Weighing(weights_n=best_n)


@dataclass(frozen=True, kw_only=True)
class DivideAndConquer(WeightRule):
    """DnC: the mean without the rows that stick out most along the direction of largest variance.

    Args:
        factor: floor(factor * f) rows are dropped.
        columns: coordinates that are looked at, drawn anew at each step (the paper: 10,000); none means all.
        rounds: times that they are drawn; of the rows those count that are kept in every round, or where no
            row is, those kept most often. Without effect where all columns are looked at.
    """

    name: ClassVar[str] = "dnc"
    needs_gram: ClassVar[bool] = True
    factor: PositiveFloat = 1.0
    columns: PositiveInt | None = None
    rounds: PositiveInt = 5

    @property
    def forms_gram(self) -> bool:
        """Return False where it looks at few columns."""
        return self.columns is None

    def least_rows(self, num_faulty: int) -> int:
        """Return 2f + 1, and more rows than are dropped."""
        return max(2 * num_faulty, math.floor(self.factor * num_faulty)) + 1

    def weigh(self, view: View, num_faulty: int, state: Mapping[str, Any]) -> Weighing:
        """Return the weights."""
        if self.columns is None:
            return Weighing(weights_n=average_of(self._kept(view, num_faulty), view.num_rows))
        times_n = torch.zeros(view.num_rows)
        for round_ in range(self.rounds):
            times_n[self._kept(view.drawn(self.columns, "dnc", round_), num_faulty)] += 1
        kept = (times_n == times_n.max()).nonzero()[:, 0]
        return Weighing(weights_n=average_of(kept, view.num_rows))

    def _kept(self, view: View, num_faulty: int) -> Tensor:
        """Return the rows that stick out least."""
        K_nn = view.centred_nn()
        K_nn = K_nn - K_nn.mean(0, keepdim=True)
        values_n, vectors_nn = torch.linalg.eigh(K_nn - K_nn.mean(1, keepdim=True))
        # Its squared projections are the eigenvalue times these.
        shares_n = vectors_nn[:, -1].square() if values_n[-1] > 0 else torch.zeros_like(values_n)
        return smallest(shares_n, view.num_rows - math.floor(self.factor * num_faulty))


@dataclass(frozen=True, kw_only=True)
class Aksel(WeightRule):
    """The mean of the rows nearest to the median of each coordinate.

    Args:
        keep: "mid" keeps (n + 1) // 2 rows, "honest" n - f.
    """

    name: ClassVar[str] = "aksel"
    keep: Literal["mid", "honest"] = "mid"

    def weigh(self, view: View, num_faulty: int, state: Mapping[str, Any]) -> Weighing:
        """Return the weights."""
        assert view.rows is not None, "a rule that is not self-reported is given the rows"
        n = view.num_rows
        distances_n = view.rows.distances_to(view.mix_nR, partial(Median().reduce, num_faulty=num_faulty))
        kept = smallest(distances_n, (n + 1) // 2 if self.keep == "mid" else n - num_faulty)
        return Weighing(weights_n=average_of(kept, n))
