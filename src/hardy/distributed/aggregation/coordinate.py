"""Rules that look at each coordinate alone: medians, trimmed means, means around a centre, signs.

Papers: D. Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018 (median, trimmed mean); C. Xie et
al., "Generalized Byzantine-tolerant SGD", 2018 (mean around the median, Phocas); E. M. El Mhamdi et al., "The
Hidden Vulnerability of Distributed Learning in Byzantium", ICML 2018 (Bulyan); J. Bernstein et al.,
"signSGD with Majority Vote", 2018. Letters: n rows, c columns, f faulty rows, y sorted values.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hardy.config import PositiveFloat
from hardy.distributed.aggregation.network import sort_rows, sort_rows_around
from hardy.distributed.aggregation.rule import CoordinateRule
from hardy.distributed.aggregation.view import View


@dataclass(frozen=True, kw_only=True)
class Median(CoordinateRule):
    """The middle value.

    Args:
        even: of an even number of rows: "mid" is the mean of the two in the middle, "lower" the lower one.
    """

    name: ClassVar[str] = "median"
    even: Literal["mid", "lower"] = "mid"

    def reduce(self, rows_nc: Tensor, num_faulty: int) -> Tensor:
        """Return the median of each column."""
        n = rows_nc.shape[0]
        last = n // 2 if self.even == "mid" else (n - 1) // 2
        y = sort_rows_around(rows_nc, (n - 1) // 2, last + 1)
        return _middle(y[0], y[-1])


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(CoordinateRule):
    """The mean without the f largest and the f smallest values."""

    name: ClassVar[str] = "trimmed_mean"

    def reduce(self, rows_nc: Tensor, num_faulty: int) -> Tensor:
        """Return the trimmed mean of each column."""
        return _mean(sort_rows_around(rows_nc, num_faulty, len(rows_nc) - num_faulty))


@dataclass(frozen=True, kw_only=True)
class MeanAroundMedian(CoordinateRule):
    """The mean of the n - f values nearest to the median; of two equally near the smaller."""

    name: ClassVar[str] = "meamed"

    def reduce(self, rows_nc: Tensor, num_faulty: int) -> Tensor:
        """Return that mean of each column."""
        return _mean_around_median(rows_nc, num_dropped=num_faulty)


@dataclass(frozen=True, kw_only=True)
class Phocas(CoordinateRule):
    """The mean of the n - f values nearest to the trimmed mean; of two equally near the smaller."""

    name: ClassVar[str] = "phocas"

    def reduce(self, rows_nc: Tensor, num_faulty: int) -> Tensor:
        """Return that mean of each column."""
        y = sort_rows(rows_nc, range(len(rows_nc)))
        return _mean_around(y, _mean(y[num_faulty : len(y) - num_faulty]), num_dropped=num_faulty)


@dataclass(frozen=True, kw_only=True)
class SignMajority(CoordinateRule):
    """The sign of the sum of signs, times a scale.

    Args:
        scale: size of each coordinate of the result.
    """

    name: ClassVar[str] = "sign_majority"
    scale: PositiveFloat = 1.0

    def reduce(self, rows_nc: Tensor, num_faulty: int) -> Tensor:
        """Return what most signs say."""
        return rows_nc.sign_().sum(0).sign_().mul_(self.scale)


@dataclass(frozen=True, kw_only=True)
class Bulyan(CoordinateRule):
    """Picks n - 2f rows by Krum, one after the other; then the values nearest to their median, 2f dropped."""

    name: ClassVar[str] = "bulyan"
    needs_gram: ClassVar[bool] = True
    is_coordinate: ClassVar[bool] = False

    def least_rows(self, num_faulty: int) -> int:
        """Return 4f + 3."""
        return 4 * num_faulty + 3 if num_faulty else 1

    def pick(self, view: View, num_faulty: int) -> Tensor:
        """Return the places that Krum picks among those that are left, again and again."""
        D2_nn, left, picked = view.distances_nn(), list(range(view.num_rows)), []
        while len(picked) < view.num_rows - 2 * num_faulty:
            among = D2_nn[left][:, left]
            num_nearest = max(len(left) - num_faulty - 2, 1)
            # The row itself, at distance 0, comes first.
            scores = among.sort(dim=1).values[:, 1 : num_nearest + 1].sum(1)
            picked.append(left.pop(int(scores.argmin())))
        return torch.tensor(picked)

    def reduce(self, rows_nc: Tensor, num_faulty: int) -> Tensor:
        """Return the mean of the values nearest to the median of each column of the rows picked."""
        return _mean_around_median(rows_nc, num_dropped=2 * num_faulty)


def _middle(low_c: Tensor, high_c: Tensor) -> Tensor:
    """Return the mean of two rows, halved first: their sum may overflow; never one of the rows itself."""
    return low_c.clone() if low_c is high_c else low_c * 0.5 + high_c * 0.5


def _mean(rows: list[Tensor]) -> Tensor:
    """Return the mean of rows, divided first: their sum may overflow."""
    if len(rows) == 1:
        return rows[0]
    result_c = rows[0] / len(rows)
    for row_c in rows[1:]:
        result_c.add_(row_c, alpha=1 / len(rows))
    return result_c


def _mean_around_median(rows_nc: Tensor, *, num_dropped: int) -> Tensor:
    n = len(rows_nc)
    y = sort_rows(rows_nc, range(n))
    return _mean_around(y, _middle(y[(n - 1) // 2], y[n // 2]), num_dropped=num_dropped)


def _mean_around(y: list[Tensor], centre_c: Tensor, *, num_dropped: int) -> Tensor:
    """Return the mean of all but `num_dropped` of the sorted rows, those nearest to the centre.

    They stand side by side. Moving that window up by one swaps row s for row s + num_kept, and it moves as
    long as row s is the farther one: so row s and row s + num_kept take the same place, one or the other.
    Nothing is subtracted again that was added, so what is far away leaves no trace. Overwrites `y`.
    """
    num_kept = len(y) - num_dropped
    kept = list(y[:num_kept])
    for s in range(num_dropped):
        is_farther_c = centre_c - y[s] > y[s + num_kept] - centre_c
        place = kept[s % num_kept]
        torch.where(is_farther_c, y[s + num_kept], place, out=place)
    return _mean(kept)
