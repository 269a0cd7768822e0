# pyright: basic, reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Basic, since the kernels' language has no types and pyright reads it as Python; the host's files are strict.
"""What all Triton kernels of the sweeps share: tasks in a table, tiles of eights, random words, rounding.

A launch works on tasks that are alike. Its table is an int64 matrix on the device, one row per task:
addresses, sizes and counters. `tl.program_id(1)` picks the task, `tl.program_id(0)` the part of it.
Everything known on the host that is the same for all tasks of a launch, and the places of the table's fields,
stand in a frozen dataclass `C`, a compile-time constant.

A tile is three-dimensional, [R, G, 8]: R rows of G groups of eight neighbours. A group is what one thread
loads at once (16 bytes of bf16), what one byte of signs covers, and two Philox counters, so masks, signs and
random words are made once per group, and no value changes its thread.

Loaded addresses say nothing about alignment; `C.vector` (the host has looked) promises 16 bytes.
"""

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl

jit: Any = triton.jit
"""Triton's decorator, which is untyped: what it makes takes a grid and launch options too."""

LIFT: Any = tl.constexpr(1 << 62)
"""See `as_arguments`."""
LIFTED: Any = tl.constexpr(1 << 52)
"""See `move_addresses`."""

TYPES: dict[torch.dtype, tl.dtype] = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}
"""Triton's name of each dtype a kernel may read."""


class Layout:
    """Base of the constants `C`. Their repr is in the key of Triton's cache on disk, so it names the table's
    fields too: a kernel must not be found there that was compiled for another order of them."""

    def __repr__(self) -> str:
        fields = {name: value for name, value in vars(type(self)).items() if name.isupper()}
        return f"{type(self).__name__}({vars(self)}, {fields})"


def as_arguments(numbers: Iterable[int]) -> tuple[int, ...]:
    """Return numbers from 0 to 2**60 as a kernel takes them in a tuple; there `number_of` undoes it.

    Triton compiles a kernel anew for each pattern of an argument's type (32 or 64 bits) and of its
    divisibility by 16, inside tuples even where told not to. All of these have 64 bits and are odd.
    """
    return tuple([LIFT.value + 2 * number + 1 for number in numbers])


@jit
def number_of(argument):
    """Return the number that `as_arguments` made an argument of."""
    return (argument - LIFT) >> 1


@jit
def address(row, field: tl.constexpr, dtype: tl.constexpr):
    """Return the pointer that stands in a field of a table row."""
    return tl.load(row + field).to(tl.pointer_type(dtype))  # pyright: ignore[reportArgumentType]  # a constexpr is read as its value


@jit
def matrix(row, field: tl.constexpr, dtype: tl.constexpr):
    """Return (pointer, row stride) of a 2-D tensor; the stride stands behind the address.

    Read before a loop, not in it: the compiler cannot know that the loop's stores leave the table alone.
    """
    return address(row, field, dtype), tl.load(row + field + 1)


@jit
def cells_of(tensor, i, j, C: tl.constexpr):
    """Return pointers to elements (i, j) of a `matrix`.

    i, j: broadcastable to [R, G, 1]; j is the first column of a group of eight, which this spreads to [R, G,
    8], unless `C.eights` is false: then they name elements. `C.flat`: there is one row, and i is not looked
    at.
    """
    offset = j
    if not C.flat:
        offset = j + i * tensor[1]
    cells = tensor[0] + spread(offset, C)
    if C.vector:
        cells = tl.multiple_of(cells, (16, 16, 16))
    return cells


@jit
def spread(first, C: tl.constexpr):
    """Return the elements of groups: `first` [.., 1] to [.., 8], unless it names elements already."""
    if C.eights:
        return first + tl.arange(0, 8)[None, None, :]
    else:
        return first


@jit
def philox(key, w0, w1, w2, w3):
    """Return the four words, uint32, that Philox-4x32-10 makes of a 64-bit key and a counter of four words.

    As `tl.philox`, but with one wide product where that takes two for its halves.
    """
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        even = w0.to(tl.uint64) * 0xD2511F53
        odd = w2.to(tl.uint64) * 0xCD9E8D57
        w0 = (odd >> 32).to(tl.uint32) ^ w1 ^ low
        w2 = (even >> 32).to(tl.uint32) ^ w3 ^ high
        w1, w3 = odd.to(tl.uint32), even.to(tl.uint32)
        low += 0x9E3779B9
        high += 0xBB67AE85
    return w0, w1, w2, w3


@jit
def words_of(key, counter, third, fourth):
    """Return the four words of (counter's low word, its high word, third, fourth)."""
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return philox(key, low, high, zero + third, zero + fourth)


@jit
def random_words(key, flat, third, fourth, pairs: tl.constexpr, eights: tl.constexpr):
    """Return the Philox words of flat indices, uint32, as `hardy.ops.philox.words` makes them.

    flat: int64 [R, G, 1], first of a group of eight, or [R, G, E] elements where `eights` is false. `pairs`:
    all are multiples of 4, so a group is two whole counters; otherwise each element takes one word out of
    four.
    """
    if pairs:
        a0, a1, a2, a3 = words_of(key, flat >> 2, third, fourth)
        b0, b1, b2, b3 = words_of(key, (flat >> 2) + 1, third, fourth)
        # Joined so that word 2 x + y of counter z stands at [.., z, x, y]: the eight of a group, in order.
        # Each thread makes those of its own groups; counters in a tensor [R, G, 2] would change hands.
        even = tl.join(tl.join(a0, b0), tl.join(a2, b2))
        odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
        return tl.join(even, odd).reshape(flat.shape[0], flat.shape[1], 8)
    else:
        element = flat
        if eights:
            element = flat + tl.arange(0, 8)[None, None, :]
        w0, w1, w2, w3 = words_of(key, element >> 2, third, fourth)
        lane = element & 3
        return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@jit
def to_nearest(x):
    """Return fp32 `x` rounded to the nearest bf16, ties to even, as fp32; in integers, so that it is the same
    in Triton's interpreter."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@jit
def to_bf16(x):
    """Return fp32 `x` as bf16, which holds it exactly; by its bits, since the interpreter loses denormals."""
    return (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@jit
def stochastically(x, words):
    """Return fp32 `x` cut to bf16 after adding bits 16 ... 31 of the words below its mantissa, as fp32."""
    bits = x.to(tl.uint32, bitcast=True)
    # A NaN could be carried on into a number; an infinity stays, since what is added is cut again.
    quiet = (bits | 0x400000) & 0xFFFF0000
    rounded = (bits + (words >> 16)) & 0xFFFF0000
    return tl.where(x == x, rounded, quiet).to(tl.float32, bitcast=True)


@jit
def rounding_of(row, C: tl.constexpr):
    """Return what `write_param` wants: (key, step, place's base, its stride), or the matrix of rests."""
    if C.rounding == "stochastic":
        key = tl.load(row + C.KEY) | (tl.load(row + C.KEY + 1) << 32)
        step = tl.load(address(row, C.STEP, C.step)).to(tl.int64).to(tl.uint32)
        return key, step, tl.load(row + C.BASE), tl.load(row + C.BASE + 1)
    else:
        return address(row, C.REST, tl.bfloat16), tl.load(row + C.REST + 1)


@jit
def write_param(param, rounding, values, at, mask, C: tl.constexpr):
    """Write a new weight over an old one, rounded as `C.rounding` says.

    As `hardy.ops.updates.Rounding` and `hardy.ops.rounding`: stochastic, kahan and nearest are for bf16;
    "cast" is for other dtypes.

    param: a `matrix`. rounding: of `rounding_of`. values: (old, new), fp32. at: (i, j), as for `cells_of`.
    """
    old, new = values
    i, j = at
    if C.rounding == "stochastic":
        flat = rounding[2] + j
        if not C.flat:
            flat = flat + i * rounding[3]
        new = stochastically(new, random_words(rounding[0], flat, rounding[1], 0, C.pairs, C.eights))
    elif C.rounding == "nearest":
        new = to_nearest(new)
    elif C.rounding == "kahan":
        rest_cells = cells_of(rounding, i, j, C)
        old_rest = tl.load(rest_cells, mask=mask, other=0.0)
        same = new == old
        exact = new + old_rest.to(tl.float32)
        rounded = to_nearest(exact)
        rest = to_bf16(to_nearest(exact - rounded))
        # What is unchanged is written back as it was: a store with a mask of its own would not be 16 bytes
        # wide.
        tl.store(rest_cells, tl.where(same, old_rest, rest), mask=mask)
        new = tl.where(same, old, rounded)
    cells = cells_of(param, i, j, C)
    if C.rounding == "cast":
        tl.store(cells, new.to(C.param), mask=mask)
    else:
        tl.store(cells, to_bf16(new), mask=mask)


@jit
def tile_of(row, C: tl.constexpr):
    """Return (i, j, mask) of this program's tile of a [rows, cols] tensor: int64 [R, 1, 1] and [1, G, 1], and
    which of its groups exist, or which elements where the columns are not all in whole groups."""
    rows = tl.load(row + C.ROWS)
    cols = tl.load(row + C.COLS)
    across = tl.cdiv(cols, 8 * C.groups).to(tl.int32)
    tile = tl.program_id(0)
    top = (tile // across).to(tl.int64) * C.tile_rows
    left = (tile % across).to(tl.int64) * (8 * C.groups)
    i = (top + tl.arange(0, C.tile_rows))[:, None, None]
    j = (left + tl.arange(0, C.groups) * 8)[None, :, None]
    if C.whole:
        mask = (i < rows) & (j < cols)
    else:
        mask = (i < rows) & (spread(j, C) < cols)
    return i, j, mask


@jit
def write_table(table, arguments, COUNT: tl.constexpr):
    """Write COUNT numbers, given by `as_arguments`."""
    for index in tl.static_range(COUNT):
        tl.store(table + index, number_of(arguments[index]))


@jit
def move_addresses(table, places, arguments, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Write addresses into a table anew: of the tensors that lie elsewhere now.

    places: [3, count] rows: where an address stands, in which tensor it lies, what it was at first.
    arguments, as `as_arguments` gives them: count, then for each tensor that moved its number and LIFTED more
    than the bytes it moved by since the first time.
    """
    count = number_of(arguments[0])
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    cell = tl.load(places + index, mask=mask, other=0)
    tensor = tl.load(places + count + index, mask=mask, other=-1)
    first = tl.load(places + 2 * count + index, mask=mask, other=0)
    now, moved = first, tensor < 0
    for pair in tl.static_range(PAIRS):
        is_it = tensor == number_of(arguments[2 * pair + 1])
        now = tl.where(is_it, first + (number_of(arguments[2 * pair + 2]) - LIFTED), now)
        moved = moved | is_it
    tl.store(table + cell, now, mask=mask & moved)
