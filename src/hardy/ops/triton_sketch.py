"""How APOLLO's sketches and their moments become launches of the kernels in `hardy.ops.triton_lowrank`.

K contracted length, C channels, R rank.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hardy.ops.triton_fold import Fold, fold_kernel
from hardy.ops.triton_launch import (
    BLOCKS,
    Entry,
    Kind,
    Launch,
    Row,
    aligned,
    batches,
    pointer,
    power_of_two,
    tile_shape,
    type_of,
)
from hardy.ops.triton_lowrank import Moment, Sketch, moments_kernel, sketch_matrix, sketch_vector
from hardy.ops.updates import Axis, MomentTask, SketchTask


class _Like(NamedTuple):
    """What tasks of one group of `sketch` share."""

    shape: tuple[int, int]
    grad: torch.dtype
    projection: torch.dtype
    contracts: Axis
    rank: int
    vector: bool
    vector_projection: bool
    device_type: str

    @property
    def channels(self) -> int:
        return self.shape[0] if self.contracts == "cols" else self.shape[1]

    @property
    def contracted(self) -> int:
        return self.shape[1] if self.contracts == "cols" else self.shape[0]

    @property
    def outputs(self) -> int:
        """Floats of a task's sketch and squares."""
        return self.channels * (self.rank + 1)


def _describe(task: SketchTask) -> Entry:
    grad, projection = task.grad, task.projection_KR
    rows, cols = grad.shape
    rank = projection.shape[1]
    like = _Like(
        (rows, cols),
        grad.dtype,
        projection.dtype,
        task.contracts,
        rank,
        aligned((grad,), rows=rows),
        aligned((projection,), rows=1 if rank == 1 else 2),
        grad.device.type,
    )
    row = (
        rows,
        cols,
        pointer(grad),
        grad.stride(0),
        pointer(projection),
        projection.stride(0),
        pointer(task.sketch),
        0,
        pointer(task.squares),
        0,
        0,
        0,
    )
    return like, row


def _launches(like: _Like, rows: list[Row]) -> Iterable[Launch]:
    if not like.channels:
        return
    kernel, block, tiles, sizes = (_vector if like.rank == 1 else _matrix)(like)
    splits, split = _splits(like, tiles=tiles, unit=sizes.pop("unit"))
    config = Sketch(
        grad=type_of(like.grad),
        projection=type_of(like.projection),
        contracts=like.contracts,
        rank=like.rank,
        splits=splits,
        whole=like.shape[1] % 8 == 0,
        vector=like.vector,
        vector_projection=like.vector_projection,
        **sizes,
    )
    floats = like.outputs * splits if splits > 1 else 0
    for part in batches(rows, floats):
        placed = [(*row[: Sketch.SPLIT], split, index * floats, 0) for index, row in enumerate(part)]
        yield Launch(
            kernel=kernel,
            config=config,
            programs=tiles * splits,
            rows=placed,
            block=block,
            floats=floats * len(part),
        )
        if splits > 1:
            yield _fold(like, placed, splits)


def _vector(like: _Like) -> tuple[Any, str, int, dict[str, Any]]:
    """Return kernel, entry of BLOCKS, tiles of a task and the sizes that `Sketch` wants, for rank 1."""
    block = BLOCKS["vector"]
    tile_rows, groups = tile_shape(like.shape, groups=block["groups"], strip=block["strip"])
    along, unit = (tile_rows, 8 * groups) if like.contracts == "cols" else (8 * groups, tile_rows)
    sizes = {"tile_rows": tile_rows, "groups": groups, "unit": unit}
    return sketch_vector, "vector", -(-like.channels // along), sizes


def _matrix(like: _Like) -> tuple[Any, str, int, dict[str, Any]]:
    """Return kernel, entry of BLOCKS, tiles of a task and the sizes that `Sketch` wants, for larger ranks.

    The tensor cores want tiles of 16 and more. Triton's interpreter, the only user of CPU tensors here, has
    no product of bf16; in fp32 it is the same number.
    """
    half = like.grad == torch.bfloat16 and like.device_type == "cuda"
    name = "matrix32"
    if half:
        name = "matrix16" if like.projection == torch.bfloat16 else "matrix16by32"
    block = BLOCKS[name]
    channels = max(16, min(block["channels"], power_of_two(like.channels)))
    ranks = max(16, min(block["ranks"], power_of_two(like.rank)))
    contracted = max(16, min(block["contracted"], power_of_two(like.contracted)))
    sizes: dict[str, Any] = {
        "channels": channels,
        "ranks": ranks,
        "contracted": contracted,
        "unit": contracted,
    }
    sizes["product"] = type_of(torch.bfloat16 if half else torch.float32)
    return sketch_matrix, name, -(-like.channels // channels) * -(-like.rank // ranks), sizes


def _splits(like: _Like, *, tiles: int, unit: int) -> tuple[int, int]:
    """Return into how many parts the contracted axis is cut, and how long they are, in whole units."""
    block = BLOCKS["vector"]
    wanted = min(-(-block["programs"] // tiles), max(1, block["floats"] // like.outputs))
    units = max(1, -(-like.contracted // unit))
    split = -(-units // min(wanted, units)) * unit
    return max(1, -(-like.contracted // split)), split


def _fold(like: _Like, placed: list[Row], splits: int) -> Launch:
    """Return the launch that adds the parts of sketches and squares."""
    size, block = like.channels * like.rank, BLOCKS["fold"]
    rows: list[Row] = []
    for row in placed:
        work, outputs = row[Sketch.WORK], like.outputs
        rows.append((row[Sketch.SKETCH], size, work, outputs, splits, 0, size, 0))
        rows.append((row[Sketch.SQUARES], like.channels, work + size, outputs, splits, 0, like.channels, 0))
    return Launch(
        kernel=fold_kernel,
        config=Fold(add=False, gated=False, entries=block["entries"], parts=block["parts"]),
        programs=-(-size // block["entries"]),
        rows=rows,
        block="fold",
    )


class _LikeMoments(NamedTuple):
    """What tasks of one group of `moments` share."""

    shape: tuple[int, int]
    channels: Axis
    vector: bool


def _describe_moments(task: MomentTask) -> Entry:
    tensors = (task.sketch, task.exp_avg, task.exp_avg_sq)
    rows, cols = task.sketch.shape
    channels = task.channels
    strides: list[int] = [tensor.stride(0) for tensor in tensors]
    if channels == "rows" and cols == 1 and strides == [1, 1, 1]:
        # Rank 1: one row of channels is read in whole groups, a column of them one by one.
        rows, cols, channels, strides = 1, rows, "cols", [rows] * 3
    like = _LikeMoments((rows, cols), channels, _all_aligned(tensors, strides, rows))
    numbers = [
        number
        for tensor, stride in zip(tensors, strides, strict=True)
        for number in (tensor.data_ptr(), stride)
    ]
    small = (pointer(task.coefficients), pointer(task.before), pointer(task.after), 0)
    return like, (rows, cols, *numbers, *small)


def _all_aligned(tensors: Iterable[Tensor], strides: list[int], rows: int) -> bool:
    """Whether all rows of fp32 tensors begin at multiples of 16 bytes."""
    return not any(tensor.data_ptr() % 16 for tensor in tensors) and (
        rows == 1 or not any(stride % 4 for stride in strides)
    )


def _moment_launches(like: _LikeMoments, rows: list[Row]) -> Iterable[Launch]:
    if not like.shape[0] * like.shape[1]:
        return
    block = BLOCKS["moments"]
    tile_rows, groups = tile_shape(like.shape, groups=block["groups"], strip=block["strip"])
    config = Moment(
        channels=like.channels,
        whole=like.shape[1] % 8 == 0,
        vector=like.vector,
        tile_rows=tile_rows,
        groups=groups,
    )
    along = tile_rows if like.channels == "rows" else 8 * groups
    channels = like.shape[0] if like.channels == "rows" else like.shape[1]
    for part in batches(rows, 0):
        yield Launch(
            kernel=moments_kernel,
            config=config,
            programs=-(-channels // along),
            rows=part,
            block="moments",
        )


SKETCH = Kind(name="sketch", describe=_describe, launches=_launches)
MOMENTS = Kind(name="moments", describe=_describe_moments, launches=_moment_launches)
