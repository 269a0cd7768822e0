"""What APOLLO does with the few numbers of a sketch: how long the step is, and how fast it may grow.

Paper: H. Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", 2024 (arXiv 2412.05270), algorithm
1; the limit on growth is that of Fira (X. Chen et al., 2024). Letters: s_j factor of channel j, c2_j its
gradient's squared norm, alpha scale, nu norm of the step, gamma largest growth of nu from step to step.
"""

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor

_linalg = cast(Any, torch.linalg)  # its decompositions carry no types


def length_ratio(after: Tensor, before: Tensor) -> Tensor:
    """Return s = sqrt(after / before) elementwise, and 0 where `before` is 0; arguments are squared lengths.

    The roots are taken first: of a channel that suddenly all but vanished the squared ratio is beyond fp32.
    """
    return torch.where(before > 0, after.sqrt() / before.sqrt(), 0)


def limit_growth(norm: Tensor, memory: Tensor, *, gamma: float) -> Tensor:
    """Return L, at least 1: dividing the step by it keeps its norm within gamma * memory.

    A memory of zero, or one that is not finite, limits nothing.
    """
    known = (memory > 0) & (memory < math.inf)
    return torch.where(known, norm / (gamma * torch.where(known, memory, 1)), 1).clamp(min=1)


def remember_norm(norm: Tensor, memory: Tensor, active: Tensor) -> Tensor:
    """Return the new memory; a norm of zero is never stored, or the next steps would be scaled to nothing."""
    return torch.where((active > 0) & (norm > 0), norm, memory)


def top_directions(
    matrix: Tensor, rank: int, *, contracts: Literal["rows", "cols"], method: Literal["gram", "exact"]
) -> Tensor:
    """Return the `rank` leading singular directions `[rank, d]` of a matrix along its contracted axis.

    Rows are orthonormal; the largest entry of each is positive, so the result is one of two only by rounding.
    What is not finite counts as zero.

    Args:
        matrix: `[rows, cols]`, any floating dtype.
        rank: directions wanted.
        contracts: "cols" gives right singular vectors, "rows" left ones.
        method: "gram" takes eigenvectors of the d x d product, the cheaper way; "exact" decomposes the
        matrix.
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32)).nan_to_num(0.0, 0.0, 0.0)
    tall = wide if contracts == "cols" else wide.T
    # A common factor changes no direction, and keeps the product within range.
    tall = tall / tall.abs().amax().clamp(min=torch.finfo(tall.dtype).tiny)
    vectors: Tensor
    if method == "gram":
        _, columns = cast(tuple[Tensor, Tensor], _linalg.eigh(tall.T @ tall))
        vectors = columns.flip(-1).T[:rank]
    else:
        _, _, rows = cast(tuple[Tensor, Tensor, Tensor], _linalg.svd(tall, full_matrices=False))
        vectors = rows[:rank]
    largest = vectors.gather(-1, vectors.abs().argmax(-1, keepdim=True))
    return (vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)).contiguous()
