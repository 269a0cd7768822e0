# pyright: basic, reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Basic, since the kernels' language has no types and pyright reads it as Python; the host's files are strict.
"""Triton kernels of APOLLO's first sweep and of its work on sketches.

Paper: H. Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", 2024 (arXiv 2412.05270), algorithm
1. K contracted length, C channels, R rank; tiles and tables as in `hardy.ops.triton_kernels`.

The gradient is read once: the squares of channels are taken from the tile that is multiplied. With rank 1 the
sketch is a matrix-vector product (`sketch_vector`), else it goes through the tensor cores (`sketch_matrix`).
Where one task has too few tiles for the device, the contracted axis is cut into `splits` parts, which
`hardy.ops.triton_fold` adds up.
"""

from dataclasses import dataclass

import triton.language as tl

from hardy.ops.triton_kernels import Layout, address, cells_of, jit, matrix, spread


@dataclass(frozen=True, kw_only=True, repr=False)
class Sketch(Layout):
    """What is known when a sketch's kernel is compiled; the capital names are fields of a table row."""

    ROWS, COLS, GRAD, GRAD_STRIDE, PROJECTION, PROJECTION_STRIDE, SKETCH, SKETCH_STRIDE, SQUARES = range(9)
    SPLIT, WORK, _, FIELDS = range(9, 13)

    grad: tl.dtype
    projection: tl.dtype
    contracts: str
    rank: int
    splits: int
    """Parts of the contracted axis; with more than one, outputs go to the workspace, part after part."""
    whole: bool
    vector: bool
    vector_projection: bool = False
    tile_rows: int = 1
    groups: int = 1
    channels: int = 16
    contracted: int = 16
    ranks: int = 16
    product: tl.dtype = tl.float32
    """Dtype of the factors of the product; bf16 loses nothing for a bf16 gradient."""
    precision: str = "tf32x3"
    flat: bool = False
    eights: bool = True


@dataclass(frozen=True, kw_only=True, repr=False)
class Moment(Layout):
    """What is known when `moments_kernel` is compiled; the capital names are fields of a table row."""

    ROWS, COLS, SKETCH, SKETCH_STRIDE, EXP_AVG, EXP_AVG_STRIDE, EXP_AVG_SQ, EXP_AVG_SQ_STRIDE = range(8)
    COEFFICIENTS, BEFORE, AFTER, _, FIELDS = range(8, 13)

    channels: str
    whole: bool
    vector: bool
    tile_rows: int
    groups: int
    flat: bool = False
    eights: bool = True


@jit
def mask_of(i, j, rows, cols, C: tl.constexpr):
    """Return which groups of a tile exist, or which elements where columns are not in whole groups."""
    if C.whole:
        return (i < rows) & (j < cols)
    else:
        return (i < rows) & (spread(j, C) < cols)


@jit
def outputs_of(row, workspace, part, channels, C: tl.constexpr):
    """Return where this part's sketch and squares go: to the task's tensors, or to the workspace."""
    sketch, squares = address(row, C.SKETCH, tl.float32), address(row, C.SQUARES, tl.float32)
    if C.splits > 1:
        sketch = workspace + tl.load(row + C.WORK) + part * (channels * (C.rank + 1))
        squares = sketch + channels * C.rank
    return sketch, squares


@jit
def sketch_vector(table, workspace, C: tl.constexpr):
    """Sketch with rank 1: a program goes along the contracted axis with all rows, or columns, of a tile.

    Its tiles are [G, R, 8]: so the compiler gives a row of a tile to one warp.
    """
    row = table + tl.program_id(1) * C.FIELDS
    rows, cols, split = tl.load(row + C.ROWS), tl.load(row + C.COLS), tl.load(row + C.SPLIT)
    grads, projection = matrix(row, C.GRAD, C.grad), address(row, C.PROJECTION, C.projection)
    part = tl.program_id(0) % C.splits
    tile = (tl.program_id(0) // C.splits).to(tl.int64)
    line = tl.arange(0, C.tile_rows)[None, :, None]
    ahead = (tl.arange(0, C.groups) * 8)[:, None, None]
    product = tl.full((C.groups, C.tile_rows, 8), 0.0, tl.float32)
    square = tl.full((C.groups, C.tile_rows, 8), 0.0, tl.float32)
    if C.contracts == "cols":
        i = tile * C.tile_rows + line
        end = tl.minimum((part + 1) * split, cols)
        for first in range(part * split, end, 8 * C.groups):
            j = first + ahead
            mask = mask_of(i, j, rows, end, C)
            grad = tl.load(cells_of(grads, i, j, C), mask=mask, other=0.0).to(tl.float32)
            # Each thread loads the factors of its own elements, from the cache, so none has to be handed on.
            factors = projection + spread(tl.broadcast_to(j, (C.groups, C.tile_rows, 1)), C)
            if C.vector_projection:
                factors = tl.multiple_of(factors, (16, 16, 16))
            product += grad * tl.load(factors, mask=mask, other=0.0).to(tl.float32)
            square += grad * grad
        sketch, squares = outputs_of(row, workspace, part, rows, C)
        channel = tile * C.tile_rows + tl.arange(0, C.tile_rows)
        tl.store(sketch + channel, tl.sum(tl.sum(product, axis=2), axis=0), mask=channel < rows)
        tl.store(squares + channel, tl.sum(tl.sum(square, axis=2), axis=0), mask=channel < rows)
    else:
        j = tile * (8 * C.groups) + ahead
        end = tl.minimum((part + 1) * split, rows)
        for first in range(part * split, end, C.tile_rows):
            i = first + line
            mask = mask_of(i, j, end, cols, C)
            grad = tl.load(cells_of(grads, i, j, C), mask=mask, other=0.0).to(tl.float32)
            product += grad * tl.load(projection + i, mask=i < end, other=0.0).to(tl.float32)
            square += grad * grad
        sketch, squares = outputs_of(row, workspace, part, cols, C)
        channel = spread(j, C)
        tl.store(sketch + channel, tl.sum(product, axis=1, keep_dims=True), mask=channel < cols)
        tl.store(squares + channel, tl.sum(square, axis=1, keep_dims=True), mask=channel < cols)


@jit
def factors_at(grads, projection, rank, channel, k, bounds, C: tl.constexpr):
    """Return tiles of the gradient [channels, contracted], twice, and of the projection [contracted, ranks].

    bounds: (channels, end of the contracted part). Lines are read along the rows of memory, then turned.

    Twice: where the gradient goes to the tensor cores by the pipeline and is squared too, Triton 3.6 hands
    over a tile before the product has read it (H100, eight warps: results off by half; right with one stage,
    or without the squares). The second load finds the tile in the cache and costs a fortieth.
    """
    if C.contracts == "cols":
        cells = grads[0] + channel[:, None] * grads[1] + k[None, :]
        mask = (channel < bounds[0])[:, None] & (k < bounds[1])[None, :]
    else:
        cells = grads[0] + k[:, None] * grads[1] + channel[None, :]
        mask = (k < bounds[1])[:, None] & (channel < bounds[0])[None, :]
    if C.vector:
        cells = tl.multiple_of(cells, (16, 16))
    grad = tl.load(cells, mask=mask, other=0.0)
    again = grad
    if C.contracts == "rows":
        grad = tl.trans(grad)
        again = grad
    else:
        again = tl.load(cells, mask=mask, other=0.0, cache_modifier=".ca")
    right = projection[0] + k[:, None] * projection[1] + rank[None, :]
    if C.vector_projection:
        right = tl.multiple_of(right, (16, 16))
    right = tl.load(right, mask=(k < bounds[1])[:, None] & (rank < C.rank)[None, :], other=0.0)
    return grad, again, right


@jit
def sketch_matrix(table, workspace, C: tl.constexpr):
    """Sketch with a rank above 1: a program makes `C.channels` channels of `C.ranks` of the ranks."""
    row = table + tl.program_id(1) * C.FIELDS
    channels, length = tl.load(row + C.ROWS), tl.load(row + C.COLS)
    if C.contracts == "rows":
        channels, length = length, channels
    # Neighbouring programs share their part of the gradient, which the second one finds in the cache.
    blocks: tl.constexpr = (C.rank + C.ranks - 1) // C.ranks
    block, part = tl.program_id(0) % blocks, (tl.program_id(0) // blocks) % C.splits
    tile = (tl.program_id(0) // (blocks * C.splits)).to(tl.int64)
    split = tl.load(row + C.SPLIT)
    end = tl.minimum((part + 1) * split, length)
    if C.whole:
        # The axis along the rows of memory is in whole groups; said so, the compiler's masks are eight wide
        # too.
        if C.contracts == "cols":
            end = end // 8 * 8
        else:
            channels = channels // 8 * 8
    grads, projection = matrix(row, C.GRAD, C.grad), matrix(row, C.PROJECTION, C.projection)
    channel = tile * C.channels + tl.arange(0, C.channels)
    rank = block * C.ranks + tl.arange(0, C.ranks)
    product = tl.full((C.channels, C.ranks), 0.0, tl.float32)
    square = tl.full((C.channels,), 0.0, tl.float32)
    for first in range(part * split, end, C.contracted):
        k = first + tl.arange(0, C.contracted)
        grad, again, right = factors_at(grads, projection, rank, channel, k, (channels, end), C)
        product = tl.dot(grad.to(C.product), right.to(C.product), product, input_precision=C.precision)
        wide = again.to(tl.float32)
        square += tl.sum(wide * wide, axis=1)
    sketch, squares = outputs_of(row, workspace, part, channels, C)
    if C.contracts == "cols":
        cells = sketch + channel[:, None] * C.rank + rank[None, :]
    else:
        cells = sketch + rank[None, :] * channels + channel[:, None]
    tl.store(cells, product, mask=(channel < channels)[:, None] & (rank < C.rank)[None, :])
    tl.store(squares + channel, square, mask=(channel < channels) & (block == 0))


@jit
def moments_tile(tensors, i, j, mask, numbers, C: tl.constexpr):
    """Update the moments of one tile; return N N and X X, 0 where there is no element."""
    beta1, beta2, eps, inverse_scale = numbers
    m_cells, v_cells = cells_of(tensors[1], i, j, C), cells_of(tensors[2], i, j, C)
    x = tl.load(cells_of(tensors[0], i, j, C), mask=mask, other=0.0) * inverse_scale
    m = beta1 * tl.load(m_cells, mask=mask, other=0.0) + (1 - beta1) * x
    v = beta2 * tl.load(v_cells, mask=mask, other=0.0) + (1 - beta2) * x * x
    tl.store(m_cells, m, mask=mask)
    tl.store(v_cells, v, mask=mask)
    n = m / (tl.sqrt(v) + eps)
    # With eps 0 an element that does not exist would be 0 / 0.
    n = tl.where(mask, n, 0.0)
    return n * n, x * x


@jit
def moments_kernel(table, workspace, C: tl.constexpr):
    """Update the moments of a sketch, `hardy.ops.updates.MomentTask`: a program does some channels whole."""
    row = table + tl.program_id(1) * C.FIELDS
    rows, cols = tl.load(row + C.ROWS), tl.load(row + C.COLS)
    at = address(row, C.COEFFICIENTS, tl.float32)
    active = tl.load(at) != 0
    numbers = tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    tensors = (
        matrix(row, C.SKETCH, tl.float32),
        matrix(row, C.EXP_AVG, tl.float32),
        matrix(row, C.EXP_AVG_SQ, tl.float32),
    )
    before, after = address(row, C.BEFORE, tl.float32), address(row, C.AFTER, tl.float32)
    tile = tl.program_id(0).to(tl.int64)
    line = tl.arange(0, C.tile_rows)[:, None, None]
    ahead = (tl.arange(0, C.groups) * 8)[None, :, None]
    sums_n = tl.full((C.tile_rows, C.groups, 8), 0.0, tl.float32)
    sums_x = tl.full((C.tile_rows, C.groups, 8), 0.0, tl.float32)
    if C.channels == "rows":
        i = tile * C.tile_rows + line
        for first in range(0, tl.where(active, cols, 0), 8 * C.groups):
            j = first + ahead
            n, x = moments_tile(tensors, i, j, mask_of(i, j, rows, cols, C), numbers, C)
            sums_n += n
            sums_x += x
        channel = tile * C.tile_rows + tl.arange(0, C.tile_rows)
        tl.store(after + channel, tl.sum(tl.sum(sums_n, axis=2), axis=1), mask=channel < rows)
        tl.store(before + channel, tl.sum(tl.sum(sums_x, axis=2), axis=1), mask=channel < rows)
    else:
        j = tile * (8 * C.groups) + ahead
        for first in range(0, tl.where(active, rows, 0), C.tile_rows):
            i = first + line
            n, x = moments_tile(tensors, i, j, mask_of(i, j, rows, cols, C), numbers, C)
            sums_n += n
            sums_x += x
        channel = spread(j, C)
        tl.store(after + channel, tl.sum(sums_n, axis=0, keep_dims=True), mask=channel < cols)
        tl.store(before + channel, tl.sum(sums_x, axis=0, keep_dims=True), mask=channel < cols)
