"""APOLLO, APOLLO-Mini and the basis of APOLLO-SVD, one weight at a time.

Paper: H. Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", 2024 (arXiv 2412.05270), algorithm 1
and equations 4-8. Letters: W weight, G gradient, P projection [r, d], R projected gradient, M and V its
moments, Rt = M / (sqrt(V) + eps), s factor of a channel, alpha scale, gamma limiter, T steps between two
projections, eta learning rate, lam weight decay, b1, b2, t steps that counted, k calls, nu norm of the step.
d = min(rows, cols) is contracted; channels are the rows of a tall weight, the columns of a wide one.

Differs from the paper: Adam's bias correction (published numbers have it), a limiter that never remembers a
zero norm, weight decay on the old weight, and a step without gradient that changes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The letters that stay the same."""

    eta: float = 1e-3
    alpha: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-12
    lam: float = 0.0
    gamma: float = 1.01
    T: int = 200
    """Calls between two projections."""
    scale_type: Literal["channel", "tensor"] = "channel"
    limiter: Literal["reference", "corrected", "off"] = "reference"
    """Whether the limiter sees the step without bias correction, with it, or nothing."""
    zero_grad: Literal["skip", "decay"] = "skip"
    bias_correction: bool = True


@dataclass(frozen=True, kw_only=True)
class State:
    """What a weight carries from step to step."""

    W: Tensor
    M: Tensor
    V: Tensor
    t: int = 0
    nu: float = 0.0
    """Norm that the limiter remembers; 0 before the first step."""


def start(W: Tensor, *, r: int) -> State:
    rows, cols = W.shape
    R = torch.zeros((rows, r) if rows >= cols else (r, cols), dtype=torch.float64)
    return State(W=W.double(), M=R, V=R)


def step(x: State, G: Tensor, P: Tensor, c: Settings) -> State:
    """Return the state after one gradient; P as it multiplies, so N(0, 1/r) entries where it is random."""
    G = G.to(x.W.dtype)
    tall = G.shape[0] >= G.shape[1]
    channel = 1 if tall else 0  # sums over this dimension are sums over one channel
    R = G @ P.T if tall else P @ G
    c2 = (G * G).sum(channel, keepdim=True)
    S2 = c2.sum()
    if not S2.isfinite() or (S2 == 0 and (c.zero_grad == "skip" or c.eta == 0)):
        return x
    t = x.t + 1
    M = c.b1 * x.M + (1 - c.b1) * R
    V = c.b2 * x.V + (1 - c.b2) * R * R
    Rt = M / (V.sqrt() + c.eps)
    s = factor(R, Rt, channel=channel, scale_type=c.scale_type)
    bc = (1 - c.b2**t) ** 0.5 / (1 - c.b1**t) if c.bias_correction else 1.0
    nu = c.alpha * (s * s * c2).sum().sqrt().item() * (bc if c.limiter == "corrected" else 1.0)
    L = 1.0
    if c.limiter != "off" and 0 < x.nu < float("inf"):
        L = max(nu / (c.gamma * x.nu), 1.0)
    W = (1 - c.eta * c.lam) * x.W - c.eta * bc * c.alpha / L * s * G
    return State(W=W, M=M, V=V, t=t, nu=nu / L if nu > 0 else x.nu)


def factor(R: Tensor, Rt: Tensor, *, channel: int, scale_type: str) -> Tensor:
    """Return s, which multiplies the gradient: the norm after Adam over the norm before, 0 over 0 being 0."""
    before, after = ((X * X).sum(channel, keepdim=True) for X in (R, Rt))
    if scale_type == "tensor":
        before, after = before.sum().view(1, 1), after.sum().view(1, 1)
    return torch.where(before > 0, (after / before).sqrt(), 0.0)


def apollo(W: Tensor, Gs: Sequence[Tensor], projection: Callable[[int], Tensor], c: Settings) -> list[State]:
    """Return the states after each gradient of `Gs`; `projection(e)` is P [r, d] of epoch e."""
    x = start(W, r=projection(0).shape[0])
    states: list[State] = []
    for k, G in enumerate(Gs, start=1):
        x = step(x, G, projection((k - 1) // c.T).double(), c)
        states.append(x)
    return states


def mini(**letters: float) -> Settings:
    """Return the settings of APOLLO-Mini; its projection has rank 1."""
    return replace(Settings(scale_type="tensor", alpha=128**0.5), **letters)


def svd_basis(G: Tensor, r: int) -> Tensor:
    """Return P of APOLLO-SVD, [r, d] with orthonormal rows: the top singular vectors on the contracted side.

    The entry of largest magnitude of each vector is positive.
    """
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    P = (Vh if G.shape[0] >= G.shape[1] else U.T)[:r]
    largest = P.gather(1, P.abs().argmax(1, keepdim=True))
    return P * largest.sign()
