# pyright: basic, reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Basic, since the kernels' language has no types and pyright reads it as Python; the host's files are strict.
"""Triton kernels of the sweeps that treat every weight alone: AdamW's, and APOLLO's second.

Papers: AdamW (arXiv 1711.05101); APOLLO (2412.05270), algorithm 1, last line. Tiles and tables as
`hardy.ops.triton_kernels` says. Each weight, gradient and moment is read once and written once.
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
class Elementwise(Layout):
    """What is known when a kernel of this file is compiled; the capital names are fields of a table row."""

    ROWS, COLS, KEY, KEY_HIGH, BASE, BASE_STRIDE, STEP, COEFFICIENTS, FACTOR, KEEP = range(10)
    PARAM, PARAM_STRIDE, GRAD, GRAD_STRIDE, REST, REST_STRIDE = range(10, 16)
    EXP_AVG, EXP_AVG_STRIDE, EXP_AVG_SQ, EXP_AVG_SQ_STRIDE, FIELDS = range(16, 21)
    SPAN = COEFFICIENTS

    param: tl.dtype
    grad: tl.dtype
    step: tl.dtype
    rounding: str
    pairs: bool
    flat: bool
    whole: bool
    vector: bool
    tile_rows: int
    groups: int
    along: str = ""
    joined: bool = False
    """Whether the view's one row is all rows of the tensor, of SPAN columns each."""
    narrow: bool = False
    """Whether a tile of such a view may meet more than two of them."""
    eights: bool = True


@jit
def adam_kernel(table, workspace, C: tl.constexpr):
    """AdamW's sweep, `hardy.ops.updates.AdamTask`; a program does one tile."""
    row = table + tl.program_id(1) * C.FIELDS
    numbers = address(row, C.COEFFICIENTS, tl.float32)
    if tl.load(numbers) == 0:
        return
    beta1, beta2, step_size = tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    root_scale, eps, keep = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6)
    l2, inverse_scale = tl.load(numbers + 7), tl.load(numbers + 8)
    i, j, mask = tile_of(row, C)
    weights = matrix(row, C.PARAM, C.param)
    m_cells = cells_of(matrix(row, C.EXP_AVG, tl.float32), i, j, C)
    v_cells = cells_of(matrix(row, C.EXP_AVG_SQ, tl.float32), i, j, C)
    param = tl.load(cells_of(weights, i, j, C), mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(cells_of(matrix(row, C.GRAD, C.grad), i, j, C), mask=mask, other=0.0).to(tl.float32)
    m = tl.load(m_cells, mask=mask, other=0.0)
    v = tl.load(v_cells, mask=mask, other=0.0)
    grad = grad * inverse_scale + l2 * param
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad * grad
    new = keep * param - step_size * (m / (tl.sqrt(v) * root_scale + eps))
    tl.store(m_cells, m, mask=mask)
    tl.store(v_cells, v, mask=mask)
    write_param(weights, rounding_of(row, C), (param, new), (i, j), mask, C)


@jit
def factor_of(factors, row, at, mask, C: tl.constexpr):
    """Return the factors of a tile, broadcastable to [R, G, 8]."""
    i, j = at
    if C.along == "all":
        return tl.load(factors)
    elif C.joined:
        # A group may lie in two rows of the tensor; the program's first element says where all others are.
        left = tl.program_id(0).to(tl.int64) * (8 * C.groups)
        span = tl.load(row + C.SPAN)
        line = left // span
        column = (left - line * span).to(tl.int32) + spread(tl.arange(0, C.groups)[None, :, None] * 8, C)
        if C.narrow:
            turns = column // span.to(tl.int32)
        else:
            turns = (column >= span.to(tl.int32)).to(tl.int32)
        if C.along == "rows":
            return tl.load(factors + (line + turns), mask=mask, other=0.0)
        else:
            return tl.load(factors + (column - turns * span.to(tl.int32)), mask=mask, other=0.0)
    elif C.along == "rows":
        return tl.load(factors + i, mask=i < tl.load(row + C.ROWS), other=0.0)
    else:
        column = spread(j, C)
        return tl.load(factors + column, mask=column < tl.load(row + C.COLS), other=0.0)


@jit
def scale_kernel(table, workspace, C: tl.constexpr):
    """APOLLO's second sweep, `hardy.ops.updates.ScaleTask`; a program does one tile."""
    row = table + tl.program_id(1) * C.FIELDS
    keep = tl.load(address(row, C.KEEP, tl.float32))
    i, j, mask = tile_of(row, C)
    factor = factor_of(address(row, C.FACTOR, tl.float32), row, (i, j), mask, C)
    weights = matrix(row, C.PARAM, C.param)
    grad = tl.load(cells_of(matrix(row, C.GRAD, C.grad), i, j, C), mask=mask, other=0.0).to(tl.float32)
    param = tl.load(cells_of(weights, i, j, C), mask=mask, other=0.0).to(tl.float32)
    new = keep * param - tl.where(factor != 0, factor * grad, 0.0)
    write_param(weights, rounding_of(row, C), (param, new), (i, j), mask, C)
