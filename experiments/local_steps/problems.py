"""The data: separable classification, regression that can be fitted, and regression that cannot."""

import numpy as np
import torch

from hardy.reference import local_gd as gd

M, N, D = 4, 6, 60
"""Nodes, rows of each, features."""


def _rows(rng, *size):
    return torch.from_numpy(rng.normal(size=size))


def _separable(rng):
    w_true = rng.normal(size=D)
    Zs = []
    for _ in range(M):
        shift = 2 * rng.normal(size=D)
        X = rng.normal(size=(N, D)) + shift
        Zs.append(torch.from_numpy(np.sign(X @ w_true)[:, None] * X))
    return gd.nodes(Zs)


def separable():
    """Return rows y*x whose signs a hidden vector decides; inputs of a node share a shift."""
    return _separable(np.random.default_rng(0))


def fitted():
    """Return regression with exact targets, drawn after the rows of `separable` from the same stream."""
    rng = np.random.default_rng(0)
    _separable(rng)
    theta = _rows(rng, D)
    As = [_rows(rng, N, D) for _ in range(M)]
    return gd.nodes(As, [A @ theta for A in As])


def shifted(*, p=None):
    """Return regression with exact targets whose rows share a shift on each node."""
    rng = np.random.default_rng(1)
    theta = _rows(rng, D)
    As = [_rows(rng, N, D) + _rows(rng, D) for _ in range(M)]
    return gd.nodes(
        As, [A @ theta for A in As], p=None if p is None else torch.tensor(p, dtype=torch.float64)
    )


def contradicting():
    """Return regression nothing fits: 20 noisy rows a node, its own truth, rows of size 1, 2, 4, 8."""
    rng = np.random.default_rng(0)
    As = [2.0**i * _rows(rng, 20, 5) for i in range(M)]
    return gd.nodes(As, [A @ _rows(rng, 5) + 0.1 * _rows(rng, 20) for A in As])


def largest_stable_step(x):
    """Return 1 / the largest eigenvalue of any H_i."""
    hessians = x.Z.mT @ x.Z / x.n.double()[:, None, None]
    return 1 / torch.linalg.eigvalsh(hessians).max().item()
