"""SMMF's square-ish matrix: its rank-one factors, and where a part of the tensor lies in it.

Paper: K. Park, S. Lee, "SMMF: Square-Matricized Momentum Factorization", AAAI 2025 (arXiv 2412.08894).
Letters: N = numel, nh = height, mh = width, r = row factor, c = column factor. Element k of the tensor, in
row-major order, is element (k // width, k % width) of the matrix.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hardy.ops.matrix_shape import ShapePolicy as ShapePolicy
from hardy.ops.matrix_shape import matrix_shape as matrix_shape


class Factors(NamedTuple):
    """Two vectors whose outer product stands for a non-negative matrix."""

    row: Tensor
    """[height]."""
    col: Tensor
    """[width]."""


class Block(NamedTuple):
    """A rectangle of the matrix that is a rectangle of a flat buffer too.

    Its element (a, b) is buffer element `offset + a * step + b` and matrix element
    (`row + a * row_step`, `col + b`).
    """

    offset: int
    height: int
    width: int
    step: int
    row: int
    row_step: int
    col: int

    def of(self, buffer: Tensor) -> Tensor:
        """Return the rectangle of a flat buffer, [height, width]."""
        return buffer.as_strided(
            (self.height, self.width), (self.step, 1), buffer.storage_offset() + self.offset
        )

    @property
    def rows(self) -> slice:
        """Which entries of a row factor belong to it."""
        return slice(self.row, self.row + (self.height - 1) * self.row_step + 1, self.row_step)

    @property
    def cols(self) -> slice:
        """Which entries of a column factor belong to it."""
        return slice(self.col, self.col + self.width)


def compress(row_sums: Tensor, col_sums: Tensor) -> Factors:
    """Return the rank-one factors of a non-negative matrix from its row sums and column sums.

    Their product has the sums that it was made from; it is the matrix itself where that has rank one. The
    column factor is divided by its total where that is above 0. Dimensions before the last are a stack.

    Example:
        >>> matrix = torch.tensor([[1.0, 3.0], [2.0, 6.0]])
        >>> expand(*compress(matrix.sum(1), matrix.sum(0))).tolist()
        [[1.0, 3.0], [2.0, 6.0]]
    """
    total = col_sums.sum(-1, keepdim=True)
    return Factors(row=row_sums, col=col_sums / torch.where(total > 0, total, 1.0))


def expand(row: Tensor, col: Tensor) -> Tensor:
    """Return the matrix that two factors stand for, [height, width]; for tests and small tensors."""
    return torch.outer(row, col)


def blocks(*, start: int, stride: int, shape: tuple[int, int], width: int) -> Iterator[Block]:
    """Yield blocks that cover a buffer whose element (i, j) is element start + i * stride + j of the whole.

    Few blocks whatever the cut: rows that follow each other in the whole are one run of at most three blocks;
    else rows that begin in the same matrix column go together.

    Args:
        start: Flat index in the whole tensor of the buffer's first element.
        stride: Flat indices from one row of the buffer to the next.
        shape: Rows and columns of the buffer, which is contiguous.
        width: Columns of the matrix.

    Example:
        >>> [(b.row, b.col, b.height, b.width) for b in blocks(start=5, stride=4, shape=(4, 4), width=6)]
        [(0, 5, 1, 1), (1, 0, 2, 6), (3, 0, 1, 3)]
    """
    rows, cols = shape
    if rows == 1 or stride == cols:
        yield from _run(0, start, rows * cols, width)
        return
    period = width // math.gcd(stride, width)
    if min(period, rows) * (cols // width + 2) <= 3 * rows:
        for first in range(min(period, rows)):
            yield from _alike(first, period, start + first * stride, stride, shape, width)
    else:
        for row in range(rows):
            yield from _run(row * cols, start + row * stride, cols, width)


def _run(offset: int, start: int, count: int, width: int) -> Iterator[Block]:
    """Cut one flat run into the end of a first matrix row, whole rows, and the beginning of a last one."""
    row, col = divmod(start, width)
    head = min(count, (width - col) % width)
    if head:
        yield Block(offset, 1, head, head, row, 1, col)
        offset, row = offset + head, row + 1
    height, tail = divmod(count - head, width)
    if height:
        yield Block(offset, height, width, width, row, 1, 0)
    if tail:
        yield Block(offset + height * width, 1, tail, tail, row + height, 1, 0)


def _alike(
    first: int, period: int, start: int, stride: int, shape: tuple[int, int], width: int
) -> Iterator[Block]:
    """Cover rows first, first + period, ..., which begin in the same matrix column."""
    rows, cols = shape
    height = -(-(rows - first) // period)
    row, col = divmod(start, width)
    done = 0
    while done < cols:
        here = min(cols - done, width - col)
        yield Block(first * cols + done, height, here, period * cols, row, period * stride // width, col)
        done, row, col = done + here, row + 1, 0
