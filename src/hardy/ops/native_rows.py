"""Numbers of the rows of a stack, and weighted sums of rows, in C++ for CPUs (`native_rows.hpp`).

Why C++: 16 rows of 10 M numbers, two threads, as a ratio to `torch.mean` over the rows. Squared norms and
products with one vector: torch by chunks 2.1, this 1.0. Results do not depend on the number of threads.

Shape suffixes: N rows, D columns.
"""

import ctypes
import functools
from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hardy.ops import native_build
from hardy.ops.native_ops import register


def can_walk(*tensors: Tensor) -> bool:
    """Return whether the C++ can work on tensors: fp32 on the CPU, columns side by side; and it compiles."""
    return (
        all(x.is_cpu and x.dtype == torch.float32 and x.stride(-1) == 1 for x in tensors)
        and _functions() is not None
    )


def row_sums(rows_ND: Tensor, reference_D: Tensor | None) -> Tensor:
    """Return squared norms of the rows and of the reference, and the rows' products with it.

    Args:
        rows_ND: see `can_walk`.
        reference_D: none leaves its square and the products 0.

    Returns:
        float64 of shape (2, N + 1); the reference is the last of the first row, the last of the second is 0.
    """
    sums = torch.empty(2, rows_ND.shape[0] + 1, dtype=torch.float64)
    _operators()["row_sums"](rows_ND.detach(), reference_D, sums)
    return sums


def mix_rows(rows: Sequence[Tensor], weights: Sequence[float], *, into: Tensor) -> None:
    """Write the sum of rows by weight into a vector; see `can_walk` for all of them."""
    _operators()["mix_rows"]([row.detach() for row in rows], list(weights), into)


@functools.cache
def _functions() -> dict[str, Callable[..., int]] | None:
    library = native_build.loaded_library()
    if library is None:
        return None
    word = ctypes.c_int64
    library.native_row_sums.argtypes = [word] * 7
    library.native_mix_rows.argtypes = [word] * 6
    return {"row_sums": library.native_row_sums, "mix_rows": library.native_mix_rows}


@functools.cache
def _operators() -> dict[str, Callable[..., None]]:
    """Register the operators and return them by name."""
    return {
        "row_sums": register("row_sums", "Tensor rows, Tensor? reference, Tensor(a!) out", _row_sums),
        "mix_rows": register("mix_rows", "Tensor[] rows, float[] weights, Tensor(a!) out", _mix_rows),
    }


def _row_sums(rows_ND: Tensor, reference_D: Tensor | None, out: Tensor) -> None:
    num_rows, num_columns = rows_ND.shape
    assert reference_D is None or reference_D.shape == (num_columns,)
    where = (rows_ND.data_ptr(), num_rows, rows_ND.stride(0), num_columns)
    _call("row_sums", *where, 0 if reference_D is None else reference_D.data_ptr(), out.data_ptr())


def _mix_rows(rows: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    assert len(rows) == len(weights) and all(row.shape == out.shape for row in rows)
    places, factors = array("q", [row.data_ptr() for row in rows]), array("f", weights)
    where = (places.buffer_info()[0], factors.buffer_info()[0], len(rows), out.numel())
    _call("mix_rows", *where, out.data_ptr())


def _call(name: str, *words: int) -> None:
    found = _functions()
    assert found is not None
    if found[name](*words, torch.get_num_threads()):
        raise MemoryError("no memory is left for the sums over a stack of gradients")
