# pyright: basic, reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Basic, since the kernels' language has no types and pyright reads it as Python; the host's files are strict.
"""Triton kernels of SMMF's sweep.

Paper: K. Park, S. Lee, "SMMF: Square-Matricized Momentum Factorization", AAAI 2025 (arXiv 2412.08894).
Letters: g, m, v, u as in `hardy.ops.updates.SweepTask`; tiles and tables as in `hardy.ops.triton_kernels`.

`sweep_tiles` walks over the square-ish matrix. A program owns a strip of columns within a band of rows and
goes down the band tile by tile: the sums of its columns stay in registers, those of its rows are written at
each tile. `hardy.ops.triton_fold` adds up what the programs left in the workspace. Nothing is added
atomically. A program is one warp, so none waits for another, and it asks for the next tile before it works on
this one.

Eight neighbours share a byte of signs. Where a byte's eight always are a group of a tile (widths, strides and
offsets are multiples of 8), a program reads and writes the bytes themselves. Elsewhere a byte may belong to
two programs, and a group to two rows of the tensor. Then the old signs of a group are put together from
up to three bytes (`window_at`), the new ones go to the workspace, a byte for each group of the matrix, and
`sweep_signs` puts the tensor's bytes together from those in the same way.
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
    write_param,
)


@dataclass(frozen=True, kw_only=True, repr=False)
class Sweep(Layout):
    """What is known when a kernel of this file is compiled; the capital names are fields of a table row."""

    ROWS, COLS, KEY, KEY_HIGH, BASE, BASE_STRIDE, STEP, COEFFICIENTS, PLACE, PLACE_STRIDE = range(10)
    PARAM, PARAM_STRIDE, GRAD, GRAD_STRIDE, REST, REST_STRIDE, SIGN, SIGN_STRIDE = range(10, 18)
    ROW_M, COL_M, ROW_V, COL_V, WIDTH, FIRST, LAST, BAND, STRIPS, BANDS, WORK, SIGNS, FIELDS = range(18, 31)

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
    """"none"; "bytes"; packed: "groups" (a byte is a group of the tile), "bits" (or not)."""
    skip_zeros: bool
    tile_rows: int
    groups: int
    part: bool = False
    """Whether `sweep_signs` has only some rows of the matrix: the other signs of a byte are then kept."""

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
def window_at(signs, i, j, cols, masks):
    """Return the bytes that hold eight signs from (i, j) on, which may go on in the next row.

    Two of them are of row i, the third is the first of the next; cols: 8 or more. masks: whether the signs in
    row i, and those in the next, are wanted; the others read as 0.
    """
    at = signs[0] + i * signs[1] + (j >> 3)
    first = tl.load(at, mask=masks[0], other=0)
    second = tl.load(at + 1, mask=masks[0] & ((j | 7) + 1 < cols), other=0)
    turned = masks[1] & (cols - j < 8)
    return first, second, tl.load(signs[0] + (i + 1) * signs[1], mask=turned, other=0)


@jit
def eight_of(window, j, cols):
    """Return the signs that `window_at` found, int32: bit b is column j + b, or its place in the next row."""
    first, second, third = window
    held = tl.minimum(cols - j, 8)
    bits = (first.to(tl.int32) | (second.to(tl.int32) << 8)) >> (j & 7)
    return (bits & ((1 << held) - 1)) | (third.to(tl.int32) << held)


@jit
def one_by_one(signs, i, j, shape, mask):
    """Return eight signs from (i, j) on as `eight_of` does; there may be any number of columns."""
    rows, cols = shape
    bit = tl.arange(0, 8)[None, None, :]
    turns = (j + bit) // cols
    i, j = i + turns, j + bit - turns * cols
    stored = tl.load(signs[0] + i * signs[1] + (j >> 3), mask=mask & (i >= 0) & (i < rows), other=0)
    kept = (stored.to(tl.int32) >> (j & 7).to(tl.int32)) & 1
    return tl.sum(kept << bit, axis=2, keep_dims=True)


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
def stored_signs(signs, at, view, mask, C: tl.constexpr):
    """Return what `signs_of` wants: the byte of each group or element, three times; or those of a window."""
    i, j = at
    if C.sign == "none":
        return mask, mask, mask
    elif C.sign == "bits" and C.eights:
        return window_at(signs, i, j, view[1].to(tl.int32), (mask, mask))
    else:
        stored = tl.load(sign_cells(signs, i, j, C), mask=mask, other=0)
        return stored, stored, stored


@jit
def signs_of(stored, j, cols, C: tl.constexpr):
    """Return the sign bits, int32, 0 where negative: [R, G, 8]."""
    if C.sign == "groups":
        return (stored[0].to(tl.int32) >> tl.arange(0, 8)[None, None, :]) & 1
    elif C.sign == "bits":
        if C.eights:
            return (eight_of(stored, j, cols) >> tl.arange(0, 8)[None, None, :]) & 1
        else:
            return (stored[0].to(tl.int32) >> (j & 7).to(tl.int32)) & 1
    else:
        return stored[0].to(tl.int32)


@jit
def keep_signs(cells, positive, mask, C: tl.constexpr):
    """Write which elements are positive: a byte for each group, or for each element."""
    kept = positive.to(tl.int32)
    if C.sign != "bytes":
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
        return (shifted // stride - lead).to(tl.int32), (shifted % stride).to(tl.int32)


@jit
def next_place(at, ahead, stride, C: tl.constexpr):
    """Return the place `ahead` elements (one number) after `at`; its column is below `stride` again."""
    i, j = at
    if C.flat:
        return i, j + ahead
    else:
        j = j + (ahead % stride).to(tl.int32)
        over = j >= stride.to(tl.int32)
        i = i + (ahead // stride).to(tl.int32)
        return tl.where(over, i + 1, i), tl.where(over, j - stride.to(tl.int32), j)


@jit
def place_in(at, ahead, view, C: tl.constexpr):
    """Return (i, j, whether it exists) of elements `ahead` after `at`; view: (rows, cols, stride)."""
    i, j = at
    j = j + ahead
    if C.flat:
        return j, j, (j >= 0) & (j < view[1])
    else:
        rows, cols, stride = view[0].to(tl.int32), view[1].to(tl.int32), view[2].to(tl.int32)
        if C.narrow:
            turns = j // stride
            i, j = i + turns, j - turns * stride
        else:
            over = j >= stride
            i, j = tl.where(over, i + 1, i), tl.where(over, j - stride, j)
        return i, j, (i >= 0) & (i < rows) & (j < cols)


@jit
def tile_at(tensors, row_factors, at, view, lines, mask, C: tl.constexpr):
    """Return a tile as it is stored: gradient, weight, signs, row_m and row_v [R, 1, 1], place, mask.

    Factors are 0 where there is no element, at which m and v are 0 then.
    """
    weights, grads, signs, _ = tensors
    i, j = at
    raw = tl.load(cells_of(grads, i, j, C), mask=mask, other=0.0)
    param = tl.load(cells_of(weights, i, j, C), mask=mask, other=0.0)
    row_m = tl.load(row_factors[0] + lines[0], mask=lines[1], other=0.0)
    row_v = tl.load(row_factors[1] + lines[0], mask=lines[1], other=0.0)
    return raw, param, stored_signs(signs, at, view, mask, C), row_m, row_v, at, mask


@jit
def tile_step(tensors, tile, cols, numbers, signs_at, C: tl.constexpr):
    """Update a tile of `tile_at`, and return |m|, v and g g, 0 where there is no element.

    cols: (beta1 col_m, beta2 col_v, columns of the tensor); the first two [1, G, 8]. signs_at: pointers to
    the bytes of groups, and which exist, if the new signs go to the workspace.
    """
    raw, param, stored, row_m, row_v, at, mask = tile
    weights, _, signs, rounding = tensors
    raw, param = raw.to(tl.float32), param.to(tl.float32)
    # With its row factors 0 and a gradient of 0, what does not exist adds nothing: no mask for each of eight.
    old_v = tl.where(mask, row_v, 0.0) * cols[1]
    old_m = old_v
    if C.kinds == 2:
        old_m = tl.where(mask, row_m, 0.0) * cols[0]
        old_m = tl.where(signs_of(stored, at[1], cols[2], C) != 0, old_m, -old_m)
    m, v, square = moments_of(raw * numbers[6] + numbers[4] * param, old_m, old_v, numbers, C)
    if C.sign == "bits":
        keep_signs(signs_at[0], mask & (m > 0), signs_at[1], C)
    elif C.kinds == 2:
        keep_signs(sign_cells(signs, at[0], at[1], C), m > 0, mask, C)
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
def new_signs(row, workspace, width, C: tl.constexpr):
    """Return the matrix (pointer, row stride) of the new signs in the workspace: a byte for each group."""
    at = (workspace + tl.load(row + C.SIGNS)).to(tl.pointer_type(tl.uint8))
    return at, (width + 7) >> 3


@jit
def keep_row_sums(workspace, at, apart, sums, exists, C: tl.constexpr):
    """Write a tile's sums by rows, of |m| if there is momentum, then of v `apart` floats on.

    sums: [R, G], those of groups.
    """
    if C.kinds == 2:
        tl.store(workspace + at, tl.sum(sums[0], axis=1), mask=exists)
        at = at + apart
    tl.store(workspace + at, tl.sum(sums[1], axis=1), mask=exists)


@jit
def keep_col_sums(workspace, at, apart, sums, exists, C: tl.constexpr):
    """Write a program's sums by columns, as `keep_row_sums`."""
    if C.kinds == 2:
        tl.store(workspace + at, tl.sum(sums[0], axis=0, keep_dims=True), mask=exists)
        at = at + apart
    tl.store(workspace + at, tl.sum(sums[1], axis=0, keep_dims=True), mask=exists)


@jit
def column_factors(row, columns, width, numbers, C: tl.constexpr):
    """Return beta1 col_m and beta2 col_v of columns [1, G, 8]; the latter twice if there is no momentum."""
    col_v = tl.load(address(row, C.COL_V, tl.float32) + columns, mask=columns < width, other=0.0)
    col_v *= numbers[1]
    if C.kinds == 2:
        col_m = tl.load(address(row, C.COL_M, tl.float32) + columns, mask=columns < width, other=0.0)
        return col_m * numbers[0], col_v
    else:
        return col_v, col_v


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
    group = tl.arange(0, C.groups)[None, :, None] * 8
    ahead = group
    if not C.eights:
        ahead = groups_of(C)
    row_factors = address(row, C.ROW_V, tl.float32), address(row, C.ROW_V, tl.float32)
    if C.kinds == 2:
        row_factors = address(row, C.ROW_M, tl.float32), row_factors[1]
    col_m, col_v = column_factors(row, columns, width, numbers, C)
    col_factors = col_m, col_v, view[1].to(tl.int32)
    sums_m = tl.full((C.tile_rows, C.groups, 8), 0.0, tl.float32)
    sums_v = tl.full((C.tile_rows, C.groups, 8), 0.0, tl.float32)
    squares = tl.full((C.tile_rows, C.groups), 0.0, tl.float32)
    rows_at += strip * (rows_size // strips) - origin
    kept_at, kept_stride = new_signs(row, workspace, width, C)
    kept_at += (left + group) >> 3
    across = left + ahead < width

    place = first_place(row, (first + lines) * width + left, width, C)
    for top in range(first, last, C.tile_rows):
        at_i, at_j, mask = place_in(place, ahead, view, C)
        held = (top + lines, top + lines < last)
        tile = tile_at(tensors, row_factors, (at_i, at_j), view, held, mask & held[1] & across, C)
        place = next_place(place, C.tile_rows * width, view[2], C)
        signs_at = kept_at + (top + lines - origin) * kept_stride, (left + group < width) & held[1]
        size, v, square = tile_step(tensors, tile, col_factors, numbers, signs_at, C)
        square_8, v_8 = tl.sum(square, axis=2), tl.sum(v, axis=2)
        keep_row_sums(
            workspace, rows_at + top + line, rows_size, (tl.sum(size, axis=2), v_8), top + line < last, C
        )
        sums_m += size
        sums_v += v
        squares += square_8

    keep_col_sums(
        workspace, cols_at + band * width + columns, cols_size, (sums_m, sums_v), columns < width, C
    )
    tl.store(workspace + squares_at + tl.program_id(0), tl.sum(tl.sum(squares, axis=1), axis=0))


@jit
def sweep_signs(table, workspace, C: tl.constexpr):
    """Put the tensor's bytes of signs together from the groups of the matrix: some bytes of some rows.

    Of a byte, only the signs in the launch's rows of the matrix are written.
    """
    row = table + tl.program_id(1) * C.FIELDS
    if tl.load(address(row, C.COEFFICIENTS, tl.float32)) == 0:
        return
    rows, cols, width = tl.load(row + C.ROWS), tl.load(row + C.COLS), tl.load(row + C.WIDTH)
    begin, end = tl.load(row + C.FIRST), tl.load(row + C.LAST)
    signs = matrix(row, C.SIGN, tl.uint8)
    across = tl.cdiv(cols, 8 * C.groups).to(tl.int32)
    top, left = tl.program_id(0) // across * C.tile_rows, tl.program_id(0) % across * (8 * C.groups)
    i = (top + tl.arange(0, C.tile_rows).to(tl.int64))[:, None, None]
    ahead = tl.arange(0, C.groups)[None, :, None] * 8
    start = tl.load(row + C.PLACE) + i * tl.load(row + C.PLACE_STRIDE) + left
    line, narrow = start // width, width.to(tl.int32)
    column = (start - line * width).to(tl.int32) + ahead
    turns = column // narrow
    line, column = (line - begin).to(tl.int32) + turns, column - turns * narrow
    exist = tl.minimum(tl.maximum((cols - left).to(tl.int32) - ahead, 0), 8)
    ours = (1 << exist) - 1
    if C.part:
        before = tl.minimum(tl.maximum(begin * width - start - ahead, 0), 8).to(tl.int32)
        until = tl.minimum(tl.maximum(end * width - start - ahead, 0), exist).to(tl.int32)
        ours = ((1 << until) - 1) & -(1 << before)
    mask, new, lines = (
        (i < rows) & (ours != 0),
        new_signs(row, workspace, width, C),
        (end - begin).to(tl.int32),
    )
    if C.narrow:
        bits = one_by_one(new, line, column, (lines, narrow), mask)
    else:
        masks = mask & (line >= 0), mask & (line + 1 < lines)
        bits = eight_of(window_at(new, line, column, narrow, masks), column, narrow)
    cells, bits = signs[0] + i * signs[1] + ((left + ahead) >> 3), bits & ours
    if C.part:
        bits |= tl.load(cells, mask=mask & (ours != (1 << exist) - 1), other=0).to(tl.int32) & ~ours
    tl.store(cells, bits.to(tl.uint8), mask=mask)
