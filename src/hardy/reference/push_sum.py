"""Push-sum in float64 with dense matrices: SGP, SGAP, MSGP, MSGAP, SADDOPT.

Paper: "Adaptive Weighting Push-SUM" (arXiv 2412.07252), in the order in which the authors' code acts; the
paper itself could not be read in full. Letters: N nodes, t step, x [N, d] numerators, a [N] masses, z = x /
a, g gradients at z, m momentum, y tracked gradients, W [N, N] with w_{i<-j} in row i and column j (columns
sum to 1), A [N, N] with A[j, i] = 1 where i sends to j, itself included (column i is O_i); b[i, j] what i
holds of j's last half step, r[i, j] whether it ever heard from j; v, k of the Moreau weight; eta step size,
mu momentum rate. Differs from the paper: masses are fp64, and nothing is reset at epochs. `backwards` lets
receivers answer, so that b and r are known along every edge in both directions, as the library's sketches
are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Grad = Callable[[Tensor, int], Tensor]
"""(z [N, d], t) -> g [N, d]."""


@dataclass
class Nodes:
    """All that the nodes hold."""

    x: Tensor
    a: Tensor
    m: Tensor
    b: Tensor
    r: Tensor
    y: Tensor
    g: Tensor
    t: int = 0

    @property
    def z(self) -> Tensor:
        """De-biased parameters."""
        return self.x / self.a[:, None]


@dataclass(frozen=True)
class Gate:
    """The adaptive weights."""

    k: float
    v: float = 0.1
    scale: str = "raw"
    debiased: bool = False
    backwards: bool = False


def start(x: Tensor) -> Nodes:
    N, d = x.shape
    m, y, g = torch.zeros(3, N, d, dtype=torch.float64)
    b, r = torch.zeros(N, N, d, dtype=torch.float64), torch.zeros(N, N, dtype=torch.bool)
    return Nodes(x=x.double().clone(), a=torch.ones(N, dtype=torch.float64), m=m, b=b, r=r, y=y, g=g)


def uniform(A: Tensor) -> Tensor:
    """SGP: w = 1 / |O_i| for all of O_i, itself included."""
    return A.double() / A.double().sum(0)


def moreau(A: Tensor, D: Tensor, *, v: float, k: float) -> Tensor:
    """SGAP: w_{j<-i} = (1-v)/(1+v) (1 + v - exp(-k D[i, j])) / |O_i|; the sender keeps the rest."""
    N = len(A)
    w = (1 - v) / (1 + v) * (v - torch.expm1(-k * D.T)) / A.double().sum(0)
    w = torch.where((A > 0) & ~torch.eye(N, dtype=torch.bool), w, 0.0)
    return w + torch.diag(1 - w.sum(0))


def distances(nodes: Nodes, *, scale: str = "raw") -> Tensor:
    """D[i, j] = ||b_i[i] - b_i[j]||^2 where i ever heard from j, else 0; raw, or relative to ||b_i[i]||^2."""
    own = torch.diagonal(nodes.b).T
    D = (own[:, None] - nodes.b).square().sum(2)
    if scale == "relative":
        D = D / own.square().sum(1, keepdim=True).clamp(min=1e-30)
    if scale == "per_parameter":
        D = D / nodes.x.shape[1]
    return torch.where(nodes.r, D, 0.0)


def hear(nodes: Nodes, half: Tensor, A: Tensor, *, backwards: bool) -> None:
    """b_i[j] <- x_j^h for every j that i hears from, itself included; with `backwards` from receivers too."""
    heard = (A + A.T if backwards else A) > 0
    nodes.b = torch.where(heard[:, :, None], half[None], nodes.b)
    nodes.r = nodes.r | heard


def push(
    nodes: Nodes, grad: Grad, A: Tensor, *, eta: float, mu: float = 0.0, gate: Gate | None = None
) -> Tensor:
    """One step of SGP, SGAP (with a gate), MSGP or MSGAP (mu > 0), in place on `nodes`; returns W."""
    W, a = uniform(A), nodes.a
    if gate is not None:
        W = moreau(A, distances(nodes, scale=gate.scale), v=gate.v, k=gate.k)
    nodes.m = mu * nodes.m + grad(nodes.z, nodes.t)
    half = nodes.x - eta * nodes.m
    nodes.a = W @ a
    nodes.x = W @ half
    if gate is not None:
        hear(nodes, half / a[:, None] if gate.debiased else half, A, backwards=gate.backwards)
    nodes.t += 1
    return W


def saddopt(nodes: Nodes, grad: Grad, W: Tensor, *, eta: float) -> None:
    """y <- W y + g(t) - g(t-1), then x <- W x - eta y: mix first, then subtract. In place on `nodes`."""
    g = grad(nodes.z, nodes.t)
    nodes.y = W @ nodes.y + g - nodes.g
    nodes.x = W @ nodes.x - eta * nodes.y
    nodes.a = W @ nodes.a
    nodes.g = g
    nodes.t += 1


def average(x: Tensor, Ws: list[Tensor], lost: list[Tensor], *, rule: str) -> tuple[Tensor, Tensor]:
    """Average without gradients while messages are lost; return z and a.

    `lost[t][i, j]` is true where j's message to i does not arrive. Rules: "both" loses x and a, "numerator" x
    alone, "reabsorb" gives both back to the sender, "running_sum" sends all that was ever given each time.
    """
    x, a = x.double().clone(), torch.ones(len(x), dtype=torch.float64)
    owed = torch.zeros(len(x), len(x), x.shape[1] + 1, dtype=torch.float64)
    for W, gone in zip(Ws, lost, strict=True):
        kept = torch.where(gone, 0.0, W)
        if rule == "reabsorb":
            kept = kept + torch.diag((W - kept).sum(0))
        if rule == "running_sum":
            both = torch.cat([x, a[:, None]], 1)
            own = torch.diag(W)[:, None] * both
            owed += (W - torch.diag(torch.diag(W)))[:, :, None] * both[None]
            arrives = (W > 0) & ~gone
            both = own + torch.where(arrives[:, :, None], owed, 0.0).sum(1)
            owed = torch.where(arrives[:, :, None], 0.0, owed)
            x, a = both[:, :-1], both[:, -1]
        else:
            x, a = kept @ x, (W if rule == "numerator" else kept) @ a
    return x / a[:, None], a
