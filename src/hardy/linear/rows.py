"""One pass over rows: margins and the next direction together, in chunks, with a running maximum.

Paper: A. Tyurin, arXiv 2412.08424; letters in `solver`. A row's share in the direction is kept as a logarithm
relative to the largest one, as in a streamed softmax, so that margins of any size neither overflow nor divide
0 by 0. A joint problem of C classes is one of rows z_ic = (e_y - e_c) x a_i, c not y, with theta [C, D] laid
flat (ours); its margin is that of the strongest wrong class, and shares are split over the wrong classes as
the softmax does, or all to the strongest by the perceptrons.

Shape suffixes: N rows, D features, P problems, C columns of signs; P = C, or 1 for a joint problem; K sums.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from hardy.config import UserError
from hardy.linear.config import STEPPED, SolverConfig
from hardy.linear.sparse import SparseRows

Features = Tensor | SparseRows
"""A table of rows; a tensor's may have any floating or integer dtype."""


@dataclass(kw_only=True)
class Pass:
    """Sums of one pass over rows with the same theta."""

    peak_P: Tensor
    """Largest logarithm of a row's share; shares are relative to it."""
    least_P: Tensor
    """Least margin."""
    sums_PK: Tensor
    """Misclassified rows, their weight, shares; of a trace squares and loss; then D of shares times z_i."""


ERRORS, ERROR_WEIGHT, SHARES, SQUARES, LOSS = range(5)
COPY_NUMBERS = 125_000
"""Numbers that are copied to fp64 at once: 1 MB."""
NUM_PLAIN, NUM_SUMS = 3, 5
"""Sums before the direction: without and with a trace, which adds the last two."""


class Rows:
    """The rows of one worker, cut into chunks."""

    def __init__(
        self,
        features_ND: Features,
        signs_NC: Tensor,
        weights_N: Tensor | None,
        *,
        config: SolverConfig,
        dtype: torch.dtype,
    ) -> None:
        _check_shapes(features_ND, signs_NC, weights_N)
        self.method, self.dtype, self.device = config.method, dtype, features_ND.device
        self.num_rows, self.num_features = features_ND.shape
        self.is_joint = config.problems == "joint"
        self.num_problems = 1 if self.is_joint else signs_NC.shape[1]
        self.num_weights = self.num_features * (signs_NC.shape[1] if self.is_joint else 1)
        signs_NC = signs_NC.to(self.device, dtype)
        weights_N = None if weights_N is None else weights_N.to(self.device, dtype)
        self.chunks: list[tuple[int, Features, Tensor, Tensor | None]] = []
        """Number of the first row, features (a tensor's still in their own dtype), signs and weights."""
        if isinstance(features_ND, SparseRows):
            features_ND, row_bytes = features_ND.to(dtype), features_ND.row_bytes
        else:
            row_bytes = self.num_features * dtype.itemsize
        num_chunk_rows = max(1, config.chunk_bytes // max(1, row_bytes))
        for first in range(0, self.num_rows, num_chunk_rows):
            part = slice(first, first + num_chunk_rows)
            weights = None if weights_N is None else weights_N[part]
            features = features_ND.part(part) if isinstance(features_ND, SparseRows) else features_ND[part]
            self.chunks.append((first, features, signs_NC[part], weights))

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros of the dtype and device of the computation."""
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    def sweep(self, theta_PK: Tensor, *, first_row: int, trace: bool) -> Pass:
        """Return the sums over this worker's rows."""
        found = None
        for first, features_ND, signs_NC, weights_N in self.chunks:
            features_ND = features_ND.to(self.dtype)
            scores_NC = scores_of(features_ND, theta_PK.view(-1, self.num_features))
            margins_NP = strongest_wrong(scores_NC, signs_NC) if self.is_joint else signs_NC * scores_NC
            missed_NP = margins_NP <= 0
            if weights_N is not None:
                there_N1 = (weights_N > 0)[:, None]
                missed_NP, margins_NP = missed_NP & there_N1, margins_NP.where(there_N1, math.inf)
            softened_NP = soft_margins(scores_NC, signs_NC) if self.is_joint else margins_NP
            logs_NP = self.log_shares(softened_NP, missed_NP, weights_N, first=first_row + first)
            peak_P = logs_NP.amax(0)
            shares_NP = relative(logs_NP, peak_P).to(self.dtype)
            errors_P = missed_NP.sum(0)
            error_weight_P = errors_P if weights_N is None else _weighted(missed_NP, weights_N)
            columns = [errors_P, error_weight_P, shares_NP.sum(0)]
            if trace:
                columns += [shares_NP.square().sum(0), self.loss(softened_NP, weights_N)]
            along_NC = self.along(scores_NC, signs_NC) if self.is_joint else signs_NC
            direction_CD = mixed_of(features_ND, shares_NP * along_NC)
            direction_PK = direction_CD.reshape(self.num_problems, -1)
            sums_PK = torch.cat([torch.stack(columns, 1), direction_PK], 1)
            part = Pass(peak_P=peak_P, least_P=margins_NP.amin(0), sums_PK=sums_PK)
            found = part if found is None else merged(found, part, num_sums=len(columns))
        return found or self._nothing(NUM_SUMS if trace else NUM_PLAIN)

    def _nothing(self, num_sums: int) -> Pass:
        """Return the sums over no rows."""
        infinite_P = self.zeros(self.num_problems) + math.inf
        return Pass(
            peak_P=-infinite_P.to(torch.float64 if self.method == "perceptron" else self.dtype),
            least_P=infinite_P,
            sums_PK=self.zeros(self.num_problems, num_sums + self.num_weights),
        )

    def log_shares(
        self, margins_NP: Tensor, missed_NP: Tensor, weights_N: Tensor | None, *, first: int
    ) -> Tensor:
        """Return the logarithm of what each row adds to the direction, but for a factor.

        The perceptron's one row is that of the smallest number: the softmax of numbers times -1e4.
        """
        if self.method == "perceptron":
            number_N = torch.arange(first, first + len(margins_NP), device=self.device)
            return (-1e4 * number_N.double()[:, None]).where(missed_NP, -math.inf)
        if self.method in STEPPED:
            logs_NP = logsigmoid(-margins_NP)
        else:
            logs_NP = torch.zeros_like(margins_NP).where(missed_NP, -math.inf)
        return logs_NP if weights_N is None else logs_NP + weights_N.log()[:, None]

    def along(self, scores_NC: Tensor, signs_NC: Tensor) -> Tensor:
        """Return, of a joint problem, how much of a row each class's weights take: 1 in all, and -1."""
        wrong_NC = scores_NC.masked_fill(signs_NC > 0, -math.inf)
        if self.method in STEPPED:
            taken_NC = wrong_NC.softmax(1)
        else:
            taken_NC = one_hot(wrong_NC.argmax(1), scores_NC.shape[1]).to(self.dtype)
        return (signs_NC > 0).to(self.dtype) - taken_NC

    def loss(self, margins_NP: Tensor, weights_N: Tensor | None) -> Tensor:
        """Return the summed logistic loss of each problem; NaN with the perceptrons."""
        if self.method not in STEPPED:
            return self.zeros(self.num_problems) + math.nan
        return _weighted(-logsigmoid(margins_NP), weights_N)


def scores_of(features_ND: Features, theta_CD: Tensor) -> Tensor:
    """Return rows times weights, [N, C]."""
    return features_ND.scores(theta_CD) if isinstance(features_ND, SparseRows) else features_ND @ theta_CD.T


def mixed_of(features_ND: Features, weights_NC: Tensor) -> Tensor:
    """Return sums of rows by weight, [C, D]."""
    return (
        features_ND.mixed(weights_NC) if isinstance(features_ND, SparseRows) else weights_NC.T @ features_ND
    )


def lengths_of(features_ND: Features) -> Tensor:
    """Return the length of each row, fp64; few rows at a time, whose copies in fp64 stay in cache."""
    if isinstance(features_ND, SparseRows):
        return features_ND.lengths()
    num_rows = max(1, COPY_NUMBERS // max(1, features_ND.shape[1]))
    return torch.cat([part.double().norm(dim=1) for part in features_ND.split(num_rows)])


def num_not_finite(features_ND: Features, length_N: Tensor) -> int:
    """Return how many rows hold NaN or Inf.

    A finite length says that none does; rows are looked at where one is not, as looking at each number takes
    more time than both products of a step.
    """
    if bool(length_N.isfinite().all()):
        return 0
    if isinstance(features_ND, SparseRows):
        return features_ND.num_not_finite()
    return int((~features_ND.isfinite()).any(1).sum())


def _check_shapes(features_ND: Features, signs_NC: Tensor, weights_N: Tensor | None) -> None:
    if len(features_ND.shape) != 2 or signs_NC.ndim != 2 or len(features_ND) != len(signs_NC):
        raise UserError(
            f"features and signs must be tables with a row for each other, got shapes "
            f"{tuple(features_ND.shape)} and {tuple(signs_NC.shape)}"
        )
    if weights_N is not None and weights_N.shape != features_ND.shape[:1]:
        raise UserError(
            f"weights must be one number for each of {len(features_ND)} rows, got shape "
            f"{tuple(weights_N.shape)}"
        )


def _weighted(values_NP: Tensor, weights_N: Tensor | None) -> Tensor:
    """Return the sum over rows of weight times value."""
    return values_NP.sum(0) if weights_N is None else (weights_N[:, None] * values_NP).sum(0)


def strongest_wrong(scores_NC: Tensor, signs_NC: Tensor) -> Tensor:
    """Return by how much the right class's score is above the largest wrong one, [N, 1]."""
    right_N = scores_NC.masked_fill(signs_NC < 0, 0).sum(1)
    return (right_N - scores_NC.masked_fill(signs_NC > 0, -math.inf).amax(1))[:, None]


def soft_margins(scores_NC: Tensor, signs_NC: Tensor) -> Tensor:
    """Return by how much it is above all wrong ones together, [N, 1]: log p / (1 - p), p the softmax's.

    Example:
        >>> soft_margins(torch.tensor([[2.0, 1.0]]), torch.tensor([[1, -1]])).item()
        1.0
    """
    right_N = scores_NC.masked_fill(signs_NC < 0, 0).sum(1)
    return (right_N - scores_NC.masked_fill(signs_NC > 0, -math.inf).logsumexp(1))[:, None]


def relative(logs: Tensor, peak: Tensor) -> Tensor:
    """Return exp(logs - peak), and 0 where nothing has a share."""
    return (logs - peak.where(peak.isfinite(), 0)).exp()


def rescaled(sums_PK: Tensor, factor_P: Tensor, *, num_sums: int) -> Tensor:
    """Return the sums with shares relative to another peak; counts and losses stay."""
    factor_PK = factor_P[:, None].expand(sums_PK.shape).clone()
    factor_PK[:, [ERRORS, ERROR_WEIGHT]] = 1
    if num_sums == NUM_SUMS:
        factor_PK[:, SQUARES] = factor_P.square()
        factor_PK[:, LOSS] = 1
    return sums_PK * factor_PK


def merged(left: Pass, right: Pass, *, num_sums: int) -> Pass:
    """Return the sums over the rows of both."""
    peak_P = torch.maximum(left.peak_P, right.peak_P)
    sums_PK = [
        rescaled(part.sums_PK, relative(part.peak_P, peak_P).to(part.sums_PK.dtype), num_sums=num_sums)
        for part in (left, right)
    ]
    least_P = torch.minimum(left.least_P, right.least_P)
    return Pass(peak_P=peak_P, least_P=least_P, sums_PK=sums_PK[0] + sums_PK[1])
