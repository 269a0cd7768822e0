"""APOLLO's sketches: made, summed over workers, turned into moments; in bands where one would be too large.

A sketch stays in memory from the first exchange of a step to its moments. Where that is more than a step may
hold, and nobody else has a part of it, the gradient's norm is taken in a sweep of its own and the sketch is
made and used band by band: channels of a tall matrix, rows of the projection of a wide one.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hardy.ops.updates import MomentTask, SketchTask
from hardy.optim._geometry import Geometry
from hardy.optim._projections import bases_of
from hardy.optim._rule import TEMPORARY_BYTES, Bundle, table
from hardy.optim._sharded import Round, Scatter, Sum


def matrices_of(tensor: Tensor, geometry: Geometry) -> Tensor:
    """Return a parameter's local part as [stack, rows, cols]."""
    return tensor.view(geometry.stack, geometry.rows, geometry.cols)


def sketch_bytes(geometry: Geometry) -> int:
    """Return what one parameter holds from the first round to its moments; the same on all workers."""
    copies = 2 if geometry.scattered is not None or geometry.summed else 1
    return 4 * copies * (geometry.rank + 1) * geometry.most_channels


def is_banded(geometry: Geometry) -> bool:
    """Whether a sketch is too large to be held, and this worker may cut it."""
    shared = geometry.scattered is not None or geometry.summed
    return not shared and sketch_bytes(geometry) > TEMPORARY_BYTES


def sketch_round(bundle: Bundle, geometry: Geometry) -> Any:
    """Sketch all gradients; return sketches of own channels, their squares, and the whole squared norms.

    In bands there is no sketch yet: one column of it is made along with the squares, and None returned.
    """
    count, stack = len(bundle.members), geometry.stack
    banded = is_banded(geometry)
    rank = 1 if banded else geometry.rank
    places = [(index, level) for index in range(count) for level in range(stack)]
    tall, channels = geometry.contracts == "cols", geometry.local_channels
    like = torch.empty((), dtype=bundle.dtype, device=bundle.device)
    # What has no gradient, or no part of one on this worker, is not swept.
    is_swept = all(grad is not None and grad.numel() > 0 for grad in bundle.grads)
    make = like.new_empty if is_swept else like.new_zeros
    sketch = make((count, stack, *((channels, rank) if tall else (rank, channels))))
    squares = make((count, stack, channels))
    bases = bases_of(bundle, geometry)
    parts = {where: bases.of(*where)[:, :rank].contiguous() for where in places} if banded else None

    def tasks() -> list[SketchTask]:
        return [
            SketchTask(
                grad=matrices_of(grad, geometry)[level],
                projection_KR=bases.of(index, level) if parts is None else parts[index, level],
                contracts=geometry.contracts,
                sketch=sketch[index, level],
                squares=squares[index, level],
            )
            for index, grad in enumerate(bundle.grads)
            if grad is not None and grad.numel() > 0
            for level in range(stack)
        ]

    memory = bases.memory if parts is None else parts.values()
    bundle.sweep("sketch", sketch, squares, *memory, tasks=tasks)
    over = geometry.channel_splits + geometry.summed
    norms = squares.sum(-1)
    if over:  # no worker may have a gradient
        norms = torch.cat([norms, bundle.present().unsqueeze(-1)], dim=-1)
    wanted = Round(sums=[Sum(norms, over)])
    if geometry.scattered is not None:
        rows = sketch.transpose(-1, -2) if tall else sketch
        scatter = Scatter(
            torch.cat([rows.reshape(-1, channels), squares.view(-1, channels)]), geometry.scattered
        )
        wanted.scatters.append(scatter)
        yield wanted
        own = scatter.result.shape[-1]
        sketch = scatter.result[: count * stack * rank].view(count, stack, rank, own)
        sketch = sketch.transpose(-1, -2).contiguous() if tall else sketch
        squares = scatter.result[count * stack * rank :].view(count, stack, own)
    else:
        wanted.sums += [Sum(sketch, geometry.summed), Sum(squares, geometry.summed)]
        yield wanted
    whole = torch.where(norms[:, -1:] > 0, norms[:, :-1], 0) if over else norms
    return None if banded else sketch, squares, whole


def update_moments(
    bundle: Bundle, geometry: Geometry, sketch: Tensor | None, active: Tensor
) -> tuple[Tensor, ...]:
    """Update the sketches' moments; return squared norms of channels before and after, and the new step."""
    group, tall = bundle.group, geometry.contracts == "cols"
    inverse = bundle.inverse_scale() / (1.0 if group["proj"] == "svd" else math.sqrt(geometry.rank))
    coefficients = table([active, *group["betas"], group["eps"], inverse], like=active)
    step = bundle.stacked("step").view(active.shape)
    step = step + active.to(step.dtype)
    if sketch is None:
        before, after = active.new_zeros(2, *active.shape, geometry.local_channels)
        _moments_by_band(bundle, geometry, coefficients, before, after)
        return before, after, step
    own = sketch.shape[-2] if tall else sketch.shape[-1]
    make = sketch.new_empty if own > 0 else sketch.new_zeros
    before, after = make((2, *active.shape, own))

    def tasks() -> list[MomentTask]:
        return [
            MomentTask(
                sketch=sketch[index, level],
                exp_avg=member.local["exp_avg"].view(geometry.stack, *sketch.shape[2:])[level],
                exp_avg_sq=member.local["exp_avg_sq"].view(geometry.stack, *sketch.shape[2:])[level],
                channels="rows" if tall else "cols",
                coefficients=coefficients[index, level],
                before=before[index, level],
                after=after[index, level],
            )
            for index, member in enumerate(bundle.members)
            for level in range(geometry.stack)
            if own > 0
        ]

    bundle.sweep("moments", sketch, coefficients, before, after, tasks=tasks)
    return before, after, step


def _moments_by_band(
    bundle: Bundle, geometry: Geometry, coefficients: Tensor, before: Tensor, after: Tensor
) -> None:
    """Make each sketch band by band and use it at once; add up what the channels were before and after."""
    bases = bases_of(bundle, geometry)
    for index, (member, grad) in enumerate(zip(bundle.members, bundle.grads, strict=True)):
        if grad is None or grad.numel() == 0:
            continue
        for level in range(geometry.stack):
            grad_RC, basis_KR = matrices_of(grad, geometry)[level], bases.of(index, level)
            moments = [
                member.local[key].view(geometry.stack, -1, member.local[key].shape[-1])[level]
                for key in ("exp_avg", "exp_avg_sq")
            ]
            for band in _bands(moments[0]):
                _one_band(
                    bundle,
                    geometry,
                    (grad_RC, basis_KR, *(moment[band] for moment in moments)),
                    band,
                    coefficients[index, level],
                    (before[index, level], after[index, level]),
                )


def _bands(moment: Tensor) -> list[slice]:
    """Return slices of the first axis of a moment, [C, R] or [R, C], that hold half of what a step may."""
    width = max(1, TEMPORARY_BYTES // 2 // (moment.shape[1] * moment.element_size()))
    return [slice(begin, begin + width) for begin in range(0, moment.shape[0], width)]


def _one_band(
    bundle: Bundle,
    geometry: Geometry,
    tensors: tuple[Tensor, ...],
    band: slice,
    coefficients: Tensor,
    sums: tuple[Tensor, Tensor],
) -> None:
    grad_RC, basis_KR, exp_avg, exp_avg_sq = tensors
    tall = geometry.contracts == "cols"
    if tall:
        grad_RC = grad_RC[band]
    else:
        basis_KR = basis_KR[:, band].contiguous()
    sketch = torch.empty_like(exp_avg)
    squares, before, after = exp_avg.new_empty(3, sketch.shape[0 if tall else 1])
    bundle.backend.sketch(
        [
            SketchTask(
                grad=grad_RC,
                projection_KR=basis_KR,
                contracts=geometry.contracts,
                sketch=sketch,
                squares=squares,
            )
        ]
    )
    bundle.backend.moments(
        [
            MomentTask(
                sketch=sketch,
                exp_avg=exp_avg,
                exp_avg_sq=exp_avg_sq,
                channels="rows" if tall else "cols",
                coefficients=coefficients,
                before=before,
                after=after,
            )
        ]
    )
    for total, part in zip(sums, (before, after), strict=True):
        # A band of a tall matrix has channels of its own, one of a wide matrix a share of each channel.
        (total[band] if tall else total).add_(part)
