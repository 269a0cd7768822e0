"""Matrices in int8: a byte per weight, a scale and a zero point per group of columns; a descent step on them.

Paper: H. Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", 2024 (arXiv 2412.05270), Q-APOLLO.
Letters: q code, s scale, z zero point, w weight, lo <= 0 <= hi the ends of a group, u in [0, 1).

    w = (q - z) s;    s = (hi - lo) / 254,  z = ceil(-lo / s),  q = floor(w / s + z + u)

u is random (stochastic rounding) or 1/2 (to nearest). Zero is always a code. To nearest, every update below
half of s is lost; stochastically its mean is kept.

Differs from the usual form, which divides by 255, rounds z to nearest and clamps q: there one end of a group
is cut by up to s / 2 at each step, and groups shrink by 6 to 12 % in a thousand steps of 0.02 s. With a step
to spare both ends lie among the 256 codes whatever z is, and the mean is kept at the ends too.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hardy.ops.philox import grid_words
from hardy.ops.tiles import Tile, cut, mask_where, tiles
from hardy.ops.updates import Place, Rounding

_LARGEST = 255
_STEPS = 254
"""Steps between the ends of a group: one less than there are, so that a whole zero point clips no end."""
_TILE_ELEMENTS = {"cpu": 1 << 16}
"""Weights worked on at a time: on a CPU so few that their temporaries, 26 bytes each, stay in cache."""
_TILE_ELEMENTS_ELSEWHERE = 1 << 19
"""On other devices 13 MiB of temporaries."""


@dataclass(slots=True, kw_only=True)
class Int8Matrix:
    """A matrix whose value (i, j) is (q[i, j] - zero_point[i, b]) * scale[i, b], with b = j // group.

    Groups never cross rows; the last one of a row may be shorter.
    """

    q: Tensor
    """uint8 [rows, cols]."""
    scale: Tensor
    """fp32 [rows, ceil(cols / group)], above 0."""
    zero_point: Tensor
    """uint8, shaped as `scale`; the code of the value 0."""
    group: int
    """Columns of a row that share a scale and a zero point."""


def quantize(values: Tensor, *, group: int, rounding: Rounding | None = None) -> Int8Matrix:
    """Return a matrix in int8; each value is off by less than one scale, by at most half when to nearest.

    Args:
        values: [rows, cols], any floating dtype; used in fp32.
        group: Columns of a row that share a scale.
        rounding: "stochastic" draws from its key, step and place; None and "nearest" draw nothing.

    Raises:
        ValueError: not a matrix, or a group without columns.

    Example:
        >>> matrix = quantize(torch.tensor([[0.0, 1.0, -0.25, 0.5]]), group=4)
        >>> dequantize(matrix, dtype=torch.float32).mul(100).round().tolist()
        [[0.0, 100.0, -25.0, 50.0]]
    """
    if values.dim() != 2:
        raise ValueError(f"only matrices are quantized, got shape {tuple(values.shape)}; view it as a matrix")
    if group < 1:
        raise ValueError(f"group must be at least 1 column, got {group}; 128 is usual")
    rows, cols = values.shape
    num_groups = -(-cols // group)
    result = Int8Matrix(
        q=torch.empty(rows, cols, dtype=torch.uint8, device=values.device),
        scale=torch.empty(rows, num_groups, dtype=torch.float32, device=values.device),
        zero_point=torch.empty(rows, num_groups, dtype=torch.uint8, device=values.device),
        group=group,
    )
    for tile, groups in _tiles(result):
        part = _part(result, tile, groups)
        exact = values[tile].reshape(part.q.shape).to(torch.float32, copy=True)
        _write(part, _encode(exact, _uniform(rounding, tile, exact)), changed=None)
    return result


def dequantize(matrix: Int8Matrix, *, dtype: torch.dtype) -> Tensor:
    """Return the values [rows, cols], computed in fp32 and rounded once to `dtype`.

    Eagerly it works tile by tile; a compiler is shown the whole matrix, whose operations it can merge.
    """
    out = torch.empty(matrix.q.shape, dtype=dtype, device=matrix.q.device)
    for tile, groups in _tiles(matrix, times=4):  # it needs 4 bytes of temporaries a weight, not 26
        part = _part(matrix, tile, groups)
        out[tile].view(part.q.shape).copy_(_values(part))
    return out


@torch.no_grad()
def requantize_step(
    matrix: Int8Matrix,
    grad: Tensor,
    *,
    factor: Tensor,
    along: Literal["rows", "cols", "all"],
    keep: Tensor,
    rounding: Rounding,
) -> None:
    """Do w = keep * w - factor * grad in fp32, in place, and quantize anew with fresh scales and zero points.

    A group none of whose values moves keeps its codes: a step that must not happen (factor 0, keep 1) changes
    no bit, although rounding is random. Temporaries stay under 16 MiB; nothing waits for the device.

    Args:
        matrix: The weight; overwritten.
        grad: [rows, cols], any floating dtype; only read, and not looked at where the factor is 0.
        factor: [rows], [cols] or [1], as `along` says.
        along: Which axis the factors follow.
        keep: [1].
        rounding: "stochastic" or "nearest"; keys of int8 weights have the purpose "hardy.q8.v1".

    Example:
        >>> matrix = quantize(torch.tensor([[0.0, 1.0]]), group=2)
        >>> nearest = Rounding(mode="nearest", key=0, step=torch.tensor(1), place=whole((1, 2)))
        >>> grad, one = torch.tensor([[0.0, 0.5]]), torch.ones(1)
        >>> requantize_step(matrix, grad, factor=one, along="all", keep=one, rounding=nearest)
        >>> dequantize(matrix, dtype=torch.float32).tolist()
        [[0.0, 0.5]]
    """
    factor, keep = factor.to(torch.float32), keep.to(torch.float32)
    for tile, groups in _tiles(matrix):
        part = _part(matrix, tile, groups)
        if along == "cols":
            factors = factor[tile[1]].view(1, *part.q.shape[1:])
        else:
            factors = (factor[tile[0]] if along == "rows" else factor).view(-1, 1, 1)
        step = grad[tile].reshape(part.q.shape).to(torch.float32) * factors
        cut(step, mask_where(factors != 0, like=step))
        old = _values(part)
        new = (old * keep).sub_(step)
        changed = (new != old).any(dim=-1, keepdim=True)
        del step, old
        _write(part, _encode(new, _uniform(rounding, tile, new)), changed=changed)


@dataclass(slots=True)
class _Part:
    """The same tile of codes, scales and zero points, as [rows, groups, columns of a group] or [..., 1]."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor


def _tiles(matrix: Int8Matrix, *, times: int = 1) -> Iterator[tuple[Tile, slice]]:
    """Yield tiles of whole groups of one width, and which groups they are: full ones, then the short last."""
    rows, cols = matrix.q.shape
    group, full = matrix.group, cols // matrix.group * matrix.group
    most = times * _TILE_ELEMENTS.get(matrix.q.device.type, _TILE_ELEMENTS_ELSEWHERE)
    if torch.compiler.is_compiling():
        most = sys.maxsize
    for first, end, width in ((0, full, group), (full, cols, cols - full)):
        most = max(most, width)
        wide = None if end - first <= most else most // width * width
        for tall, across in tiles((rows, end - first), most=most, width=wide):
            groups = slice((first + across.start) // group, -(-(first + across.stop) // group))
            yield (tall, slice(first + across.start, first + across.stop)), groups


def _part(matrix: Int8Matrix, tile: Tile, groups: slice) -> _Part:
    scale, zero_point = (x[tile[0], groups].unsqueeze(-1) for x in (matrix.scale, matrix.zero_point))
    q: Tensor = matrix.q[tile]
    return _Part(q.view(q.shape[0], scale.shape[1], -1), scale, zero_point)


def _values(part: _Part) -> Tensor:
    """Return the fp32 values of a tile."""
    return part.q.to(torch.float32).sub_(part.zero_point.to(torch.float32)).mul_(part.scale)


def _uniform(rounding: Rounding | None, tile: Tile, like: Tensor) -> Tensor | float:
    """Return what is added before cutting: 24 random bits below the point, or a half."""
    if rounding is None or rounding.mode == "nearest":
        return 0.5
    place = rounding.place
    words = grid_words(
        rounding.key,
        start=place.base + tile[0].start * place.stride + tile[1].start,
        stride=place.stride,
        shape=(tile[0].stop - tile[0].start, tile[1].stop - tile[1].start),
        third=rounding.step,
        device=like.device,
    )
    return words.bitwise_right_shift_(8).to(torch.float32).mul_(2.0**-24).view(like.shape)


def _encode(values: Tensor, uniform: Tensor | float) -> _Part:
    """Return codes (as fp32), scales and zero points (as fp32) of groups of values; overwrites `values`."""
    low, high = values.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp_(max=0), high.clamp_(min=0)
    scale = high / _STEPS - low / _STEPS  # apart, so that no range of finite values overflows
    scale = torch.where(scale == 0, 1, scale)
    zero_point = (low / scale).neg_().ceil_().clamp_(0, _LARGEST)
    exact = values.div_(scale)
    codes = exact.floor()
    # The fraction alone meets the random bits: beside a code of up to 255 it would lose eight of its own.
    codes.add_(exact.sub_(codes).add_(uniform).floor_()).add_(zero_point).clamp_(0, _LARGEST)
    return _Part(codes, scale, zero_point)


def _write(part: _Part, new: _Part, *, changed: Tensor | None) -> None:
    """Write new codes, scales and zero points, of all groups or of those that changed."""
    for target, values in (
        (part.q, new.q),
        (part.scale, new.scale),
        (part.zero_point, new.zero_point),
    ):
        values = values.to(target.dtype)
        target.copy_(values if changed is None else torch.where(changed, values, target))


def whole(shape: tuple[int, ...]) -> Place:
    """Return the place of a matrix that is no part of a larger one."""
    return Place(base=0, stride=shape[1])
