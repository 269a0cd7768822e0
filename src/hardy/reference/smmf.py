"""SMMF, one tensor at a time: both moments as two vectors each, and the signs of the first.

Paper: K. Park, S. Lee, "SMMF: Square-Matricized Momentum Factorization for Memory-Efficient Optimization",
AAAI 2025 (arXiv 2412.08894). Letters: W tensor of N elements, G gradient, (nh, mh) shape of the matrix,
element k of W at i = k // mh, j = k % mh; r_M, c_M, r_V, c_V factors, S signs (+1 or -1); t step from 1,
beta1 = beta lambda^(t-1), beta2 = 1 - t^gamma, eta learning rate, lam weight decay, u direction.

Differs from the paper: `mask` leaves a weight alone where its gradient is exactly 0 (False: as published);
`max_update` and `beta1_floor` are ours; a step of zeros at learning rate 0 changes nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The letters that stay the same."""

    eta: float = 1e-3
    beta: float | None = 0.9
    """None: no momentum."""
    growth: float = 0.999
    """lambda."""
    gamma: float = -0.8
    eps: float = 1e-8
    lam: float = 0.0
    decay: Literal["adamw", "l2"] = "adamw"
    beta1_floor: float = 0.0
    max_update: float = math.inf
    mask: bool = True


@dataclass(frozen=True, kw_only=True)
class State:
    """What a tensor carries from step to step, and the last step's u, m and v for whoever compares."""

    W: Tensor
    r_M: Tensor
    c_M: Tensor
    r_V: Tensor
    c_V: Tensor
    S: Tensor
    t: int = 0
    u: Tensor | None = None
    m: Tensor | None = None
    v: Tensor | None = None


def shape(N: int) -> tuple[int, int]:
    """Return (nh, mh): mh is the largest divisor of N not above its root."""
    mh = max(d for d in range(1, math.isqrt(N) + 1) if N % d == 0)
    return N // mh, mh


def start(W: Tensor, *, matrix: tuple[int, int] | None = None) -> State:
    """Return the state before the first step; a `matrix` of more than N elements lacks the last ones."""
    nh, mh = matrix or shape(W.numel())
    row, col = torch.zeros(nh, dtype=torch.float64), torch.zeros(mh, dtype=torch.float64)
    return State(W=W.double(), r_M=row, c_M=col, r_V=row, c_V=col, S=-torch.ones_like(W, dtype=torch.float64))


def schedules(t: int, c: Settings) -> tuple[float, float]:
    """Return beta1 and beta2 of step t."""
    beta1 = 0.0 if c.beta is None else max(c.beta * c.growth ** (t - 1), c.beta1_floor)
    return beta1, 1 - t**c.gamma


def step(x: State, G: Tensor, c: Settings) -> State:
    g = G.to(x.W.dtype) + (c.lam * x.W if c.decay == "l2" else 0.0)
    if c.eta == 0 and (G == 0).all():
        return x
    t, mh = x.t + 1, len(x.c_V)
    beta1, beta2 = schedules(t, c)
    k = torch.arange(g.numel()).view(g.shape)
    i, j = k // mh, k % mh
    m = beta1 * x.S * x.r_M[i] * x.c_M[j] + (1 - beta1) * g
    v = beta2 * x.r_V[i] * x.c_V[j] + (1 - beta2) * g * g
    u = (m / (v.sqrt() + c.eps)).clamp(-c.max_update, c.max_update)
    if c.mask:
        u = torch.where(G == 0, 0.0, u)
    W = (1 - (c.eta * c.lam if c.decay == "adamw" else 0.0)) * x.W - c.eta * u
    r_M, c_M = factors(m.abs(), i, j, x.r_M, x.c_M)
    r_V, c_V = factors(v, i, j, x.r_V, x.c_V)
    S = torch.where(m > 0, 1.0, -1.0).to(x.W.dtype)
    return State(W=W, r_M=r_M, c_M=c_M, r_V=r_V, c_V=c_V, S=S, t=t, u=u, m=m, v=v)


def factors(X: Tensor, i: Tensor, j: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the one-shot rank-one factors of a non-negative X, shaped as the old ones `r` and `c`."""
    row = torch.zeros_like(r).index_add(0, i.flatten(), X.flatten())
    col = torch.zeros_like(c).index_add(0, j.flatten(), X.flatten())
    return row, col / col.sum() if col.sum() > 0 else col


def smmf(
    W: Tensor, Gs: Sequence[Tensor], c: Settings, *, matrix: tuple[int, int] | None = None
) -> list[State]:
    """Return the states after each gradient of `Gs`."""
    x = start(W, matrix=matrix)
    states: list[State] = []
    for G in Gs:
        x = step(x, G, c)
        states.append(x)
    return states


def dense(W: Tensor, Gs: Sequence[Tensor], c: Settings) -> list[Tensor]:
    """Return the weights of the same recursion with whole M and V, as for vectors that are not reshaped."""
    W, M, V = W.double(), torch.zeros_like(W, dtype=torch.float64), torch.zeros_like(W, dtype=torch.float64)
    Ws: list[Tensor] = []
    for t, G in enumerate((G.double() for G in Gs), start=1):
        beta1, beta2 = schedules(t, c)
        g = G + (c.lam * W if c.decay == "l2" else 0.0)
        M = beta1 * M + (1 - beta1) * g
        V = beta2 * V + (1 - beta2) * g * g
        u = (M / (V.sqrt() + c.eps)).clamp(-c.max_update, c.max_update)
        if c.mask:
            u = torch.where(G == 0, 0.0, u)
        W = (1 - (c.eta * c.lam if c.decay == "adamw" else 0.0)) * W - c.eta * u
        Ws.append(W)
    return Ws
