"""How SMMF's sweep becomes launches of the kernels in `hardy.ops.triton_smmf`.

Terms: a strip is some columns of the square-ish matrix, a band some rows of it; a program has one strip of
one band. Which rows of the matrix a worker holds follows from the place of its view; the first and the last
of them may be held in part.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from hardy.ops.triton_fold import Fold, fold_kernel
from hardy.ops.triton_launch import (
    BLOCKS,
    WORKSPACE_FLOATS,
    Entry,
    Kind,
    Launch,
    Row,
    aligned,
    batches,
    pointer,
    tile_shape,
    type_of,
)
from hardy.ops.triton_rounding import in_pairs, is_flat, rounded_how
from hardy.ops.triton_smmf import Sweep, sweep_signs, sweep_tiles
from hardy.ops.updates import SweepTask


class _Like(NamedTuple):
    """What tasks of one group share; begin and end are the matrix rows that the worker holds."""

    shape: tuple[int, int]
    matrix: tuple[int, int]
    begin: int
    end: int
    param: torch.dtype
    grad: torch.dtype
    rounding: str
    step: torch.dtype
    pairs: bool
    flat: bool
    eights: bool
    vector: bool
    sign: str
    skip_zeros: bool
    stride: int

    @property
    def kinds(self) -> int:
        """Moments."""
        return 1 if self.sign == "none" else 2

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and groups of a tile of the matrix."""
        block = BLOCKS["sweep"]
        return tile_shape(
            (self.end - self.begin, self.matrix[1]), groups=block["groups"], strip=block["strip"]
        )


@dataclass(frozen=True, slots=True)
class _Cut:
    """How some rows of the matrix are cut into programs."""

    begin: int
    end: int
    strips: int
    band: int
    bands: int
    kinds: int
    width: int
    signs: bool
    """Whether new signs go through the workspace."""

    @property
    def row_floats(self) -> int:
        """Of workspace, for the row sums of one moment."""
        return self.strips * (self.end - self.begin)

    @property
    def col_floats(self) -> int:
        """Of workspace, for the column sums of one moment."""
        return self.bands * self.width

    @property
    def floats(self) -> int:
        """Of workspace, in all."""
        return self.signs_at + (-(-(self.end - self.begin) * -(-self.width // 8) // 4) if self.signs else 0)

    @property
    def signs_at(self) -> int:
        """Where new signs begin, behind all sums: a byte for each group of eight in a row of the matrix."""
        return self.kinds * (self.row_floats + self.col_floats) + self.strips * self.bands


def _describe(task: SweepTask) -> Entry:
    param, grad, sign, place, rounding = task.param, task.grad, task.sign, task.place, task.rounding
    (rows, cols), width = param.shape, task.col_v.numel()
    mode, step = rounded_how(param, rounding)
    rest = rounding.rest if mode == "kahan" else None
    packed = sign is not None and task.packed
    tensors = (param, grad, rest)
    # Weights and gradients may be one run of memory that the rows of signs, which begin on bytes, are not.
    run = rows == 1 or (place.stride == cols and is_flat(tensors, rounding))
    shifted = run and packed and rows > 1 and cols % 8 != 0
    flat = run and not shifted and (rows == 1 or is_flat((*tensors, sign), rounding))
    end = (place.base + (rows - 1) * place.stride + cols - 1) // width + 1 if rows * cols else 0
    begin = place.base // width if rows * cols else 0
    if flat:
        rows, cols = 1, rows * cols
    if shifted:
        eights = not (width % 8 or place.base % 8 or rows * cols % 8 or cols < 8)
    else:
        eights = not (width % 8 or place.base % 8 or cols % 8 or (rows > 1 and place.stride % 8))
    like = _Like(
        shape=(rows, cols),
        matrix=(task.row_v.numel(), width),
        begin=begin,
        end=end,
        param=param.dtype,
        grad=grad.dtype,
        rounding=mode,
        step=step,
        pairs=in_pairs(rounding, 1 if run else rows),
        flat=flat,
        eights=eights,
        vector=aligned(tensors, rows=1 if run else rows),
        sign="none"
        if sign is None
        else "bytes"
        if not packed
        else "groups"
        if eights and not shifted
        else "bits",
        skip_zeros=task.skip_zeros,
        stride=cols if flat else place.stride,
    )
    return like, _row(task, like)


def _row(task: SweepTask, like: _Like) -> Row:
    """Return a task's row; what depends on the launch comes behind `Sweep.WIDTH`, by `_placed`."""
    rounding, stochastic = task.rounding, like.rounding == "stochastic"
    key, place = rounding.key, rounding.place
    rest = rounding.rest if like.rounding == "kahan" else None
    large: list[int] = []
    for tensor in (task.param, task.grad, rest, task.sign):
        large += (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))
    return (
        *like.shape,
        key & 0xFFFFFFFF,
        (key >> 32) & 0xFFFFFFFF,
        place.base,
        place.stride,
        pointer(rounding.step) if stochastic else 0,
        pointer(task.coefficients),
        task.place.base,
        task.place.stride,
        *large,
        pointer(task.row_m),
        pointer(task.col_m),
        pointer(task.row_v),
        pointer(task.col_v),
        like.matrix[1],
        # Not read by the kernels: `_fold` takes it from here.
        pointer(task.sums),
    )


def _placed(row: Row, cut: _Cut, work: int) -> Row:
    """Return the row as the kernels want it, with what depends on the launch."""
    launch = (cut.begin, cut.end, cut.band, cut.strips, cut.bands, work, work + cut.signs_at)
    return (*row[:-1], *launch)


def _cuts(like: _Like) -> Iterator[_Cut]:
    """Yield how the held rows of the matrix are cut, in parts that fit the workspace.

    The cut depends on the task alone, not on what else is in a call: sums come out the same bit for bit.
    """
    block, (tile_rows, groups) = BLOCKS["sweep"], like.tile
    width, strips = like.matrix[1], -(-like.matrix[1] // (8 * groups))
    most_bands = max(1, block["programs"] // strips)
    band = max(block["band"], -(-(like.end - like.begin) // most_bands))
    band = -(-band // tile_rows) * tile_rows
    signs = like.sign == "bits"
    per_band = like.kinds * (strips * band + width) + strips + signs * (band * -(-width // 8) // 4 + 1)
    step = max(1, WORKSPACE_FLOATS // per_band) * band
    for begin in range(like.begin, like.end, step):
        end = min(begin + step, like.end)
        yield _Cut(begin, end, strips, band, -(-(end - begin) // band), like.kinds, width, signs)


def _launches(like: _Like, rows: list[Row]) -> Iterable[Launch]:
    tile_rows, groups = like.tile
    config = Sweep(
        param=type_of(like.param),
        grad=type_of(like.grad),
        step=type_of(like.step),
        rounding=like.rounding,
        pairs=like.pairs and like.eights,
        flat=like.flat,
        vector=like.vector and like.eights,
        eights=like.eights,
        narrow=like.stride < 8 * groups,
        sign=like.sign,
        skip_zeros=like.skip_zeros,
        tile_rows=tile_rows,
        groups=groups,
    )
    cuts = list(_cuts(like)) or [_Cut(0, 0, 0, 0, 0, like.kinds, like.matrix[1], False)]
    for index, cut in enumerate(cuts):
        for part in batches(rows, cut.floats):
            placed = [_placed(row, cut, at * cut.floats) for at, row in enumerate(part)]
            if cut.bands:
                yield Launch(
                    kernel=sweep_tiles,
                    config=config,
                    programs=cut.strips * cut.bands,
                    rows=placed,
                    block="sweep",
                    floats=cut.floats * len(part),
                )
            yield from _folds(like, part, cut, add=index > 0)
            if cut.signs:
                yield _signs(like, replace(config, part=len(cuts) > 1), placed)


def _signs(like: _Like, config: Sweep, rows: list[Row]) -> Launch:
    """Return the launch that moves new signs from the workspace to the tensors."""
    tile_rows, groups = tile_shape(
        like.shape, groups=BLOCKS["signs"]["groups"], strip=BLOCKS["signs"]["groups"]
    )
    programs = -(-like.shape[0] // tile_rows) * -(-like.shape[1] // (8 * groups))
    config = replace(config, tile_rows=tile_rows, groups=groups, narrow=like.matrix[1] < 8)
    return Launch(kernel=sweep_signs, config=config, programs=programs, rows=rows, block="signs")


def _folds(like: _Like, rows: list[Row], cut: _Cut, *, add: bool) -> Iterator[Launch]:
    """Yield the launch that makes the sums of these tasks from what is in the workspace."""
    block, (height, width) = BLOCKS["fold"], like.matrix
    folded: list[Row] = []
    for index, row in enumerate(rows):
        out, active, work = row[-1], row[Sweep.COEFFICIENTS], index * cut.floats
        for kind in range(like.kinds):
            held = cut.end - cut.begin
            by_rows = work + kind * cut.row_floats
            by_cols = work + like.kinds * cut.row_floats + kind * cut.col_floats
            at = out + 4 * kind * (height + width)
            folded.append((at, height, by_rows, held, cut.strips, cut.begin, cut.end, active))
            folded.append((at + 4 * height, width, by_cols, width, cut.bands, 0, width, active))
        squares = work + cut.kinds * (cut.row_floats + cut.col_floats)
        at = out + 4 * like.kinds * (height + width)
        folded.append((at, 1, squares, 1, cut.strips * cut.bands, 0, 1, active))
    config = Fold(add=add, gated=True, entries=block["entries"], parts=block["parts"])
    programs = -(-max(height, width) // block["entries"])
    for part in batches(folded, 0):
        yield Launch(kernel=fold_kernel, config=config, programs=programs, rows=part, block="fold")


SWEEP = Kind(name="sweep", describe=_describe, launches=_launches)
