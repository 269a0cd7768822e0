"""The sweeps of `hardy.ops.updates` in plain torch operations: the reference back end, right on every device.

A sweep does all its operations on one tile of a tensor before the next (`hardy.ops.tiles`): on a CPU a tile
stays in cache, and nowhere does a temporary grow with the tensor. Sums are taken tile by tile in one fixed
order, so a run comes out the same bit for bit.

Papers: APOLLO (arXiv 2412.05270), algorithm 1; AdamW (1711.05101). SMMF's sweep is in
`hardy.ops.updates_eager_sweep`. Shape suffixes: K contracted length, C channels, R rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hardy.ops import philox
from hardy.ops.rounding import store
from hardy.ops.tiles import at, buffers, cut, loaded, mask_where, shape_of, tiles
from hardy.ops.updates import AdamTask, FillTask, MomentTask, ScaleTask, SketchTask
from hardy.ops.updates_eager_sweep import sweep as sweep

_MATRIX_WIDTH = 1024
"""Least columns of a tile that is multiplied with a projection: a page of each row and enough rows."""

_NUMBERS_AT_ONCE = 1 << 18
"""Random numbers drawn before they are copied, so that nothing of the projection's size stands beside it."""


@torch.no_grad()
def sketch(tasks: Sequence[SketchTask]) -> None:
    """Do APOLLO's first sweep: sketches of gradients and the squared norms of their channels."""
    for task in tasks:
        _sketch(task)


def _sketch(task: SketchTask) -> None:
    rows, cols = task.grad.shape
    if not rows * cols:
        task.sketch.zero_()
        task.squares.zero_()
        return
    (buffer,) = buffers(1, like=task.sketch, numel=rows * cols)
    contracted = 1 if task.contracts == "cols" else 0
    for tile in tiles((rows, cols), most=len(buffer), width=max(_MATRIX_WIDTH, len(buffer) // rows)):
        work = at(buffer, shape_of(tile))
        grad = loaded(task.grad[tile], work)
        inner, channels = tile[contracted], tile[1 - contracted]
        projection_KR = task.projection_KR[inner].to(task.sketch.dtype)
        if task.contracts == "cols":
            _add_product(task.sketch[channels], grad, projection_KR, first=inner.start == 0)
        else:
            _add_product(task.sketch[:, channels], projection_KR.T, grad, first=inner.start == 0)
        squares = torch.mul(grad, grad, out=work).sum(contracted)
        if inner.start == 0:
            task.squares[channels].copy_(squares)
        else:
            task.squares[channels].add_(squares)


def _add_product(out: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Write left @ right to `out`, which nothing has been written to when `first`, or add it."""
    if first:
        torch.mm(left, right, out=out)
    else:
        out.addmm_(left, right)


@torch.no_grad()
def moments(tasks: Sequence[MomentTask]) -> None:
    """Update the moments of sketches; say how long each channel was before and after."""
    for task in tasks:
        _moments(task)


def _moments(task: MomentTask) -> None:
    task.before.zero_()
    task.after.zero_()
    active, beta1, beta2, eps, inverse_scale = task.coefficients.unbind()
    on = active != 0
    mask = mask_where(on, like=active)
    rate1, rate2 = ((1 - beta) * on for beta in (beta1, beta2))
    flat = buffers(2, like=active, numel=task.sketch.numel())
    summed = 1 if task.channels == "rows" else 0
    for tile in tiles((task.sketch.shape[0], task.sketch.shape[1]), most=len(flat[0])):
        x, work = (at(buffer, shape_of(tile)) for buffer in flat)
        cut(torch.mul(task.sketch[tile], inverse_scale, out=x), mask)
        exp_avg, exp_avg_sq = task.exp_avg[tile], task.exp_avg_sq[tile]
        exp_avg.lerp_(x, rate1)
        exp_avg_sq.lerp_(torch.mul(x, x, out=work), rate2)
        channels = tile[1 - summed]
        task.before[channels].add_(work.sum(summed))
        torch.sqrt(exp_avg_sq, out=work).add_(eps)
        torch.div(exp_avg, work, out=x)
        task.after[channels].add_(cut(x.mul_(x), mask).sum(summed))


@torch.no_grad()
def scale(tasks: Sequence[ScaleTask]) -> None:
    """Do APOLLO's second sweep: shrink the weights, then move each channel along its gradient."""
    for task in tasks:
        _scale(task)


def _scale(task: ScaleTask) -> None:
    rows, cols = task.param.shape
    keep, factor = task.keep[0], task.factor.view((1, -1) if task.along == "cols" else (-1, 1))
    mask = mask_where(factor != 0, like=factor)
    flat = buffers(2, like=factor, numel=rows * cols)
    for tile in tiles((rows, cols), most=len(flat[0])):
        step, work = (at(buffer, shape_of(tile)) for buffer in flat)
        part = (
            tile[0] if task.along == "rows" else slice(None),
            tile[1] if task.along == "cols" else slice(None),
        )
        cut(torch.mul(loaded(task.grad[tile], step), factor[part], out=step), mask[part])
        param = loaded(task.param[tile], work)
        param.mul_(keep).sub_(step)
        store(task.param, param, task.rounding, tile=tile)


@torch.no_grad()
def adam(tasks: Sequence[AdamTask]) -> None:
    """Do AdamW's sweep."""
    for task in tasks:
        _adam(task)


def _adam(task: AdamTask) -> None:
    rows, cols = task.param.shape
    active, beta1, beta2, step_size, root_scale, eps, keep, l2, inverse_scale = task.coefficients.unbind()
    on = active != 0
    mask = mask_where(on, like=active)
    rate1, rate2 = ((1 - beta) * on for beta in (beta1, beta2))
    # m / (sqrt(v) root + eps) = (m / root) / (sqrt(v) + eps / root): one pass less.
    eps, step_size = eps / root_scale, step_size / root_scale
    keep, minus_step = torch.where(on, keep, 1.0), torch.where(on, -step_size, 0.0)
    flat = buffers(3, like=active, numel=rows * cols)
    for tile in tiles((rows, cols), most=len(flat[0])):
        grad, work, param_work = (at(buffer, shape_of(tile)) for buffer in flat)
        exp_avg, exp_avg_sq = task.exp_avg[tile], task.exp_avg_sq[tile]
        torch.mul(loaded(task.grad[tile], grad), inverse_scale, out=grad)
        param = loaded(task.param[tile], param_work)
        cut(grad.addcmul_(param, l2), mask)
        exp_avg.lerp_(grad, rate1)
        exp_avg_sq.lerp_(torch.mul(grad, grad, out=work), rate2)
        torch.sqrt(exp_avg_sq, out=work).add_(eps)
        cut(torch.div(exp_avg, work, out=work), mask)
        param.mul_(keep).addcmul_(work, minus_step)
        store(task.param, param, task.rounding, tile=tile)


@torch.no_grad()
def fill(tasks: Sequence[FillTask]) -> None:
    """Draw random matrices."""
    for task in tasks:
        draw = philox.normals if task.distribution == "normal" else philox.signs
        flat = task.out.view(-1)
        for done in range(0, len(flat), _NUMBERS_AT_ONCE):
            part = flat[done : done + _NUMBERS_AT_ONCE]
            numbers = draw(
                task.key,
                start=task.start + done,
                count=len(part),
                third=task.epoch,
                fourth=task.slice,
                device=task.out.device,
            )
            part.copy_(numbers)
