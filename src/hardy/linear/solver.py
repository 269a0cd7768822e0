"""Linear classifiers by full-batch steps of any size; stopped and judged by margins, not by the loss.

Paper: A. Tyurin, "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large
Step Sizes", AAAI 2025 (arXiv 2412.08424). Letters: a_i = row of `features`, y_i = sign, z_i = y_i a_i,
theta = `theta_CD`, gamma, m_i = z_i . theta = margin, q = softmax(logsigmoid(-m)), mu = largest margin that
any theta of length 1 has, t = iteration, R = length of the longest row.
Differs from the paper: C problems (columns of signs) at once, weights of rows, rows spread over workers; and
the upper bound of mu: theta is a sum of rows z_i with non-negative shares, so mu <= |theta| / sum of shares,
which is never above what theorems 3.3 to 6.1 give.

Shape suffixes: N rows, D features, C columns of signs, P problems (C, or 1 if joint), W workers, K sums.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hardy.config import UserError
from hardy.linear.config import SolverConfig
from hardy.linear.rows import (
    ERROR_WEIGHT,
    ERRORS,
    LOSS,
    NUM_PLAIN,
    NUM_SUMS,
    SHARES,
    SQUARES,
    Features,
    Pass,
    Rows,
    lengths_of,
    num_not_finite,
    relative,
    rescaled,
)


class Workers(Protocol):
    """What the solver asks of the workers who hold the rows; a `hardy.distributed` Communicator is one."""

    @property
    def rank(self) -> int:
        """This worker, from 0."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the workers."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Return everyone's `x` stacked in rank order, shape (W, *x.shape)."""
        ...


class OneWorker:
    """All rows are here."""

    rank = 0

    def sum(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Return `x` with shape (1, *x.shape)."""
        return x[None]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What each iteration saw, shape (iterations, P); all but the loss say how far the solver is."""

    misclassified: Tensor
    """Rows whose margin is not positive."""
    min_margin: Tensor
    """Least margin over the length of theta; -inf while theta is 0."""
    effective_rows: Tensor
    """1 / sum q^2: over how many rows the next step is spread."""
    loss: Tensor
    """Mean logistic loss of the rows; it may explode one step before all is solved. Side information; NaN
    with the perceptrons, who have none."""
    gradient_norm: Tensor
    """Length of the gradient of that loss; NaN likewise."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The best weights seen, and what is known of them; one entry for each problem, but for theta."""

    theta_CD: Tensor
    """Fewest misclassified rows, then largest normalised margin."""
    converged: Tensor
    """Whether every margin is positive."""
    num_iter: Tensor
    """Steps until the solver ended; with stop='separated' and success, the first t with positive margins."""
    num_misclassified: Tensor
    """Rows whose margin is not positive; those of weight 0 do not count."""
    min_margin: Tensor
    """Least margin over the length of theta: mu is at least this, where it is positive."""
    margin_upper: Tensor
    """mu is at most this, whatever the weights."""
    gamma: float
    """Step size that was used."""
    trace: Trace | None = None
    """Where it was asked for."""


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What is known of all workers' rows before the first step."""

    total_weight: float
    longest: float
    """Longest z: a joint problem's have one row of features twice."""
    first_row: int
    """Rows of workers of lower rank."""


def solve(
    features_ND: Features,
    signs_NC: Tensor,
    config: SolverConfig | None = None,
    *,
    weights_N: Tensor | None = None,
    workers: Workers | None = None,
    dtype: torch.dtype | None = None,
    trace: bool = False,
) -> Solution:
    """Look for theta with positive margins y_i (a_i . theta) for all rows, for each column of signs.

    With `problems="joint"` the margin of a row is its right class's score minus the largest wrong one.

    There is no bias; append a constant feature for one. All workers get the same solution, and only numbers
    that all share decide when they stop.

    Args:
        features_ND: rows of this worker, perhaps none; any floating or integer dtype, or `SparseRows`.
        signs_NC: +1 or -1.
        config: method, step size and stop rule.
        weights_N: of the rows, not negative; none is 1 each. A row of weight 0 does not exist, one of weight
            2 is two rows.
        workers: who hold the other rows; none if nobody.
        dtype: to compute in; none takes fp64 for fp64 rows, else fp32.
        trace: also return what each iteration saw.

    Raises:
        UserError: a number is not finite, a row is all zeros, or signs or weights are wrong.

    Example:
        >>> rows = torch.tensor([[1.0, -1.0], [-1.0, -4.0]])
        >>> found = solve(rows, torch.tensor([[1], [-1]]), SolverConfig(gamma=100.0))
        >>> found.converged.tolist(), found.num_iter.tolist()
        ([True], [2])
    """
    config = config or SolverConfig()
    workers = workers or OneWorker()
    dtype = dtype or (torch.float64 if features_ND.dtype == torch.float64 else torch.float32)
    rows = Rows(features_ND, signs_NC, weights_N, config=config, dtype=dtype)
    facts = _look(rows, workers)
    gamma = config.gamma or 2 * math.log(2 * max(facts.total_weight, 2.0) - 1) / facts.longest**2
    state = _State(rows, config, longest=facts.longest)
    look_every = config.look_every or (1 if features_ND.device.type == "cpu" else 10)
    num_sums = NUM_SUMS if trace else NUM_PLAIN
    for t in range(config.max_iter + 1):
        own = rows.sweep(state.theta_PK, first_row=facts.first_row, trace=trace)
        seen = _meet(own, workers, num_sums=num_sums)
        state.judge(seen, t, traced=_traced(seen, facts) if trace else None)
        if t == config.max_iter or (t % look_every == 0 and bool(state.done_P.all())):
            break
        state.step(
            _factor(seen, facts, config, t=t, gamma=gamma), seen, direction_PK=seen.sums_PK[:, num_sums:]
        )
    if not bool(state.theta_PK.isfinite().all()):
        raise UserError(
            f"linear.gamma={gamma:g} makes weights that {dtype} cannot hold; lower it, scale the features "
            f"down, or compute in float64"
        )
    return state.solution(gamma, num_columns=signs_NC.shape[1])


def _look(rows: Rows, workers: Workers) -> _Facts:
    """Return what all workers' rows have in common; everyone refuses what one of them cannot use."""
    total, longest, faults = 0.0, 0.0, [0, 0, 0, 0, 0]
    for _, features_ND, signs_NC, given_N in rows.chunks:
        weights_N = signs_NC.new_ones(len(signs_NC)) if given_N is None else given_N
        length_N = lengths_of(features_ND)
        total += weights_N.double().sum().item()
        longest = max(longest, length_N.where(weights_N > 0, 0).max().item())
        faults[0] += num_not_finite(features_ND, length_N)
        faults[1] += int((~(weights_N >= 0) | weights_N.isinf()).sum())
        faults[2] += int((signs_NC.abs() != 1).any(1).sum())
        faults[4] += int(rows.is_joint and ((signs_NC > 0).sum(1) != 1).sum())
        faults[3] += int(((length_N == 0) & (weights_N > 0)).sum())
    own = torch.tensor([rows.num_rows, total, longest, *faults], dtype=torch.float64)
    all_W = workers.all_gather(own.to(rows.device)).cpu()
    texts = [
        "features hold NaN or Inf in {} rows; remove or replace them",
        "weights must be finite and not negative, {} are not",
        "signs must be +1 or -1, those of {} rows are not",
        "{} rows are all zeros, and no weights give them a positive margin; remove them, or append a "
        "constant feature as a bias",
        "linear.problems='joint' wants one +1 among the signs of each row, {} have none or several",
    ]
    for text, count in zip(texts, all_W[:, 3:].sum(0).tolist(), strict=True):
        if count:
            raise UserError(text.format(int(count)))
    if all_W[:, 1].sum() == 0:
        raise UserError("there are no rows, or all have weight 0")
    return _Facts(
        total_weight=all_W[:, 1].sum().item(),
        longest=all_W[:, 2].max().item() * (math.sqrt(2) if rows.is_joint else 1),
        first_row=int(all_W[: workers.rank, 0].sum()),
    )


def _meet(own: Pass, workers: Workers, *, num_sums: int) -> Pass:
    """Return the sums over all workers' rows: a maximum of 2 P numbers, then a sum of P times K."""
    if isinstance(workers, OneWorker):
        return own
    limits_2P = torch.stack([own.peak_P, -own.least_P.to(own.peak_P.dtype)])
    peak_P, below_P = workers.all_gather(limits_2P).amax(0)
    factor_P = relative(own.peak_P, peak_P).to(own.sums_PK.dtype)
    sums_PK = workers.sum(rescaled(own.sums_PK, factor_P, num_sums=num_sums))
    return Pass(peak_P=peak_P, least_P=-below_P.to(own.least_P.dtype), sums_PK=sums_PK)


def _factor(seen: Pass, facts: _Facts, config: SolverConfig, *, t: int, gamma: float) -> Tensor:
    """Return by what the summed shares times rows are multiplied to make the step."""
    shares_P, size_P = seen.sums_PK[:, SHARES], seen.peak_P.exp().to(seen.sums_PK.dtype)
    if config.method == "normalized_logistic":
        return gamma / shares_P
    if config.method == "logistic":
        return gamma * size_P / facts.total_weight
    if config.method == "batch_perceptron":
        return (0.5 if t == 0 else 1.0) * size_P / facts.total_weight
    return 1 / shares_P  # of the perceptron, one share of 1


def _traced(seen: Pass, facts: _Facts) -> dict[str, Tensor]:
    sums_PK, size_P = seen.sums_PK, seen.peak_P.exp().to(seen.sums_PK.dtype)
    loss_P = sums_PK[:, LOSS] / facts.total_weight
    gradient_P = sums_PK[:, NUM_SUMS:].norm(dim=1) * size_P / facts.total_weight
    return {
        "effective_rows": sums_PK[:, SHARES].square() / sums_PK[:, SQUARES],
        "loss": loss_P,
        "gradient_norm": gradient_P.where(~loss_P.isnan(), math.nan),
    }


class _State:
    """Weights, the best so far and what is known of the largest margin; all on the device."""

    def __init__(self, rows: Rows, config: SolverConfig, *, longest: float) -> None:
        num_problems = rows.num_problems
        self.config = config
        self.theta_PK = rows.zeros(num_problems, rows.num_weights)
        self.best_PK = self.theta_PK
        zeros_P = rows.zeros(num_problems)
        self.shares_P = zeros_P
        self.upper_P = zeros_P + longest
        self.best_weight_P, self.best_margin_P = zeros_P + math.inf, zeros_P - math.inf
        self.best_errors_P = zeros_P
        self.grown_P = zeros_P - math.inf
        """Margin at the last growth that counts."""
        self.grown_at_P = zeros_P.long()
        self.done_P = zeros_P.bool()
        self.num_iter_P = zeros_P.long()
        self.lines: list[dict[str, Tensor]] = []

    def judge(self, seen: Pass, t: int, *, traced: dict[str, Tensor] | None) -> None:
        """Keep theta where it is the best, tighten the bound, and find out which problems are done."""
        norm_P = self.theta_PK.norm(dim=1)
        margin_P = (seen.least_P / norm_P).where(norm_P > 0, -math.inf)
        errors_P, weight_P = seen.sums_PK[:, ERRORS], seen.sums_PK[:, ERROR_WEIGHT]
        fewer_P = weight_P < self.best_weight_P
        better_P = fewer_P | ((weight_P == self.best_weight_P) & (margin_P > self.best_margin_P))
        self.best_PK = self.theta_PK.where(better_P[:, None], self.best_PK)
        self.best_weight_P = weight_P.where(better_P, self.best_weight_P)
        self.best_margin_P = margin_P.where(better_P, self.best_margin_P)
        self.best_errors_P = errors_P.where(better_P, self.best_errors_P)
        bound_P = (norm_P / self.shares_P).where(self.shares_P > 0, math.inf)
        self.upper_P = torch.minimum(self.upper_P, bound_P)
        self.num_iter_P = torch.where(self.done_P, self.num_iter_P, t)
        if traced is not None:
            self.lines.append({"misclassified": errors_P, "min_margin": margin_P, **traced})
        if self.config.stop == "margin":
            size_P = self.grown_P.abs().where(self.grown_P.isfinite(), 0)
            more_P = margin_P > self.grown_P + self.config.tol * size_P
            self.grown_P = margin_P.where(more_P, self.grown_P)
            self.grown_at_P = torch.where(more_P, t, self.grown_at_P)
            ended_P = (self.best_errors_P == 0) & (t - self.grown_at_P >= self.config.patience)
        else:
            ended_P = errors_P == 0
        self.done_P = self.done_P | ended_P

    def step(self, factor_P: Tensor, seen: Pass, *, direction_PK: Tensor) -> None:
        """Move the problems that are not done."""
        go_P = ~self.done_P
        step_PK = factor_P[:, None] * direction_PK
        self.theta_PK = (self.theta_PK + step_PK).where(go_P[:, None], self.theta_PK)
        shares_P = factor_P * seen.sums_PK[:, SHARES]
        self.shares_P = (self.shares_P + shares_P).where(go_P, self.shares_P)

    def solution(self, gamma: float, *, num_columns: int) -> Solution:
        """Return what was found."""
        names = self.lines[0] if self.lines else {}
        columns = {name: torch.stack([line[name] for line in self.lines]) for name in names}
        return Solution(
            theta_CD=self.best_PK.view(num_columns, -1),
            converged=self.best_errors_P == 0,
            num_iter=self.num_iter_P,
            num_misclassified=self.best_errors_P.long(),
            min_margin=self.best_margin_P,
            margin_upper=self.upper_P,
            gamma=gamma,
            trace=Trace(**columns) if columns else None,
        )
