"""GaLore, one weight at a time: Adam in the basis of the gradient's top singular vectors. For comparison.

Paper: J. Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024
(arXiv 2403.03507), algorithm 2. Letters: W weight [m, n], G gradient, P basis, R gradient in it, M and V its
moments, N Adam's direction in it, alpha scale, r rank, T steps between two bases, eta learning rate.
Unlike APOLLO's, the update has rank r: it is projected back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The letters that stay the same."""

    r: int
    eta: float = 1e-3
    alpha: float = 0.25
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    lam: float = 0.0
    """Weight decay, decoupled, on the old weight; the paper has none."""
    T: int = 200


def basis(G: Tensor, r: int) -> Tensor:
    """Return P with orthonormal columns: left vectors [m, r] if m <= n, else right vectors [n, r]."""
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U[:, :r] if G.shape[0] <= G.shape[1] else Vh[:r].T


def galore(W: Tensor, Gs: Sequence[Tensor], c: Settings) -> list[Tensor]:
    """Return the weights after each gradient of `Gs`; the moments stay as they are when the basis changes."""
    W = W.double()
    left = W.shape[0] <= W.shape[1]
    M = V = P = torch.zeros(())
    Ws: list[Tensor] = []
    for t, G in enumerate((G.double() for G in Gs), start=1):
        if (t - 1) % c.T == 0:
            P = basis(G, c.r)
        R = P.T @ G if left else G @ P
        M = c.b1 * M + (1 - c.b1) * R
        V = c.b2 * V + (1 - c.b2) * R * R
        N = (M / (1 - c.b1**t)) / ((V / (1 - c.b2**t)).sqrt() + c.eps)
        W = (1 - c.eta * c.lam) * W - c.eta * c.alpha * (P @ N if left else N @ P.T)
        Ws.append(W)
    return Ws
