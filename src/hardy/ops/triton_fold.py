# pyright: basic, reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Basic, since the kernels' language has no types and pyright reads it as Python; the host's files are strict.
"""Triton kernel of second stages: adds up the parts of sums that other programs left in the workspace.

Parts are added in a fixed order and in fp64, without atomics, so a run comes out the same bit for bit.
"""

from dataclasses import dataclass

import triton.language as tl

from hardy.ops.triton_kernels import Layout, address, jit


@dataclass(frozen=True, kw_only=True, repr=False)
class Fold(Layout):
    """What is known when the kernel is compiled; the capital names are fields of a table row.

    A row names one output of LENGTH floats: entry k is the sum of the PARTS floats at SOURCE + part * APART +
    k - BEGIN of the workspace if BEGIN <= k < END, else 0. ACTIVE is the address of a float; where that is 0,
    all entries are 0.
    """

    OUT, LENGTH, SOURCE, APART, PARTS, BEGIN, END, ACTIVE, FIELDS = range(9)

    add: bool
    """Whether the sums are added to what the output holds."""
    gated: bool
    """Whether there is an ACTIVE."""
    entries: int
    parts: int


@jit
def fold_kernel(table, workspace, C: tl.constexpr):
    """Make `C.entries` entries of one output."""
    row = table + tl.program_id(1) * C.FIELDS
    out, length = address(row, C.OUT, tl.float32), tl.load(row + C.LENGTH)
    begin, end, apart = tl.load(row + C.BEGIN), tl.load(row + C.END), tl.load(row + C.APART)
    parts = tl.load(row + C.PARTS)
    if C.gated:
        parts = tl.where(tl.load(address(row, C.ACTIVE, tl.float32)) != 0, parts, 0)
    entry = tl.program_id(0) * C.entries + tl.arange(0, C.entries)
    inside = (entry >= begin) & (entry < end)
    source = workspace + tl.load(row + C.SOURCE) + (entry - begin)
    total = tl.full((C.entries,), 0.0, tl.float64)
    for first in range(0, parts, C.parts):
        part = first + tl.arange(0, C.parts)[:, None]
        values = tl.load(source[None, :] + part * apart, mask=inside[None, :] & (part < parts), other=0.0)
        total += tl.sum(values.to(tl.float64), axis=0)
    if C.add:
        total += tl.load(out + entry, mask=entry < length, other=0.0).to(tl.float64)
    tl.store(out + entry, total.to(tl.float32), mask=entry < length)
