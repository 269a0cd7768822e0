"""Rows of a SciPy CSR matrix as the solver wants them: less a centre, with a bias, and never made dense.

A centre would fill a sparse matrix, so it is taken out of the products instead: (A - 1 c^T) theta = A theta -
c . theta, and w^T (A - 1 c^T) = w^T A - (sum of w) c^T. SciPy multiplies: torch's transposed product with a
CSR matrix takes about 80 times as long (measured; torch 2.13, scipy 1.17, 5,000 rows, one thread).

Shape suffixes: N rows, D features (a bias included), E features without it, C columns of scores.
"""

from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


class SparseRows:
    """A table of rows (a - centre, bias), of which only a's stored values take memory.

    Example:
        >>> from scipy.sparse import csr_array
        >>> rows = SparseRows(csr_array([[0.0, 2.0], [0.0, 0.0]]), centre_E=np.array([0.0, 1.0]), bias=5.0)
        >>> rows.scores(torch.eye(3, dtype=torch.float64))
        tensor([[ 0.,  1.,  5.],
                [ 0., -1.,  5.]], dtype=torch.float64)
    """

    device = torch.device("cpu")

    def __init__(self, matrix_NE: Any, *, centre_E: Array | None = None, bias: float | None = None) -> None:
        """Keep the matrix.

        Args:
            matrix_NE: CSR, floats, no place stored twice.
            centre_E: what is taken from each row; none is nothing.
            bias: a constant last feature; none leaves it out.
        """
        self.matrix_NE = matrix_NE
        self.centre_E = None if centre_E is None else centre_E.astype(matrix_NE.dtype)
        self.bias = bias
        self.shape = (matrix_NE.shape[0], matrix_NE.shape[1] + (bias is not None))
        self.dtype = torch.float64 if matrix_NE.dtype == np.float64 else torch.float32
        self.row_bytes = matrix_NE.data.nbytes // max(1, self.shape[0])
        """Of stored values, on average."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def to(self, dtype: torch.dtype) -> Self:
        """Return the rows in fp32 or fp64."""
        if dtype == self.dtype:
            return self
        name = "float64" if dtype == torch.float64 else "float32"
        return type(self)(self.matrix_NE.astype(name), centre_E=self.centre_E, bias=self.bias)

    def part(self, rows: slice) -> Self:
        """Return consecutive rows, which share memory with these."""
        matrix = self.matrix_NE
        start, stop, _ = rows.indices(len(self))
        starts = matrix.indptr[start : stop + 1]
        stored = slice(starts[0], starts[-1])
        inner = type(matrix)(
            (matrix.data[stored], matrix.indices[stored], starts - starts[0]),
            shape=(stop - start, matrix.shape[1]),
            copy=False,
        )
        return type(self)(inner, centre_E=self.centre_E, bias=self.bias)

    def scores(self, theta_CD: Tensor) -> Tensor:
        """Return rows times weights, [N, C]."""
        theta_DC = theta_CD.numpy().T
        theta_EC = theta_DC[: self.matrix_NE.shape[1]]
        scores_NC = self.matrix_NE @ theta_EC
        if self.centre_E is not None:
            scores_NC -= self.centre_E @ theta_EC
        if self.bias is not None:
            scores_NC += self.bias * theta_DC[-1]
        return torch.from_numpy(scores_NC)

    def mixed(self, weights_NC: Tensor) -> Tensor:
        """Return sums of rows by weight, [C, D]."""
        weights = weights_NC.numpy()
        total_C = weights.sum(0)
        mixed_EC = self.matrix_NE.T @ weights
        if self.centre_E is not None:
            mixed_EC -= np.outer(self.centre_E, total_C)
        if self.bias is not None:
            mixed_EC = np.concatenate([mixed_EC, self.bias * total_C[None]])
        return torch.from_numpy(np.ascontiguousarray(mixed_EC.T))

    def lengths(self) -> Tensor:
        """Return the length of each row, fp64; NaN or Inf where a feature is."""
        squares = self.matrix_NE.astype(np.float64)
        squares.data **= 2
        squares_N = np.asarray(squares.sum(1)).ravel()
        if self.centre_E is not None:
            centre_E = self.centre_E.astype(np.float64)
            squares_N += centre_E @ centre_E - 2 * (self.matrix_NE @ centre_E)
            squares_N = np.maximum(squares_N, 0)  # of a row at the centre, rounding may leave less
        return torch.from_numpy(np.sqrt(squares_N + (self.bias or 0.0) ** 2))

    def num_not_finite(self) -> int:
        """Return how many rows hold NaN or Inf."""
        wrong = self.matrix_NE.copy()
        wrong.data = (~np.isfinite(wrong.data)).astype(np.float64)
        return int((np.asarray(wrong.sum(1)).ravel() > 0).sum())
