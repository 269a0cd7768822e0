# pyright: basic, reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Basic, since the kernels' language has no types and pyright reads it as Python; the host's files are strict.
"""Triton kernel of APOLLO's random matrices: Philox numbers of a flat range, as `hardy.ops.philox` makes
them.

Words and signs are the same bits. Of the normals, logarithm, sine and cosine may differ in the last place.
"""

from dataclasses import dataclass

import triton.language as tl

from hardy.ops.triton_kernels import Layout, address, jit, random_words, to_nearest


@dataclass(frozen=True, kw_only=True, repr=False)
class Fill(Layout):
    """What is known when the kernel is compiled."""

    KEY, KEY_HIGH, THIRD, FOURTH, START, COUNT, OUT, _, FIELDS = range(9)

    out: tl.dtype
    distribution: str
    vector: bool
    groups: int


@jit
def normals_of(words, groups: tl.constexpr):
    """Return standard normals [1, G, 8] of words [1, G, 8]: Box-Muller on pairs of neighbours.

    The angle is taken apart into quarter turns, exactly, and a rest of at most an eighth of a turn: rounded
    as a part of a whole turn it would cost up to 1e-6.
    """
    uniform = (2 * (words >> 9) + 1).to(tl.float32) * (2.0**-24)
    even, odd = tl.split(uniform.reshape(1, groups, 4, 2))
    length = tl.sqrt_rn(-2.0 * tl.log(even))
    quarter = tl.floor(4.0 * odd + 0.5)
    angle = (4.0 * odd - quarter) * 1.5707963267948966
    turns = quarter.to(tl.int32)
    cosine = tl.where(turns & 1 == 1, tl.sin(angle), tl.cos(angle))
    sine = tl.where(turns & 1 == 1, tl.cos(angle), tl.sin(angle))
    first = length * tl.where((turns + 1) & 2 == 2, -cosine, cosine)
    second = length * tl.where(turns & 2 == 2, -sine, sine)
    return tl.join(first, second).reshape(1, groups, 8)


@jit
def fill_kernel(table, workspace, C: tl.constexpr):
    """Fill a part of a tensor with the Philox numbers of a flat range, `hardy.ops.updates.FillTask`."""
    row = table + tl.program_id(1) * C.FIELDS
    key = tl.load(row + C.KEY) | (tl.load(row + C.KEY_HIGH) << 32)
    third, fourth = tl.load(row + C.THIRD).to(tl.uint32), tl.load(row + C.FOURTH).to(tl.uint32)
    start = tl.load(row + C.START)
    end = start + tl.load(row + C.COUNT)
    first = start // 8 * 8 + tl.program_id(0).to(tl.int64) * (8 * C.groups)
    flat = (first + tl.arange(0, C.groups) * 8)[None, :, None]
    words = random_words(key, flat, third, fourth, True, True)
    if C.distribution == "rademacher":
        values = 1.0 - 2.0 * (words >> 31).to(tl.float32)
    else:
        values = normals_of(words, C.groups)
    if C.out == tl.bfloat16:
        values = to_nearest(values)
    element = flat + tl.arange(0, 8)[None, None, :]
    cells = address(row, C.OUT, C.out) + (element - start)
    mask = (element >= start) & (element < end)
    if C.vector:
        cells = tl.multiple_of(cells, (16, 16, 16))
        mask = flat < end
    tl.store(cells, values.to(C.out), mask=mask)
