"""Walks over a stack of vectors, some columns at a time: sums in float64 of float32 products, weighted sums.

One float32 product over a long row loses digits (squared norms of 16 M elements: 3.5e-3), and sums over a
whole stack lose the cache: so everything goes by chunks of columns, and what chunks give is added up in fp64.
Letters: N rows of the stack, n rows in use, c columns of a chunk, d columns of a block, g trusted gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hardy.ops.native_rows import can_walk, mix_rows, row_sums

Total = Callable[[Tensor], Tensor]
"""Adds float64 numbers over the workers that hold the other columns of the same stack."""

CPU_CHUNK = 1 << 15
"""Columns of a chunk for each thread: 16 rows of it stay in a core's second cache, and torch gives a thread
no fewer elements."""
OTHER_CHUNK = 1 << 22
"""Columns of a chunk on other devices, where launches cost more than memory."""

PRODUCT = 1 << 16
"""Columns of which float32 adds up products of different rows."""

PIECE = 1 << 12
"""Columns of which float32 adds up squares: their error is 1e-8, that of a whole chunk 20 times as much."""

SMALLEST_SQUARE, LARGEST_SQUARE = 1e-25, 1e30
"""Between these, float32 products of a row neither overflow nor vanish, whatever the row looks like."""


def identity(numbers: Tensor) -> Tensor:
    """Return what is given: the total where one worker holds all columns."""
    return numbers


def chunks(block: Tensor) -> Iterator[slice]:
    """Yield the columns of `block`, the last dimension, piece by piece."""
    size = CPU_CHUNK * torch.get_num_threads() if block.is_cpu else OTHER_CHUNK
    for begin in range(0, block.shape[-1], size):
        yield slice(begin, min(begin + size, block.shape[-1]))


@contextmanager
def exact_products() -> Iterator[None]:
    """Take all digits of float32 in products, whatever the program allows elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def working_dtype(block: Tensor) -> torch.dtype:
    """Return float64 for float64, else float32."""
    return torch.float64 if block.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, kw_only=True)
class RowNumbers:
    """What is known of each row before any rule: float64, on the CPU, equal on all workers."""

    squares_N: Tensor
    """Squared norms; not finite exactly where the row holds NaN or infinity (or, in fp64, exceeds 1e154)."""
    dots_N: Tensor | None
    """Dots with the trusted gradient."""
    reference_square: float
    """Squared norm of the trusted gradient; NaN without one."""


def row_numbers(blocks: Sequence[Tensor], references: Sequence[Tensor] | None, total: Total) -> RowNumbers:
    """Return the squared norm of each row and its dot with the references; one wait for the device.

    Rows whose float32 sums overflow or vanish are summed again in float64.
    """
    num_rows, device = blocks[0].shape[0], blocks[0].device
    every = range(num_rows)
    sums_KN = total(_row_sums(blocks, references, every, torch.float32).to(device)).cpu()
    squares_N, dots_N, square = sums_KN[0, :num_rows], sums_KN[1, :num_rows], sums_KN[0, num_rows]
    again = (
        every if references is not None and _extreme(square) else [i for i in every if _extreme(squares_N[i])]
    )
    again = again or [i for i in every if not dots_N[i].isfinite()]
    if again:
        sums_Kn = total(_row_sums(blocks, references, again, torch.float64).to(device)).cpu()
        squares_N[again], dots_N[again], square = sums_Kn[0, :-1], sums_Kn[1, :-1], sums_Kn[0, -1]
    if references is None:
        return RowNumbers(squares_N=squares_N, dots_N=None, reference_square=torch.nan)
    return RowNumbers(squares_N=squares_N, dots_N=dots_N, reference_square=square.item())


def _extreme(square: Tensor) -> bool:
    """Whether a squared norm from float32 products may be wrong; NaN is."""
    return not bool((square > SMALLEST_SQUARE) & (square < LARGEST_SQUARE))


def _row_sums(
    blocks: Sequence[Tensor], references: Sequence[Tensor] | None, rows: Sequence[int], least: torch.dtype
) -> Tensor:
    """Return this worker's squared norms of `rows`, the references last, and their dots: fp64 [2, n + 1]."""
    sums = torch.zeros(2, len(rows) + 1, dtype=torch.float64, device=blocks[0].device)
    for number, block in enumerate(blocks):
        trusted = None if references is None else references[number]
        if least == torch.float32 and len(rows) == len(block) and can_walk(*_there(block, trusted)):
            sums += row_sums(block, trusted)
            continue
        here = torch.zeros_like(sums, device=block.device)
        dtype = torch.promote_types(least, working_dtype(block))
        loader = Loader(block, rows, dtype=dtype)
        for where in chunks(block):
            x_nc = loader.view(where)
            here[0, :-1] += square_rows(x_nc)
            if trusted is not None:
                g_c = trusted[where].to(block.device, dtype)
                here[0, -1:] += square_rows(g_c[None])
                for x_nc_part, g_c_part in zip(x_nc.split(PRODUCT, 1), g_c.split(PRODUCT), strict=True):
                    here[1, :-1] += torch.mv(x_nc_part, g_c_part)
        sums += here.to(sums.device)
    return sums


def _there(block: Tensor, vector: Tensor | None) -> list[Tensor]:
    return [block] if vector is None else [block, vector]


def products(x_nc: Tensor, y_mc: Tensor) -> Tensor:
    """Return the products of all rows, float64 [n, m]: sums of `PRODUCT` numbers in their own dtype."""
    whole = x_nc.shape[1] // PRODUCT * PRODUCT
    sums_nm = torch.zeros(len(x_nc), len(y_mc), dtype=torch.float64, device=x_nc.device)
    if whole:
        x_pnc, y_pmc = (z[:, :whole].unflatten(1, (-1, PRODUCT)).transpose(0, 1) for z in (x_nc, y_mc))
        sums_nm += torch.bmm(x_pnc, y_pmc.mT).double().sum(0)
    if whole < x_nc.shape[1]:
        sums_nm += torch.mm(x_nc[:, whole:], y_mc[:, whole:].T)
    return sums_nm


def square_rows(x_nc: Tensor) -> Tensor:
    """Return the squared norms of the rows: sums of `PIECE` numbers in their dtype, of those in float64."""
    whole = x_nc.shape[1] // PIECE * PIECE
    squares_n = torch.zeros(len(x_nc), dtype=torch.float64, device=x_nc.device)
    if whole:
        norms_np = torch.linalg.vector_norm(x_nc[:, :whole].unflatten(1, (-1, PIECE)), dim=2)
        squares_n += norms_np.double().square_().sum(1)
    if whole < x_nc.shape[1]:
        squares_n += torch.linalg.vector_norm(x_nc[:, whole:], dim=1).double().square_()
    return squares_n


class Loader:
    """Chunks of chosen rows of a block, in the dtype of the sums.

    Args:
        block: [N, d].
        rows: those wanted, in order.
        dtype: of what comes out.
        spare: rows left free at the end of the buffer.
    """

    def __init__(self, block: Tensor, rows: Sequence[int], *, dtype: torch.dtype, spare: int = 0) -> None:
        self.block, self.rows, self.dtype, self.spare = block, list(rows), dtype, spare
        self._all = self.rows == list(range(block.shape[0]))
        self.is_plain = self._all and block.dtype == dtype
        self._buffer: Tensor | None = None

    def view(self, where: slice) -> Tensor:
        """Return the chunk to be read only: the block's own memory where that will do."""
        if self.is_plain:
            return self.block[:, where]
        return self.copy(where)

    def copy(self, where: slice) -> Tensor:
        """Return the chunk in a buffer that the next call uses again: [n + spare, c]."""
        buffer = self.buffer(where)
        if self._all:
            buffer[: len(self.rows)].copy_(self.block[:, where])
        else:
            for place, row in enumerate(self.rows):
                buffer[place].copy_(self.block[row, where])
        return buffer

    def buffer(self, where: slice) -> Tensor:
        """Return that buffer as it is."""
        width = where.stop - where.start
        if self._buffer is None:  # the first chunk is the widest
            self._buffer = torch.empty(
                (len(self.rows) + self.spare) * width, dtype=self.dtype, device=self.block.device
            )
        return self._buffer[: (len(self.rows) + self.spare) * width].view(-1, width)


def weighted_sums(
    blocks: Sequence[Tensor],
    weights_N: Tensor,
    *,
    extras: Sequence[Tensor] | None = None,
    extra_weight: float = 0.0,
    exact: bool = False,
) -> list[Tensor]:
    """Return for each block the sum of its rows by weight; a row of weight 0 is not read, NaN or not.

    Args:
        blocks: [N, d] each.
        weights_N: float64, on the CPU.
        extras: one more vector per block, of weight `extra_weight`.
        extra_weight: see there.
        exact: whether the vectors come in the dtype of the sums instead of that of the block.
    """
    weights = [(row, weight) for row, weight in enumerate(weights_N.tolist()) if weight != 0]
    vectors: list[Tensor] = []
    for number, block in enumerate(blocks):
        dtype = working_dtype(block)
        vector = torch.empty(block.shape[1], dtype=dtype if exact else block.dtype, device=block.device)
        extra = extras[number] if extras is not None and extra_weight != 0 else None
        if can_walk(*_there(block, extra)):
            added = [] if extra is None else [(extra, extra_weight)]
            terms = [*((block[row], weight) for row, weight in weights), *added]
            mix_rows([row for row, _ in terms], [weight for _, weight in terms], into=vector)
            vectors.append(vector)
            continue
        for where in chunks(block):
            parts = [(block[row, where], weight) for row, weight in weights]
            if extra is not None:
                parts.append((extra[where].to(block.device), extra_weight))
            target = vector[where]
            acc = (
                target
                if target.dtype == dtype
                else torch.empty(target.shape, dtype=dtype, device=block.device)
            )
            acc.zero_()
            for part, weight in parts:
                acc.add_(part, alpha=weight)
            if acc is not target:
                target.copy_(acc)
        vectors.append(vector)
    return vectors
