"""Rules whose weights follow from the distances between rows, or from their norms alone.

Papers: P. Blanchard et al., "Machine Learning with Adversaries", NeurIPS 2017 (Krum, multi-Krum); K. Pillutla
et al., "Robust Aggregation for Federated Learning", 2019 (smoothed Weiszfeld; RFA is three rounds of it from
the mean); S. P. Karimireddy et al., "Learning from History for Byzantine Robust Optimization", ICML 2021
(centred clipping); N. Gupta, N. H. Vaidya, CGE, 2020; S. Farhadkhani et al., "Robust Collaborative Learning
with Linear Gradient Overhead", ICML 2023 (MoNNA).
Letters: n rows, f faulty, D2 squared distances, K centred Gram matrix, v last vector, tau clipping radius.

Differs from the papers: the geometric median starts from the mean of the half of the rows nearest to the most
central one: from the mean of all, rounds that end by a tolerance end far out when one row is at 1e20.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hardy.config import PositiveFloat, PositiveInt
from hardy.distributed.aggregation.rule import Weighing, WeightRule, average_of, one_hot, smallest
from hardy.distributed.aggregation.view import View, squared_distances

WEISZFELD_TOLERANCE = 1e-6
WEISZFELD_SMOOTHING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Mean(WeightRule):
    """The mean; rows may count by their tokens. Not robust: one row can move it anywhere."""

    name: ClassVar[str] = "mean"
    is_self_reported: ClassVar[bool] = True
    uses_sample_weights: ClassVar[bool] = True

    def least_rows(self, num_faulty: int) -> int:
        """Return 1: there is nothing that it withstands."""
        return 1

    def weigh(self, view: View, num_faulty: int, state: Mapping[str, Any]) -> Weighing:
        """Return the sample weights, normalised."""
        return Weighing(weights_n=view.sample_weights_n / view.sample_weights_n.sum())


@dataclass(frozen=True, kw_only=True)
class MultiKrum(WeightRule):
    """The mean of the rows that have the nearest neighbours.

    Args:
        keep: rows that are averaged; none is n - f.
        neighbours: "original" adds up the n - f - 2 smallest distances, "byzfl" the n - f - 1 smallest.
    """

    name: ClassVar[str] = "multi_krum"
    needs_gram: ClassVar[bool] = True
    keep: PositiveInt | None = None
    neighbours: Literal["original", "byzfl"] = "original"

    def least_rows(self, num_faulty: int) -> int:
        """Return 2f + 3, with the neighbours of "byzfl" 2f + 1."""
        least = krum_least_rows(num_faulty, self.neighbours)
        return max(least, num_faulty + (self.keep or 1))

    def weigh(self, view: View, num_faulty: int, state: Mapping[str, Any]) -> Weighing:
        """Return the weights."""
        keep = min(self.keep or view.num_rows, view.num_rows - num_faulty)
        kept = smallest(krum_scores(view, num_faulty, self.neighbours), keep)
        return Weighing(weights_n=average_of(kept, view.num_rows))


@dataclass(frozen=True, kw_only=True)
class Krum(WeightRule):
    """The row that has the nearest neighbours; of equals the first.

    Args:
        neighbours: "original" adds up the n - f - 2 smallest distances, "byzfl" the n - f - 1 smallest.
    """

    name: ClassVar[str] = "krum"
    needs_gram: ClassVar[bool] = True
    neighbours: Literal["original", "byzfl"] = "original"

    def least_rows(self, num_faulty: int) -> int:
        """Return 2f + 3, with the neighbours of "byzfl" 2f + 1."""
        return krum_least_rows(num_faulty, self.neighbours)

    def weigh(self, view: View, num_faulty: int, state: Mapping[str, Any]) -> Weighing:
        """Return a 1 for that row."""
        scores_n = krum_scores(view, num_faulty, self.neighbours)
        return Weighing(weights_n=one_hot(int(smallest(scores_n, 1)), view.num_rows))


def krum_least_rows(num_faulty: int, neighbours: str) -> int:
    """Return how many rows Krum needs; without faulty ones any number will do."""
    if num_faulty == 0:
        return 1
    return 2 * num_faulty + (3 if neighbours == "original" else 1)


def krum_scores(view: View, num_faulty: int, neighbours: str) -> Tensor:
    """Return the sum of each row's smallest squared distances to others: fp64 [n]."""
    num_nearest = view.num_rows - num_faulty - (2 if neighbours == "original" else 1)
    others_nn = view.distances_nn().sort(dim=1).values[:, 1:]  # without the 0 of the row itself
    return others_nn[:, : max(num_nearest, 1)].sum(1)


@dataclass(frozen=True, kw_only=True)
class CGE(WeightRule):
    """The mean of the n - f shortest rows; of those clipped to one norm, the ones that were shortest before.

    So what clips rows before it changes what is added up, and not which rows are.
    """

    name: ClassVar[str] = "cge"
    is_self_reported: ClassVar[bool] = True

    def weigh(self, view: View, num_faulty: int, state: Mapping[str, Any]) -> Weighing:
        """Return the weights."""
        squares_n = view.squares_n if view.unclipped_n is None else view.unclipped_n
        kept = smallest(squares_n, view.num_rows - num_faulty)
        return Weighing(weights_n=average_of(kept, view.num_rows), metrics={"accepted": kept.tolist()})


@dataclass(frozen=True, kw_only=True)
class MoNNA(WeightRule):
    """The mean of the n - f rows nearest to the worker's own, itself included."""

    name: ClassVar[str] = "monna"
    names_rows: ClassVar[bool] = True
    needs_gram: ClassVar[bool] = True

    def weigh(self, view: View, num_faulty: int, state: Mapping[str, Any]) -> Weighing:
        """Return the weights; without the own row the step is left out."""
        if view.own_row is None:
            return Weighing(weights_n=None, metrics={"own_row_removed": 1.0})
        distances_n = view.distances_nn()[view.own_row]
        distances_n[view.own_row] = -1.0  # itself first, also beside equal rows
        kept = smallest(distances_n, view.num_rows - num_faulty)
        return Weighing(weights_n=average_of(kept, view.num_rows))


@dataclass(frozen=True, kw_only=True)
class GeometricMedian(WeightRule):
    """The point with the smallest sum of distances to the rows, by smoothed Weiszfeld rounds.

    Args:
        rounds: at most so many; 3 from the mean is RFA.
        start: "core" is the mean of the half of the rows nearest to the most central one, "mean" that of
            all, "zero" the origin.
        smoothing: the least distance that counts; none is 1e-6 times the median distance at the start.
    """

    name: ClassVar[str] = "geometric_median"
    needs_gram: ClassVar[bool] = True
    rounds: PositiveInt = 100
    start_at: Literal["core", "mean", "zero"] = "core"
    smoothing: PositiveFloat | None = None

    def weigh(self, view: View, num_faulty: int, state: Mapping[str, Any]) -> Weighing:
        """Return the weights."""
        K_nn = view.centred_nn()
        weights_n = self._first_weights(view, K_nn)
        distances_n = view.norms_n if self.start_at == "zero" else _distances_to_mix(K_nn, weights_n)
        nu = self.smoothing or WEISZFELD_SMOOTHING * distances_n.median().item()
        for _ in range(self.rounds):
            inverse_n = 1 / distances_n.clamp(min=nu) if nu > 0 else (distances_n == 0).double()
            before_n, weights_n = weights_n, inverse_n / inverse_n.sum()
            if (weights_n - before_n).abs().sum() < WEISZFELD_TOLERANCE:
                break
            distances_n = _distances_to_mix(K_nn, weights_n)
        return Weighing(weights_n=weights_n)

    def _first_weights(self, view: View, K_nn: Tensor) -> Tensor:
        if self.start_at == "mean":
            return torch.full((view.num_rows,), 1 / view.num_rows, dtype=torch.float64)
        if self.start_at == "zero":
            return torch.zeros(view.num_rows, dtype=torch.float64)
        distances_nn = squared_distances(K_nn).sqrt()
        central = int(smallest(distances_nn.sum(1), 1))
        return average_of(smallest(distances_nn[central], (view.num_rows + 1) // 2), view.num_rows)


def _distances_to_mix(K_nn: Tensor, weights_n: Tensor) -> Tensor:
    """Return the distances of the rows to their mixture by weights that sum to 1."""
    Kw_n = K_nn @ weights_n
    return (K_nn.diagonal() - 2 * Kw_n + weights_n @ Kw_n).clamp(min=0).sqrt()


@dataclass(frozen=True, kw_only=True)
class CenteredClip(WeightRule):
    """The last vector, moved by the mean of the rows' differences from it, each shortened to `tau`.

    Args:
        tau: clipping radius; none is the lower median of the distances, anew each round.
        rounds: how often it is moved.
    """

    name: ClassVar[str] = "centered_clip"
    needs_gram: ClassVar[bool] = True
    has_memory: ClassVar[bool] = True
    tau: PositiveFloat | None = None
    rounds: PositiveInt = 3

    def weigh(self, view: View, num_faulty: int, state: Mapping[str, Any]) -> Weighing:
        """Return the weights of the rows and, last, of the last vector, which is the view's last row."""
        K_mm, n = view.centred_nn(), view.num_rows - 1
        weights_m = one_hot(n, n + 1)
        for _ in range(self.rounds):
            distances_n = _distances_to_mix(K_mm, weights_m)[:n]
            tau = distances_n.sort().values[(n - 1) // 2].item() if self.tau is None else self.tau
            shares_n = torch.where(distances_n > tau, tau / distances_n, 1.0)
            weights_m = weights_m * (1 - shares_n.mean())
            weights_m[:n] += shares_n / n
        return Weighing(weights_n=weights_m)
