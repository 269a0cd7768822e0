"""SMMF's sweep in plain torch operations, tile by tile; the other sweeps are in `hardy.ops.updates_eager`.

Paper: K. Park, S. Lee, "SMMF: Square-Matricized Momentum Factorization", AAAI 2025 (arXiv 2412.08894).
Letters: g, m, v, u as in `hardy.ops.updates.SweepTask`; a sign is +1 where its bit is set, else -1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hardy.ops.factorize import Block, blocks
from hardy.ops.rounding import store
from hardy.ops.tiles import Tile, at, bits, buffers, cut, loaded, mask_where, shape_of, tiles
from hardy.ops.updates import Place, SweepTask

_GATHER_BITS = 0x0102040810204080
"""Eight bytes of 0 or 1, read as one little-endian integer, times this have byte b in bit 56 + b."""


@torch.no_grad()
def sweep(tasks: Sequence[SweepTask]) -> None:
    """Do SMMF's sweep."""
    for task in tasks:
        _Sweep(_along_matrix_rows(task)).run()


def _along_matrix_rows(task: SweepTask) -> SweepTask:
    """View what lies together in memory as matrix rows: a tile is then one block of the matrix, or three."""
    numel, width, place = task.param.numel(), len(task.col_v), task.place
    tensors = (task.param, task.grad, task.sign, task.rounding.rest)
    if (
        not numel
        or place.stride != task.param.shape[1]
        or numel % width
        or not all(x is None or x.is_contiguous() for x in tensors)
        or (task.packed and task.sign is not None and (width % 8 or task.param.shape[1] % 8))
    ):
        return task
    param, grad = (x.view(-1, width) for x in (task.param, task.grad))
    sign, rest = (None if x is None else x.view(len(param), -1) for x in (task.sign, task.rounding.rest))
    place = Place(base=place.base, stride=width)
    rounding = replace(task.rounding, place=place, rest=rest)
    return replace(task, param=param, grad=grad, sign=sign, place=place, rounding=rounding)


@dataclass(slots=True, kw_only=True)
class _Moment:
    """One factored moment during a sweep: the factors that were, and the sums for those that come."""

    row: Tensor
    col: Tensor
    """Times the decay; the momentum's comes with the signs."""
    row_sums: Tensor
    """In the task's sums: few tiles meet in a row, so it is added to as it is."""
    col_sums: Tensor
    """fp64: many tiles meet in a column."""

    def expand(self, buffer: Tensor, parts: Sequence[Block]) -> None:
        """Write the outer product of the factors to where the blocks lie in the buffer."""
        for part in parts:
            torch.mul(self.row[part.rows].unsqueeze(1), self.col[part.cols], out=part.of(buffer))

    def add(self, buffer: Tensor, parts: Sequence[Block]) -> None:
        """Add the blocks' row and column sums."""
        for part in parts:
            block = part.of(buffer)
            self.row_sums[part.rows].add_(block.sum(1))
            self.col_sums[part.cols].add_(block.sum(0))


def _moment(row: Tensor, col: Tensor, *, row_sums: Tensor) -> _Moment:
    wide = torch.float32 if col.device.type == "mps" else torch.float64  # MPS has no fp64
    col_sums = torch.zeros(len(col), dtype=wide, device=col.device)
    return _Moment(row=row, col=col, row_sums=row_sums, col_sums=col_sums)


class _Buffers:
    """What a sweep works in, as views of one tile's shape."""

    def __init__(self, flat: Sequence[Tensor], shape: tuple[int, int]):
        self.grad, self.m, self.v, self.work = (at(buffer, shape) for buffer in flat)
        self.nonzero = torch.empty(shape, dtype=torch.bool, device=self.grad.device)
        self.positive = torch.zeros(
            shape[0], -(-shape[1] // 8) * 8, dtype=torch.bool, device=self.grad.device
        )
        """Padded to whole bytes of signs."""


class _Sweep:
    """One task's sweep: its numbers, its sums and what it works in."""

    def __init__(self, task: SweepTask):
        self.task = task
        active, beta1, beta2, lr, keep, l2, eps, inverse_scale, most = task.coefficients.unbind()
        self.l2, self.eps, self.inverse_scale, self.most, self.least = l2, eps, inverse_scale, most, -most
        self.on, self.zero = active != 0, torch.zeros_like(active)
        self.mask = mask_where(self.on, like=active)
        self.rate1, self.rate2 = 1 - beta1, 1 - beta2
        self.keep, self.minus_lr = torch.where(self.on, keep, 1.0), torch.where(self.on, -lr, 0.0)
        task.sums.zero_()
        height, width = len(task.row_v), len(task.col_v)
        self.first = None
        if task.row_m is not None and task.col_m is not None:
            self.first = _moment(task.row_m, task.col_m, row_sums=task.sums[:height])
            self.beta1, self.signs_of_bytes = beta1, _signs_of_bytes(beta1)
        self.second = _moment(
            task.row_v, task.col_v * beta2, row_sums=task.sums[-1 - width - height : -1 - width]
        )
        self.square = torch.zeros_like(self.second.col_sums[:1])

    def run(self) -> None:
        task, (rows, cols) = self.task, self.task.param.shape
        padded = -(-cols // 8) * 8 if task.packed else cols
        self.flat = buffers(4, like=self.zero, numel=rows * padded)
        shape = (0, 0)
        for row_part, col_part in tiles((rows, padded), most=len(self.flat[0])):
            tile = (row_part, slice(col_part.start, min(col_part.stop, cols)))
            if shape_of(tile) != shape:
                shape = shape_of(tile)
                self.buffers = _Buffers(self.flat, shape)
            start = task.place.base + row_part.start * task.place.stride + col_part.start
            parts = list(blocks(start=start, stride=task.place.stride, shape=shape, width=len(task.col_v)))
            param = task.param[tile]
            self._take_gradient(task.grad[tile], param)
            if self.first is not None:
                self._first_moment(self.first, tile, parts)
            self._second_moment(parts)
            self._move(param, tile)
        self._close()

    def _take_gradient(self, grad: Tensor, param: Tensor) -> None:
        if self.task.skip_zeros:
            self.buffers.nonzero.copy_(grad)
        torch.mul(loaded(grad, self.buffers.grad), self.inverse_scale, out=self.buffers.grad)
        self.buffers.grad.addcmul_(loaded(param, self.buffers.work), self.l2)

    def _first_moment(self, moment: _Moment, tile: Tile, parts: Sequence[Block]) -> None:
        m, work = self.buffers.m, self.buffers.work
        moment.expand(self.flat[1], parts)
        m.mul_(self._decayed_signs(tile)).addcmul_(self.buffers.grad, self.rate1)
        self._keep_signs(torch.gt(m, self.zero, out=work), tile)
        torch.abs(m, out=work)
        moment.add(self.flat[3], parts)

    def _decayed_signs(self, tile: Tile) -> Tensor:
        """Return beta1 or -beta1 for each weight of the tile, in the work buffer."""
        assert self.task.sign is not None, "momentum comes with its signs"
        if not self.task.packed:
            return self.buffers.work.copy_(self.task.sign[tile]).mul_(2 * self.beta1).sub_(self.beta1)
        packed = self.task.sign[_bytes_of(tile)]
        signs = at(self.flat[3], (packed.numel(), 8))
        torch.index_select(self.signs_of_bytes, 0, packed.to(torch.int32).view(-1), out=signs)
        return signs.view(len(packed), -1)[:, : tile[1].stop - tile[1].start]

    def _keep_signs(self, positive: Tensor, tile: Tile) -> None:
        """Write which weights' m is above 0; `positive` holds 1 there, else 0."""
        assert self.task.sign is not None, "momentum comes with its signs"
        flags = self.buffers.positive
        flags[:, : positive.shape[1]].copy_(positive)
        if self.task.packed:
            signs = self.task.sign[_bytes_of(tile)]
            eights = (flags.view(torch.int64) * _GATHER_BITS).bitwise_right_shift_(56)
            signs.copy_(torch.where(self.on, eights.to(torch.uint8), signs))
        else:
            signs = self.task.sign[tile]
            signs.copy_(torch.where(self.on, flags[:, : positive.shape[1]], signs))

    def _second_moment(self, parts: Sequence[Block]) -> None:
        grad, v, work = self.buffers.grad, self.buffers.v, self.buffers.work
        self.second.expand(self.flat[2], parts)
        self.square.add_(torch.mul(grad, grad, out=work).sum())
        v.addcmul_(work, self.rate2)
        self.second.add(self.flat[2], parts)

    def _move(self, param: Tensor, tile: Tile) -> None:
        u = self.buffers.grad if self.first is None else self.buffers.m
        u.div_(self.buffers.v.sqrt_().add_(self.eps))
        torch.minimum(u, self.most, out=u)
        torch.maximum(u, self.least, out=u)
        if self.task.skip_zeros:
            cut(u, bits(self.buffers.work).copy_(self.buffers.nonzero).neg_())
        values = loaded(param, self.buffers.work)
        values.mul_(self.keep).addcmul_(cut(u, self.mask), self.minus_lr)
        store(self.task.param, values, self.task.rounding, tile=tile)

    def _close(self) -> None:
        """Put the sums of the columns and of the squares to their places; all are 0 where not active."""
        sums, width = self.task.sums, len(self.second.col)
        sums[-1:].copy_(self.square)
        sums[-1 - width : -1].copy_(self.second.col_sums)
        if self.first is not None:
            height = len(self.first.row)
            sums[height : height + width].copy_(self.first.col_sums)
        cut(sums, self.mask)


def _bytes_of(tile: Tile) -> Tile:
    """Return where the packed signs of a tile stand; its first column is a multiple of 8."""
    return tile[0], slice(tile[1].start // 8, -(-tile[1].stop // 8))


def _signs_of_bytes(beta: Tensor) -> Tensor:
    """Return [256, 8]: `beta` where bit b of the byte is set, else -`beta`."""
    byte = torch.arange(256, device=beta.device).unsqueeze(1)
    bit = (byte >> torch.arange(8, device=beta.device)).bitwise_and_(1)
    return bit.mul_(2).sub_(1).to(beta.dtype).mul_(beta)
