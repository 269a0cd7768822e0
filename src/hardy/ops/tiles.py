"""Working through a large tensor tile by tile, in buffers made once, with masks that stop NaN.

On a CPU the buffers of a sweep fit into a core's own cache, elsewhere into a fixed budget; so a sweep reads
and writes main memory once, and no temporary grows with the tensor.

A mask is an integer of all or no bits, and cutting is AND: unlike a product with 0 it stops NaN and infinity,
and unlike `torch.where` it runs at the full width of the vector unit.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

Tile = tuple[slice, slice]
"""Rows and columns of a part of a 2-D tensor."""

_BUFFER_BYTES = {"cpu": 3 << 19}
"""All buffers of a sweep together: 1.5 MiB, most of the second-level cache of a current core."""
_BUFFER_BYTES_ELSEWHERE = 40 << 20


def tiles(shape: tuple[int, int], *, most: int, width: int | None = None) -> Iterator[Tile]:
    """Yield tiles of at most `most` elements that cover a 2-D tensor, from the top left, bands of rows.

    Args:
        shape: Rows and columns of the tensor.
        most: Elements of a tile, at least 8.
        width: Columns of a tile; when None as many as fit, a multiple of 8 where a row does not fit.

    Example:
        >>> [(rows.start, rows.stop, cols.start, cols.stop) for rows, cols in tiles((3, 5), most=10)]
        [(0, 2, 0, 5), (2, 3, 0, 5)]
    """
    rows, cols = shape
    if not rows * cols:
        return
    width = min(cols, most, width or (cols if cols <= most else most // 8 * 8))
    height = max(1, most // width)
    for top in range(0, rows, height):
        for left in range(0, cols, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, cols))


def shape_of(tile: Tile) -> tuple[int, int]:
    """Return rows and columns of a tile.

    Example:
        >>> shape_of((slice(2, 5), slice(0, 7)))
        (3, 7)
    """
    return tile[0].stop - tile[0].start, tile[1].stop - tile[1].start


def buffers(number: int, *, like: Tensor, numel: int) -> list[Tensor]:
    """Return `number` flat buffers for tiles of a tensor of `numel` elements; dtype and device of `like`.

    Their length is the most elements that a tile may have.

    Example:
        >>> [len(buffer) for buffer in buffers(2, like=torch.tensor(0.0), numel=100)]
        [104, 104]
    """
    budget = _BUFFER_BYTES.get(like.device.type, _BUFFER_BYTES_ELSEWHERE)
    most = max(8, min(budget // (number * like.element_size()), numel) + 7) // 8 * 8
    return [torch.empty(most, dtype=like.dtype, device=like.device) for _ in range(number)]


def at(buffer: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the front of a flat buffer as a tile of `shape`."""
    return buffer[: shape[0] * shape[1]].view(shape)


def loaded(source: Tensor, buffer: Tensor) -> Tensor:
    """Return a tile of a tensor in the dtype of the buffer, a tile too: itself, or a copy in the buffer."""
    return source if source.dtype == buffer.dtype else buffer.copy_(source)


def bits(x: Tensor) -> Tensor:
    """Return the same memory as integers of the same size."""
    return x.view(torch.int64 if x.element_size() == 8 else torch.int32)


def mask_where(keep: Tensor, *, like: Tensor) -> Tensor:
    """Return the mask that keeps where `keep` is true and cuts elsewhere, for values of the dtype of `like`.

    Example:
        >>> x = torch.tensor([float("nan"), 2.0])
        >>> cut(x, mask_where(torch.tensor([False, True]), like=x)).tolist()
        [0.0, 2.0]
    """
    return keep.to(torch.int64 if like.element_size() == 8 else torch.int32).neg_()


def cut(x: Tensor, mask: Tensor) -> Tensor:
    """Set `x` to 0, in place, where the mask cuts; return it."""
    bits(x).bitwise_and_(mask)
    return x
