"""EDiT: one round of N replicas, U units each a vector; DiLoCo and local SGD by their settings.

Paper: J. Cheng et al., "EDiT: A Local-SGD-Based Efficient Distributed Training Method for Large Language
Models", 2024 (arXiv 2412.07210). Letters: A anchor, B outer momentum, theta parameters of a replica, D = A -
theta, G its norm, mu, v, c mean, variance and number of accepted norms, z, delta threshold, alpha rate, W_det
accepted norms before z counts, w weight, T temperature, rho share of the steps, phi clip norm, S clipped
mean, eta_o, m_o learning rate and momentum outside; i replica, u unit.

Differs from the paper: statistics without bias from the first norm on, sigma at least `floor` mu, `relative`
T, rho, and a jump that several replicas (half, of several at least two) see in three rounds in a row is
accepted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The letters that stay the same."""

    eta_o: float = 0.8
    m_o: float = 0.85
    nesterov: bool = True
    phi: float = 10.0
    delta: float = 3.0
    alpha: float = 0.02
    W_det: int = 20
    floor: float = 0.05
    T: float = 1.0
    relative: bool = False
    rho: float = 0.0


def diloco(**letters: float) -> Settings:
    """Return the settings of DiLoCo: the mean, no penalty."""
    return replace(
        Settings(eta_o=0.7, m_o=0.9, phi=float("inf"), delta=float("inf"), T=float("inf")), **letters
    )


def local_sgd() -> Settings:
    """Return the settings of local SGD: the mean of the parameters."""
    return diloco(eta_o=1.0, m_o=0.0)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Of one replica's unit."""

    mu: float = 0.0
    v: float = 0.0
    c: int = 0


@dataclass(frozen=True, kw_only=True)
class State:
    """What lasts from round to round, and the last round's w and bad for whoever compares."""

    A: list[Tensor]
    B: list[Tensor]
    stats: list[list[Stats]]
    """Of replica i, unit u."""
    streak: list[int]
    """Rounds in a row in which several replicas flagged unit u."""
    w: Tensor | None = None
    """[N, U]."""
    bad: Tensor | None = None
    """[N, U], bool."""


def start(A: Sequence[Tensor], *, N: int) -> State:
    """Return the state before the first round, in which theta = A on all N replicas."""
    A = [a.double() for a in A]
    B = [torch.zeros_like(a) for a in A]
    return State(A=A, B=B, stats=[[Stats() for _ in A] for _ in range(N)], streak=[0 for _ in A])


def anomalous(G: float, s: Stats, c: Settings) -> bool:
    sigma = max(s.v**0.5, c.floor * s.mu, 2.0**-1022)
    return not G < float("inf") or (s.c >= c.W_det and (G - s.mu) / sigma > c.delta)


def learn(G: float, s: Stats, c: Settings) -> Stats:
    n = s.c + 1
    a, d = max(c.alpha, 1 / n), G - s.mu
    return Stats(mu=s.mu + a * d, v=(1 - a) * (s.v + a * d * d), c=n)


def weights(G: Tensor, bad: Tensor, steps: Tensor, c: Settings) -> Tensor:
    """Return w [N] of one unit; zeros where no replica is left."""
    w, ok = torch.zeros(len(G), dtype=torch.float64), ~bad
    if ok.any():
        T = c.T * G[ok].mean() if c.relative else c.T
        w[ok] = (1 - c.rho) * torch.softmax(-G[ok] / T, 0) + c.rho * steps[ok] / steps[ok].sum()
    return w


def edit(x: State, thetas: Sequence[Sequence[Tensor]], c: Settings, *, steps: Tensor | None = None) -> State:
    """Return the state after a round; A is then also theta of each replica.

    Args:
        x: the state before it.
        thetas: the parameters of replica i, unit u.
        c: settings.
        steps: [N] inner steps since the last round; none is equally many.
    """
    N, U = len(thetas), len(x.A)
    steps = torch.ones(N, dtype=torch.float64) if steps is None else steps.double()
    D = [[x.A[u] - theta[u].double() for u in range(U)] for theta in thetas]
    G = torch.stack([torch.stack([d.norm() for d in row]) for row in D])
    bad = torch.tensor([[anomalous(G[i, u].item(), x.stats[i][u], c) for u in range(U)] for i in range(N)])
    w = torch.stack([weights(G[:, u], bad[:, u], steps, c) for u in range(U)], 1)
    A, B, streak = list(x.A), list(x.B), list(x.streak)
    stats = [list(row) for row in x.stats]
    for u in range(U):
        ok = [i for i in range(N) if not bad[i, u]]
        if ok:
            S = torch.stack([w[i, u] * D[i][u] for i in ok]).sum(0)
            S = S * min(1.0, c.phi / (S.norm().item() + 1e-6))
            B[u] = c.m_o * B[u] + S
            A[u] = A[u] - c.eta_o * (S + c.m_o * B[u] if c.nesterov else B[u])
        together = (bad[:, u] & G[:, u].isfinite()).sum().item()
        streak[u] = streak[u] + 1 if together >= max(N / 2, min(N, 2)) else 0
        anew = streak[u] == 3
        for i in range(N):
            if anew:
                stats[i][u] = Stats()
            if G[i, u].isfinite() and (anew or not bad[i, u]):
                stats[i][u] = learn(G[i, u].item(), stats[i][u], c)
        streak[u] = 0 if anew else streak[u]
    return State(A=A, B=B, stats=stats, streak=streak, w=w, bad=bad)
