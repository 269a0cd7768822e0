"""What may be done to the rows before the rule: mixing them, or making long ones shorter.

Papers: Y. Allouah et al., "Fixing by Mixing", AISTATS 2023 (nearest-neighbour mixing); S. P. Karimireddy et
al., "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", ICLR 2022; Y. Allouah et al.,
"Adaptive Gradient Clipping for Robust Federated Learning", ICLR 2025 (ARC).
Letters: n rows, f of them faulty. Rows themselves are never touched: only numbers and mixtures of them.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hardy.config import PositiveFloat, PositiveInt
from hardy.distributed.aggregation.names import split_pre_aggregator
from hardy.distributed.aggregation.rule import smallest
from hardy.distributed.aggregation.settings import check_settings
from hardy.distributed.aggregation.view import View
from hardy.rng import generator_for


@dataclass(frozen=True)
class PreAggregator:
    """Something done to the rows."""

    name: ClassVar[str]
    needs_gram: ClassVar[bool] = False
    """Whether it needs inner products of the rows or makes rows of several."""
    keeps_rows: ClassVar[bool] = True
    """Whether row i afterwards still is that of worker i."""
    needs_majority: ClassVar[bool] = True
    """Whether most of the rows afterwards must be honest."""

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self, section=self.name)

    def rows_left(self, num_rows: int) -> int:
        """Return the number of rows afterwards."""
        return num_rows

    def apply(self, view: View, num_faulty: int, seed: int) -> View:
        """Return the rows afterwards."""
        raise NotImplementedError


@dataclass(frozen=True)
class NearestNeighbourMixing(PreAggregator):
    """Each row becomes the mean of the n - f rows nearest to it, itself included."""

    name: ClassVar[str] = "nnm"
    needs_gram: ClassVar[bool] = True

    def apply(self, view: View, num_faulty: int, seed: int) -> View:
        """Return the mixed rows."""
        n = view.num_rows
        D2_nn = view.distances_nn()
        weights_nn = torch.zeros_like(D2_nn)
        nearest_nk = D2_nn.argsort(dim=1, stable=True)[:, : n - num_faulty]
        return view.mixed(weights_nn.scatter_(1, nearest_nk, 1 / (n - num_faulty)))


@dataclass(frozen=True)
class Bucketing(PreAggregator):
    """Means of `size` rows each, drawn anew every step; the last bucket may be smaller. f stays what it was.

    Args:
        size: rows of a bucket.
    """

    name: ClassVar[str] = "bucketing"
    needs_gram: ClassVar[bool] = True
    keeps_rows: ClassVar[bool] = False
    size: PositiveInt

    def rows_left(self, num_rows: int) -> int:
        """Return the number of buckets."""
        return math.ceil(num_rows / self.size)

    def apply(self, view: View, num_faulty: int, seed: int) -> View:
        """Return the buckets' means."""
        order = torch.randperm(view.num_rows, generator=generator_for(seed, "bucketing", view.step))
        buckets = order.split(self.size)
        weights_kn = torch.zeros(len(buckets), view.num_rows, dtype=torch.float64)
        for weights_n, bucket in zip(weights_kn, buckets, strict=True):
            weights_n[bucket] = 1 / len(bucket)
        return view.mixed(weights_kn)


@dataclass(frozen=True)
class Clip(PreAggregator):
    """Rows longer than `norm` are shortened to it.

    Args:
        norm: the longest that a row may be.
    """

    name: ClassVar[str] = "clip"
    needs_majority: ClassVar[bool] = False
    norm: PositiveFloat

    def apply(self, view: View, num_faulty: int, seed: int) -> View:
        """Return the shortened rows."""
        return _clipped(view, torch.tensor(self.norm, dtype=torch.float64).square())


@dataclass(frozen=True)
class AdaptiveClip(PreAggregator):
    """ARC: the floor(2f (n - f) / n) longest rows are shortened to the longest of the others."""

    name: ClassVar[str] = "arc"

    def apply(self, view: View, num_faulty: int, seed: int) -> View:
        """Return the shortened rows."""
        n = view.num_rows
        num_clipped = 2 * num_faulty * (n - num_faulty) // n
        longest_left = smallest(view.squares_n, n - num_clipped)[-1]
        return _clipped(view, view.squares_n[longest_left])


def _clipped(view: View, square: Tensor) -> View:
    """Return the view with rows shortened to a norm; those shortened tie with each other to the last bit."""
    squares_n = view.squares_n
    shorter = view.scaled(torch.where(squares_n > square, (square / squares_n).sqrt(), 1.0))
    unclipped_n = squares_n if view.unclipped_n is None else view.unclipped_n
    return replace(shorter, squares_n=squares_n.clamp(max=square), unclipped_n=unclipped_n)


PRE_AGGREGATORS: dict[str, type[PreAggregator]] = {
    kind.name: kind for kind in (AdaptiveClip, Bucketing, Clip, NearestNeighbourMixing)
}


def build_pre_aggregator(text: str) -> PreAggregator:
    """Return the pre-aggregator of "name" or "name:number".

    Raises:
        ConfigError: the text names none, or the number is refused.

    Example:
        >>> build_pre_aggregator("bucketing:2")
        Bucketing(size=2)
    """
    name, number = split_pre_aggregator(text)
    kind = PRE_AGGREGATORS[name]
    return kind() if number is None else kind(number)  # pyright: ignore[reportCallIssue]  # by the name
