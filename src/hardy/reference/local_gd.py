"""Local gradient descent: every node takes L steps alone, then all average. Which solution is reached?

Paper: Zhu, Vardhan, Mazumdar, "Effectiveness of Distributed Gradient Descent with Local Steps for
Overparameterized Models", v2 of arXiv 2412.07971 (v1: "... Many Local Steps in Overparameterized Models").
Letters: M nodes, n_i rows of node i, p_i its weight, d features, w weights, eta step size, L local steps,
k round from 1; A_i rows and b_i targets of regression; Z_i rows y*x of classification, y in {-1, +1};
v_i weights of node i after its local work; a_k pull of the anchor; w_hat the max-margin direction.
Differs from the paper: its modified aggregation was not available to us as a formula. `anchored` is Halpern's
iteration, a rule of ours with the same aim; `rate` was derived by us. Local steps are taken on residuals and
margins instead of weights, which is the same up to rounding and costs n_i^2 a step instead of n_i*d.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True)
class Nodes:
    """What the nodes hold, float64; a node with fewer rows than others is filled up by rows of zeros."""

    Z: Tensor
    """Rows, [M, n, d]: A_i of regression, y*x of classification."""
    b: Tensor
    """Targets, [M, n]: b_i of regression, the margin 1 of classification."""
    n: Tensor
    """Rows that each node really has, [M]."""
    p: Tensor
    """Weights of the nodes, [M], not negative, of sum 1."""

    @property
    def rows(self) -> Tensor:
        """Rows of all nodes, [sum of n_i, d]."""
        return torch.cat([Z[:n] for Z, n in zip(self.Z, self.n, strict=True)])


def nodes(Zs: Sequence[Tensor], bs: Sequence[Tensor] | None = None, *, p: Tensor | None = None) -> Nodes:
    """Put the nodes' rows [n_i, d] together; weights are 1/M unless given.

    Raises:
        ValueError: weights are negative or do not sum to 1.
    """
    n, M = torch.tensor([len(Z) for Z in Zs]), len(Zs)
    p = torch.full((M,), 1 / M, dtype=torch.float64) if p is None else p.double()
    if p.shape != (M,) or (p < 0).any() or abs(p.sum().item() - 1) > 1e-9:
        raise ValueError(f"weights of {M} nodes must be {M} numbers >= 0 of sum 1, got {p.tolist()}")
    if bs is None:
        bs = [Z.new_ones(len(Z)) for Z in Zs]
    Z = torch.zeros(M, int(n.max()), Zs[0].shape[1], dtype=torch.float64)
    b = torch.zeros(M, int(n.max()), dtype=torch.float64)
    for i, (rows, targets) in enumerate(zip(Zs, bs, strict=True)):
        Z[i, : n[i]], b[i, : n[i]] = rows, targets
    return Nodes(Z=Z, b=b, n=n, p=p)


# Local work: from the common w [d] to each node's v_i [M, d]. A node without rows returns w.


def _step_sizes(x: Nodes, eta: float) -> Tensor:
    return eta / x.n.clamp(min=1).double()[:, None, None]


def logistic(w: Tensor, x: Nodes, *, eta: float, L: int) -> Tensor:
    """Take L steps on f_i(v) = mean of log(1 + exp(-z.v)): margins m = Z v move by eta/n_i * Q sigma(-m)."""
    Zt, h = x.Z.mT, _step_sizes(x, eta)
    Q = h * (x.Z @ Zt)
    u = -(x.Z @ w)[:, :, None]
    total = torch.zeros_like(u)
    for _ in range(L):
        s = torch.sigmoid(u)
        total += s
        u = torch.baddbmm(u, Q, s, alpha=-1)
    return w + (h * (Zt @ total))[:, :, 0]


def squares(w: Tensor, x: Nodes, *, eta: float, L: int) -> Tensor:
    """Take L steps on f_i(v) = |A v - b|^2 / (2 n_i): residuals r = A v - b move by -eta/n_i * Q r."""
    At, h = x.Z.mT, _step_sizes(x, eta)
    Q = h * (x.Z @ At)
    r = (x.Z @ w - x.b)[:, :, None]
    total = torch.zeros_like(r)
    for _ in range(L):
        total += r
        r = torch.baddbmm(r, Q, r, alpha=-1)
    return w - (h * (At @ total))[:, :, 0]


def fit(w: Tensor, x: Nodes) -> Tensor:
    """Go to the nearest point that fits the node, w + pinv(A_i)(b_i - A_i w): `squares` as L -> infinity."""
    return w + (torch.linalg.pinv(x.Z) @ (x.b - x.Z @ w)[:, :, None])[:, :, 0]


def project(w: Tensor, x: Nodes, *, sweeps: int = 300, tol: float = 1e-12) -> Tensor:
    """Go to the nearest point of C_i = {v : Z_i v >= 1}, by cyclic coordinate sweeps over the dual a >= 0.

    The limit of a local logistic problem with a proximal term that vanishes. Sweeps end when no a moved by
    `tol`, or after `sweeps`: where C_i is empty they never settle.

    Raises:
        ValueError: a row is zero, so that no weights give it a margin.
    """
    Q = x.Z @ x.Z.mT
    diagonal = Q.diagonal(dim1=1, dim2=2).clone()
    real = torch.arange(x.Z.shape[1]) < x.n[:, None]
    if (real & (diagonal == 0)).any():
        i, j = (real & (diagonal == 0)).nonzero()[0].tolist()
        raise ValueError(f"row {j} of node {i} is zero: no weights give it a margin of 1; leave it out")
    diagonal[~real] = torch.inf  # a stays 0 there
    missing = (x.b - x.Z @ w) / diagonal  # by how much each a_j wants to grow: (1 - z.v) / Q_jj
    minus_a = torch.zeros_like(missing)
    columns = [part[:, :, None].unbind(1) for part in (minus_a, missing)]
    parts = list(zip(*columns, (Q / diagonal[:, :, None]).unbind(2), strict=True))
    for _ in range(sweeps):
        before = minus_a.clone()
        for minus_a_j, missing_j, Q_j in parts:
            change = torch.maximum(missing_j, minus_a_j)  # a_j stays >= 0
            minus_a_j -= change
            missing.addcmul_(Q_j, change, value=-1)
        if (minus_a - before).abs().max() < tol:
            break
    return w - (x.Z.mT @ minus_a[:, :, None])[:, :, 0]


# Aggregation


def mean(v: Tensor, p: Tensor) -> Tensor:
    """Return sum_i p_i v_i over the nodes [M, d] whose weights are finite, p made to sum to 1 over these.

    Raises:
        ValueError: no node of positive weight is finite.
    """
    finite = v.isfinite().all(1)
    p = torch.where(finite, p, 0.0)
    if not p.sum() > 0:
        raise ValueError(
            f"none of {len(v)} nodes has finite weights left to average; take a smaller step size eta"
        )
    return (p / p.sum()) @ v.where(finite[:, None], 0.0)


def anchored(average: Tensor, anchor: Tensor, *, a: float) -> Tensor:
    """Return anchor + (1 - a)(average - anchor). With projections and a_k = 1/(k+1): Halpern's iteration."""
    return anchor + (1 - a) * (average - anchor)


def halpern(k: int) -> float:
    """Return a_k = 1/(k+1): 1/2 in the first round."""
    return 1 / (k + 1)


def run(
    w: Tensor,
    x: Nodes,
    local: Callable[[Tensor, Nodes], Tensor],
    *,
    rounds: int,
    anchor: Tensor | None = None,
    a: Callable[[int], float] = halpern,
) -> list[Tensor]:
    """Return w_1 ... w_rounds; a plain mean without an anchor."""
    w, ws = w.double(), list[Tensor]()
    for k in range(1, rounds + 1):
        w = mean(local(w, x), x.p)
        if anchor is not None:
            w = anchored(w, anchor, a=a(k))
        ws.append(w)
    return ws


# What to hold it against


def interpolator(w_0: Tensor, x: Nodes) -> Tensor:
    """Return the point nearest to w_0 that fits all nodes: w_0 + pinv(A)(b - A w_0), A all rows stacked."""
    b = torch.cat([b[:n] for b, n in zip(x.b, x.n, strict=True)])
    return w_0 + torch.linalg.pinv(x.rows) @ (b - x.rows @ w_0)


def svm(x: Nodes, *, sweeps: int = 100_000) -> Tensor:
    """Return w_hat, the shortest w with margin 1 on the rows of all nodes: 0 projected on C."""
    return project(torch.zeros_like(x.Z[0, 0]), nodes([x.rows]), sweeps=sweeps)[0]


def cosgap(u: Tensor, w_hat: Tensor) -> float:
    """Return 1 - cos(u, w_hat), as half the squared distance of the directions: exact down to rounding."""
    return ((u / u.norm() - w_hat / w_hat.norm()).square().sum() / 2).item()


def loss(w: Tensor, x: Nodes) -> float:
    """Return sum_i p_i f_i(w) of logistic regression."""
    real = torch.arange(x.Z.shape[1]) < x.n[:, None]
    f = (softplus(-(x.Z @ w)) * real).sum(1) / x.n.clamp(min=1)
    return (x.p @ f).item()


def rate(x: Nodes, *, eta: float = 0.0, L: int | None = None) -> float:
    """Return rho, by which a round of regression shrinks the error in the end; L None: exact local solves.

    rho = max |1 - lambda| over the eigenvalues of sum_i p_i Q_i on the row space of all rows, where
    Q_i = I - (I - eta H_i)^L, H_i = A_i^T A_i / n_i, and Q_i = pinv(A_i) A_i for exact solves. Needs
    eta < 2 / lambda_max(H_i).
    """
    if L is None:
        Q = torch.linalg.pinv(x.Z) @ x.Z
    else:
        one = torch.eye(x.Z.shape[2], dtype=torch.float64)
        Q = one - torch.linalg.matrix_power(one - _step_sizes(x, eta) * (x.Z.mT @ x.Z), L)
    rank = int(torch.linalg.matrix_rank(x.rows))
    together = torch.einsum("i,ijk->jk", x.p, Q)
    return (1 - torch.linalg.eigvalsh(together)[-rank:]).abs().max().item()


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far apart the nodes went in one round: of the deltas v_i - w_k."""

    mean_cosine: float
    """Mean over nodes of the cosine between a node's delta and the mean delta."""
    min_cosine: float
    """Least cosine between two nodes' deltas."""
    dispersion: float
    """sum_i p_i |v_i - average|^2 / |average - w_k|^2."""
    norm_ratio: float
    """Longest delta over the shortest."""


def drift(v: Tensor, w: Tensor, p: Tensor) -> Drift:
    """Return the metrics for v [M, d], M >= 2, reached from w [d]."""
    deltas = v - w
    average = p @ deltas
    norms = deltas.norm(dim=1)
    directions = deltas / norms[:, None]
    pairs = torch.triu_indices(len(v), len(v), offset=1)
    return Drift(
        mean_cosine=(directions @ (average / average.norm())).mean().item(),
        min_cosine=(directions @ directions.T)[pairs[0], pairs[1]].min().item(),
        dispersion=(p @ (deltas - average).square().sum(1) / average.square().sum()).item(),
        norm_ratio=(norms.max() / norms.min()).item(),
    )


@dataclass(frozen=True, kw_only=True)
class Feasibility:
    """Whether the margins of classification are there."""

    separable: bool
    """All margins are positive at w: then the data are separable. False proves nothing."""
    min_margin: float
    """Least margin z.w of any row."""
    disagreement: float
    """max_i |v_i - average|: stays above 0 where the C_i have no common point."""


def feasibility(w: Tensor, x: Nodes) -> Feasibility:
    """Return it for w [d], the disagreement after one more round of projections."""
    v = project(w, x)
    margin = (x.rows @ w).min().item()
    apart = (v - mean(v, x.p)).norm(dim=1).max().item()
    return Feasibility(separable=margin > 0, min_margin=margin, disagreement=apart)
