# pyright: basic, reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Basic, since the kernels' language has no types and pyright reads it as Python; the host's files are strict.
"""Triton kernels of SMMF's sweep.

Paper: K. Park, S. Lee, "SMMF: Square-Matricized Momentum Factorization", AAAI 2025 (arXiv 2412.08894).
Letters: g, m, v, u as in `hardy.ops.updates.SweepTask`; tiles and tables as in `hardy.ops.triton_kernels`.

`sweep_tiles` walks over the square-ish matrix. A program owns a strip of columns within a band of rows and
goes down the band tile by tile: the sums of its columns stay in registers, those of its rows are written at
each tile. `hardy.ops.triton_fold` adds up what the programs left in the workspace. Nothing is added
atomically.

Eight neighbours share a byte of signs. Where a byte's eight always lie in one group of one tile (widths,
strides and offsets are multiples of 8), `sweep_tiles` does everything. Elsewhere a byte would belong to two
programs; then `sweep_tiles` only takes the sums (`C.update` is false), and `sweep_update` goes over the
tensor's own rows, whose bytes are its own, computes the same numbers again and writes weights and signs.
"""

from dataclasses import dataclass

import triton.language as tl

from hardy.ops.triton_kernels import (
    Layout,
    address,
    cells_of,
    jit,
    matrix,
    rounding_of,
    spread,
    tile_of,
    write_param,
)


@dataclass(frozen=True, kw_only=True, repr=False)
class Sweep(Layout):
    """What is known when a kernel of this file is compiled; the capital names are fields of a table row."""

    ROWS, COLS, KEY, KEY_HIGH, BASE, BASE_STRIDE, STEP, COEFFICIENTS, PLACE, PLACE_STRIDE = range(10)
    PARAM, PARAM_STRIDE, GRAD, GRAD_STRIDE, REST, REST_STRIDE, SIGN, SIGN_STRIDE = range(10, 18)
    ROW_M, COL_M, ROW_V, COL_V, WIDTH, FIRST, LAST, BAND, STRIPS, BANDS, WORK, _, FIELDS = range(18, 31)

    param: tl.dtype
    grad: tl.dtype
    step: tl.dtype
    rounding: str
    pairs: bool
    flat: bool
    vector: bool
    eights: bool
    """Whether groups of eight in the matrix are groups of eight in a row of the tensor."""
    narrow: bool
    """Whether a strip may meet more than two rows of the tensor."""
    sign: str
    """"none"; "bytes"; packed: "groups" (a byte is a group of the tile), "bits" (or not; then only read)."""
    skip_zeros: bool
    update: bool
    """Whether `sweep_tiles` writes weights and signs."""
    tile_rows: int
    groups: int
    whole: bool = True

    @property
    def kinds(self) -> int:
        """Moments: v, or m and v."""
        return 1 if self.sign == "none" else 2


@jit
def tensors_of(row, C: tl.constexpr):
    """Return the matrices (param, grad, sign) and what rounding needs."""
    signs = matrix(row, C.SIGN, tl.uint8)
    return matrix(row, C.PARAM, C.param), matrix(row, C.GRAD, C.grad), signs, rounding_of(row, C)


@jit
def numbers_of(row, C: tl.constexpr):
    """Return (beta1, beta2, lr, keep, l2, eps, inverse_scale, max_update)."""
    at = address(row, C.COEFFICIENTS, tl.float32)
    beta1, beta2, lr, keep = tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    l2, eps, inverse_scale, most = tl.load(at + 5), tl.load(at + 6), tl.load(at + 7), tl.load(at + 8)
    return beta1, beta2, lr, keep, l2, eps, inverse_scale, most


@jit
def sign_cells(signs, i, j, C: tl.constexpr):
    """Return pointers to the bytes in which the signs of groups (or elements) (i, j) stand."""
    offset = j
    if C.sign != "bytes":
        offset = j >> 3
    if not C.flat:
        offset = offset + i * signs[1]
    if C.sign == "bytes":
        offset = spread(offset, C)
    return signs[0] + offset


@jit
def read_signs(cells, j, mask, C: tl.constexpr):
    """Return the sign bits, int32 0 or 1, [R, G, 8]."""
    stored = tl.load(cells, mask=mask, other=0).to(tl.int32)
    if C.sign == "groups":
        stored = (stored >> tl.arange(0, 8)[None, None, :]) & 1
    elif C.sign == "bits":
        stored = (stored >> (j & 7).to(tl.int32)) & 1
    return stored


@jit
def keep_signs(cells, positive, mask, C: tl.constexpr):
    """Write which elements are positive; what a byte covers beyond the tensor's row must be false."""
    kept = positive.to(tl.int32)
    if C.sign == "groups":
        kept = tl.sum(kept << tl.arange(0, 8)[None, None, :], axis=2, keep_dims=True)
    tl.store(cells, kept.to(tl.uint8), mask=mask)


@jit
def moments_of(grad, old_m, old_v, numbers, C: tl.constexpr):
    """Return m, v, g g; the old moments are decayed already, `old_m` carries its sign."""
    m = grad
    if C.sign != "none":
        m = old_m + (1 - numbers[0]) * grad
    square = grad * grad
    return m, old_v + (1 - numbers[1]) * square, square


@jit
def moved(raw, param, m, v, numbers, C: tl.constexpr):
    """Return the new weight. A NaN goes through, as through torch's clamp.

    The quotient is a product with a squared reciprocal root: half the instructions of a division, error 4e-7.
    """
    inverse = tl.rsqrt(tl.sqrt(v) + numbers[5])
    u = tl.clamp(m * inverse * inverse, -numbers[7], numbers[7], propagate_nan=tl.PropagateNan.ALL)
    if C.skip_zeros:
        u = tl.where(raw == 0, 0.0, u)
    return numbers[3] * param - numbers[2] * u


@jit
def first_place(row, start, width, C: tl.constexpr):
    """Return (i, j) in the local view of flat indices `start` of the whole; below 0 before its first element.

    A flat view has one row. Elsewhere this divides once, in 64 bits; `next_place` then goes on by adding.
    """
    local = start - tl.load(row + C.PLACE)
    if C.flat:
        return local, local
    else:
        stride = tl.load(row + C.PLACE_STRIDE)
        lead = tl.cdiv(width, stride)
        shifted = local + lead * stride
        return shifted // stride - lead, shifted % stride


@jit
def next_place(at, ahead, stride, C: tl.constexpr):
    """Return the place `ahead` elements (one number) after `at`; its column is below `stride` again."""
    i, j = at
    if C.flat:
        return i, j + ahead
    else:
        j = j + ahead % stride
        over = (j >= stride).to(tl.int64)
        return i + ahead // stride + over, j - over * stride


@jit
def place_in(at, ahead, view, C: tl.constexpr):
    """Return (i, j, whether it exists) of elements `ahead` after `at`; view: (rows, cols, stride)."""
    rows, cols, stride = view
    i, j = at
    j = j + ahead
    if C.flat:
        return j, j, (j >= 0) & (j < cols)
    else:
        if C.narrow:
            turns = j // stride
        else:
            turns = (j >= stride).to(tl.int64)
        i, j = i + turns, j - turns * stride
        return i, j, (i >= 0) & (i < rows) & (j < cols)


@jit
def tile_step(tensors, factors, numbers, at, mask, C: tl.constexpr):
    """Do one tile: update it if `C.update`, and return |m|, v and g g, 0 where there is no element.

    tensors: of `tensors_of`. factors: row_m, row_v [R, 1, 1], beta1 col_m, beta2 col_v [1, G, 8]. at: (i, j).
    """
    weights, grads, signs, rounding = tensors
    i, j = at
    wanted = mask
    if not C.update:
        wanted = tl.where(mask, numbers[4], 0.0) != 0
    raw = tl.load(cells_of(grads, i, j, C), mask=mask, other=0.0).to(tl.float32)
    param = tl.load(cells_of(weights, i, j, C), mask=wanted, other=0.0).to(tl.float32)
    # With its row factors 0 and a gradient of 0, what does not exist adds nothing: no mask for each of eight.
    old_v = tl.where(mask, factors[1], 0.0) * factors[3]
    old_m = old_v
    bytes_at = sign_cells(signs, i, j, C)
    if C.kinds == 2:
        old_m = tl.where(mask, factors[0], 0.0) * factors[2]
        old_m = tl.where(read_signs(bytes_at, j, mask, C) != 0, old_m, -old_m)
    m, v, square = moments_of(raw * numbers[6] + numbers[4] * param, old_m, old_v, numbers, C)
    if C.update:
        if C.kinds == 2:
            keep_signs(bytes_at, m > 0, mask, C)
        write_param(weights, rounding, (param, moved(raw, param, m, v, numbers, C)), at, mask, C)
    return tl.abs(m), v, square


@jit
def workspace_of(row, C: tl.constexpr):
    """Return where row sums, column sums and squares begin in the workspace, and the first two's sizes."""
    rows_size = tl.load(row + C.STRIPS) * (tl.load(row + C.LAST) - tl.load(row + C.FIRST))
    cols_size = tl.load(row + C.BANDS) * tl.load(row + C.WIDTH)
    rows_at = tl.load(row + C.WORK)
    cols_at = rows_at + C.kinds * rows_size
    return rows_at, cols_at, cols_at + C.kinds * cols_size, rows_size, cols_size


@jit
def groups_of(C: tl.constexpr):
    """Return 0 ... 8 G - 1 as [1, G, 8]."""
    return tl.arange(0, C.groups)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]


@jit
def factors_of(rows, cols, lines, last):
    """Return row_m, row_v [R, 1, 1] of matrix rows `lines`, 0 from `last` on, and the given col_m, col_v."""
    row_m = tl.load(rows[0] + lines, mask=lines < last, other=0.0)
    row_v = tl.load(rows[1] + lines, mask=lines < last, other=0.0)
    return row_m, row_v, cols[0], cols[1]


@jit
def keep_row_sums(workspace, at, apart, sums, exists, C: tl.constexpr):
    """Write a tile's sums by rows, of |m| if there is momentum, then of v `apart` floats on."""
    if C.kinds == 2:
        tl.store(workspace + at, tl.sum(tl.sum(sums[0], axis=2), axis=1), mask=exists)
        at = at + apart
    tl.store(workspace + at, tl.sum(tl.sum(sums[1], axis=2), axis=1), mask=exists)


@jit
def keep_col_sums(workspace, at, apart, sums, exists, C: tl.constexpr):
    """Write a program's sums by columns, as `keep_row_sums`."""
    if C.kinds == 2:
        tl.store(workspace + at, tl.sum(sums[0], axis=0, keep_dims=True), mask=exists)
        at = at + apart
    tl.store(workspace + at, tl.sum(sums[1], axis=0, keep_dims=True), mask=exists)


@jit
def sweep_tiles(table, workspace, C: tl.constexpr):
    """SMMF's sweep over the matrix: a program does the tiles of one strip within one band."""
    row = table + tl.program_id(1) * C.FIELDS
    if tl.load(address(row, C.COEFFICIENTS, tl.float32)) == 0:
        return
    numbers, tensors = numbers_of(row, C), tensors_of(row, C)
    rows_at, cols_at, squares_at, rows_size, cols_size = workspace_of(row, C)
    width, strips = tl.load(row + C.WIDTH), tl.load(row + C.STRIPS).to(tl.int32)
    view = tl.load(row + C.ROWS), tl.load(row + C.COLS), tl.load(row + C.PLACE_STRIDE)
    strip, band = tl.program_id(0) % strips, tl.program_id(0) // strips
    origin, height = tl.load(row + C.FIRST), tl.load(row + C.BAND)
    first = origin + band * height
    last = tl.minimum(first + height, tl.load(row + C.LAST))
    line, left = tl.arange(0, C.tile_rows), strip * (8 * C.groups)
    lines = line[:, None, None]
    columns = left + groups_of(C)
    ahead = tl.arange(0, C.groups)[None, :, None] * 8
    if not C.eights:
        ahead = groups_of(C)
    row_factors = address(row, C.ROW_V, tl.float32), address(row, C.ROW_V, tl.float32)
    col_v = tl.load(address(row, C.COL_V, tl.float32) + columns, mask=columns < width, other=0.0)
    col_v *= numbers[1]
    col_factors = col_v, col_v
    if C.kinds == 2:
        row_factors = address(row, C.ROW_M, tl.float32), row_factors[1]
        col_m = tl.load(address(row, C.COL_M, tl.float32) + columns, mask=columns < width, other=0.0)
        col_factors = col_m * numbers[0], col_v
    sums_m = tl.full((C.tile_rows, C.groups, 8), 0.0, tl.float32)
    sums_v = tl.full((C.tile_rows, C.groups, 8), 0.0, tl.float32)
    squares = tl.full((C.tile_rows, C.groups), 0.0, tl.float32)
    i, j = first_place(row, (first + lines) * width + left, width, C)
    rows_at += strip * (rows_size // strips) - origin

    for top in range(first, last, C.tile_rows):
        at_i, at_j, mask = place_in((i, j), ahead, view, C)
        mask = mask & (top + lines < last) & (left + ahead < width)
        factors = factors_of(row_factors, col_factors, top + lines, last)
        size, v, square = tile_step(tensors, factors, numbers, (at_i, at_j), mask, C)
        keep_row_sums(workspace, rows_at + top + line, rows_size, (size, v), top + line < last, C)
        sums_m += size
        sums_v += v
        squares += tl.sum(square, axis=2)
        i, j = next_place((i, j), C.tile_rows * width, view[2], C)

    keep_col_sums(
        workspace, cols_at + band * width + columns, cols_size, (sums_m, sums_v), columns < width, C
    )
    tl.store(workspace + squares_at + tl.program_id(0), tl.sum(tl.sum(squares, axis=1), axis=0))


@jit
def sweep_update(table, workspace, C: tl.constexpr):
    """Write weights and signs where bytes of signs do not fit the matrix: a tile of the tensor's own rows."""
    row = table + tl.program_id(1) * C.FIELDS
    if tl.load(address(row, C.COEFFICIENTS, tl.float32)) == 0:
        return
    numbers, tensors = numbers_of(row, C), tensors_of(row, C)
    weights, grads, signs, rounding = tensors
    width = tl.load(row + C.WIDTH)
    i, j, mask = tile_of(row, C)
    flat = tl.load(row + C.PLACE) + i * tl.load(row + C.PLACE_STRIDE) + j
    line = flat // width
    column = (flat - line * width).to(tl.int32) + tl.arange(0, 8)[None, None, :]
    turns = column // width.to(tl.int32)
    line, column = line + turns, column - turns * width.to(tl.int32)
    raw = tl.load(cells_of(grads, i, j, C), mask=mask, other=0.0).to(tl.float32)
    param = tl.load(cells_of(weights, i, j, C), mask=mask, other=0.0).to(tl.float32)
    old_v = tl.load(address(row, C.ROW_V, tl.float32) + line, mask=mask, other=0.0)
    old_v *= tl.load(address(row, C.COL_V, tl.float32) + column, mask=mask, other=0.0)
    old_m = tl.load(address(row, C.ROW_M, tl.float32) + line, mask=mask, other=0.0)
    old_m *= tl.load(address(row, C.COL_M, tl.float32) + column, mask=mask, other=0.0)
    bytes_at = sign_cells(signs, i, j, C)
    held = (i < tl.load(row + C.ROWS)) & (j < tl.load(row + C.COLS))
    old_m = tl.where(read_signs(bytes_at, j, held, C) != 0, old_m, -old_m)
    grad = raw * numbers[6] + numbers[4] * param
    m, v, square = moments_of(grad, old_m * numbers[0], old_v * numbers[1], numbers, C)
    keep_signs(bytes_at, mask & (m > 0), held, C)
    write_param(weights, rounding, (param, moved(raw, param, m, v, numbers, C)), (i, j), mask, C)
