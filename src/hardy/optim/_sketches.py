"""APOLLO's sketches: made, summed over workers, turned into moments; in bands where one would be too large.

Where nobody else has a part of a matrix, as many matrices as may be held are sketched and turned into moments
at once, before the first exchange; what is done with numbers of channels is then done once for all of them. A
sketch of which others have a part stays from the first exchange to its moments. Where one sketch is more than
a step may hold, and nobody else has a part of it, the gradient's norm is taken in a sweep of its own and the
sketch is made and used band by band: channels of a tall matrix, rows of the projection of a wide one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hardy.ops.updates import MomentTask, SketchTask
from hardy.optim._geometry import Geometry
from hardy.optim._projections import bases_of, projection_bytes
from hardy.optim._rule import TEMPORARY_BYTES, Bundle, Member, table
from hardy.optim._sharded import Round, Scatter, Sum

NUMBERS_OF_A_CHANNEL = 8
"""Floats that a step holds for a channel besides its sketch: squared norms, factors, what these come from."""
SHARE_OF_NUMBERS = 4
"""They may take this part of TEMPORARY_BYTES, beside sketches that take all of it."""


@dataclass(kw_only=True)
class Sketched:
    """What is known of a bundle's channels once the moments of their sketches are updated."""

    squares: Tensor
    """[n, stack, C]: squared norms of channels of the gradient."""
    norm: Tensor
    """[n, stack]: squared norms of whole gradients, over all workers."""
    active: Tensor
    """[n, stack]: 1 where a matrix takes part in the step, else 0."""
    before: Tensor
    """[n, stack, C]: squared norms of channels of the sketch."""
    after: Tensor
    """[n, stack, C]: the same once divided by the root of the second moment."""


def matrices_of(tensor: Tensor, geometry: Geometry) -> Tensor:
    """Return a parameter's local part as [stack, rows, cols]."""
    return tensor.view(geometry.stack, geometry.rows, geometry.cols)


def sketch_bytes(geometry: Geometry) -> int:
    """Return what one parameter's sketch takes, with what is sent of it; the same on all workers."""
    copies = 2 if geometry.scattered is not None or geometry.summed else 1
    return 4 * copies * (geometry.rank + 1) * geometry.most_channels


def held_bytes(member: Member, geometry: Geometry) -> int:
    """Return what counts against TEMPORARY_BYTES for a member, from one exchange of a step to the next."""
    if geometry.is_alone:
        return 4 * NUMBERS_OF_A_CHANNEL * SHARE_OF_NUMBERS * geometry.most_channels
    return sketch_bytes(geometry) + projection_bytes(member.param, geometry)


def is_banded(geometry: Geometry) -> bool:
    """Whether a sketch is too large to be held, and this worker may cut it."""
    shared = geometry.scattered is not None or geometry.summed
    return not shared and sketch_bytes(geometry) > TEMPORARY_BYTES


def sketch_and_update(bundle: Bundle, geometry: Geometry) -> Any:
    """Sketch all gradients and update the sketches' moments, in one round; return `Sketched`."""
    if geometry.is_alone:
        yield Round()
        return _sketched_alone(bundle, geometry)
    sketch, squares, norm = yield from _sketch_round(bundle, geometry)
    squares, norm = _unscaled(bundle, squares), _unscaled(bundle, norm)
    active = _active(bundle, norm)
    coefficients = _coefficients(bundle, geometry, norm)
    coefficients[..., 0] = active
    before, after = _update_moments(bundle, geometry, bundle.all, sketch, coefficients)
    return Sketched(squares=squares, norm=norm, active=active, before=before, after=after)


def _sketched_alone(bundle: Bundle, geometry: Geometry) -> Sketched:
    """Sketch some members at a time and update their moments at once, which needs nobody else."""
    parts, squares, before, after = list(_parts(bundle, geometry)), [], [], []
    norm = torch.empty((len(bundle.members), geometry.stack), dtype=bundle.dtype, device=bundle.device)
    coefficients = _coefficients(bundle, geometry, norm)
    for part in parts:
        chosen = slice(part.start, part.stop)
        sketch, own = _sketch(bundle, geometry, part)
        own = _unscaled(bundle, own)
        torch.sum(own, -1, out=norm[chosen])
        coefficients[chosen, :, 0] = _active(bundle, norm[chosen])
        moved = _update_moments(bundle, geometry, part, sketch, coefficients)
        for found, new in zip((squares, before, after), (own, *moved), strict=True):
            found.append(new)
        del sketch
    whole = [found[0] if len(found) == 1 else torch.cat(found) for found in (squares, before, after)]
    return Sketched(
        squares=whole[0], norm=norm, active=coefficients[..., 0].clone(), before=whole[1], after=whole[2]
    )


def _parts(bundle: Bundle, geometry: Geometry) -> Iterator[range]:
    """Yield members whose sketches and projections may be held together."""
    each = sketch_bytes(geometry) + projection_bytes(bundle.members[0].param, geometry)
    most = 1 if is_banded(geometry) else max(1, TEMPORARY_BYTES // each)
    for begin in range(0, len(bundle.members), most):
        yield bundle.all[begin : begin + most]


def _unscaled(bundle: Bundle, squares: Tensor) -> Tensor:
    """Return squares of gradients without their scale."""
    if bundle.grad_scale is None:
        return squares
    inverse_scale = bundle.inverse_scale()
    return squares * inverse_scale * inverse_scale


def _active(bundle: Bundle, norm: Tensor) -> Tensor:
    """Return 1 for matrices that take part in the step: with a gradient that is neither NaN nor infinite."""
    group = bundle.group
    moved = norm != 0 if group["zero_grad"] == "skip" else _moves(norm, group["lr"])
    active = (moved & (norm < math.inf)).to(bundle.dtype)
    return active if bundle.found_inf is None else active * bundle.allowed()


def _moves(norm: Tensor, lr: Any) -> Tensor:
    """Whether there is a gradient, or a rate at which zero gradients count."""
    nonzero = lr.to(norm.device) != 0 if isinstance(lr, Tensor) else torch.full_like(norm, float(lr != 0)) > 0
    return (norm != 0) | nonzero


def _coefficients(bundle: Bundle, geometry: Geometry, like: Tensor) -> Tensor:
    """Return the numbers of `MomentTask` for all members; the first column, who takes part, is still 0."""
    group = bundle.group
    inverse = bundle.inverse_scale() / (1.0 if group["proj"] == "svd" else math.sqrt(geometry.rank))
    return table([0.0, *group["betas"], group["eps"], inverse], like=like)


def _sketch(bundle: Bundle, geometry: Geometry, part: range) -> tuple[Tensor, Tensor]:
    """Return sketches [n, stack, ...] and squared norms of channels [n, stack, C] of some members.

    In bands there is no sketch yet: one column of it is made along with the squares.
    """
    banded = is_banded(geometry)
    rank = 1 if banded else geometry.rank
    tall, channels = geometry.contracts == "cols", geometry.local_channels
    like = torch.empty((), dtype=bundle.dtype, device=bundle.device)
    # What has no gradient, or no part of one on this worker, is not swept.
    held = [(index, grad) for index in part if (grad := bundle.grads[index]) is not None and grad.numel() > 0]
    make = like.new_empty if len(held) == len(part) else like.new_zeros
    sketch = make((len(part), geometry.stack, *((channels, rank) if tall else (rank, channels))))
    squares = make((len(part), geometry.stack, channels))
    bases = bases_of(bundle, geometry, part)
    places = [(index, level) for index in part for level in range(geometry.stack)]
    cut = {where: bases.of(*where)[:, :rank].contiguous() for where in places} if banded else None

    def tasks() -> list[SketchTask]:
        return [
            SketchTask(
                grad=matrices_of(grad, geometry)[level],
                projection_KR=bases.of(index, level) if cut is None else cut[index, level],
                contracts=geometry.contracts,
                sketch=sketch[index - part.start, level],
                squares=squares[index - part.start, level],
            )
            for index, grad in held
            for level in range(geometry.stack)
        ]

    memory = bases.memory if cut is None else cut.values()
    bundle.sweep("sketch", sketch, squares, *memory, tasks=tasks, part=part)
    return sketch, squares


def _sketch_round(bundle: Bundle, geometry: Geometry) -> Any:
    """Sketch all gradients; return sketches of own channels, their squares, and the whole squared norms."""
    count, stack, rank = len(bundle.members), geometry.stack, geometry.rank
    tall, channels = geometry.contracts == "cols", geometry.local_channels
    sketch, squares = _sketch(bundle, geometry, bundle.all)
    norms = squares.sum(-1)  # no worker may have a gradient
    norms = torch.cat([norms, bundle.present().unsqueeze(-1)], dim=-1)
    wanted = Round(sums=[Sum(norms, geometry.channel_splits + geometry.summed)])
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
    return sketch, squares, torch.where(norms[:, -1:] > 0, norms[:, :-1], 0)


def _update_moments(
    bundle: Bundle, geometry: Geometry, part: range, sketch: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """Update the moments of some members' sketches; return squared norms of channels before and after.

    Args:
        bundle: whose.
        geometry: of its matrices.
        part: which members.
        sketch: theirs, [n, stack, ...]; in bands it is not looked at.
        coefficients: of all members.
    """
    tall = geometry.contracts == "cols"
    if is_banded(geometry):
        sizes = (2, len(part), geometry.stack, geometry.local_channels)
        before, after = coefficients.new_zeros(sizes)
        _moments_by_band(bundle, geometry, part, coefficients, (before, after))
        return before, after
    own = sketch.shape[-2] if tall else sketch.shape[-1]
    make = sketch.new_empty if own > 0 else sketch.new_zeros
    before, after = make((2, *sketch.shape[:2], own))

    def tasks() -> list[MomentTask]:
        return [
            MomentTask(
                sketch=sketch[index - part.start, level],
                exp_avg=local["exp_avg"].view(geometry.stack, *sketch.shape[2:])[level],
                exp_avg_sq=local["exp_avg_sq"].view(geometry.stack, *sketch.shape[2:])[level],
                channels="rows" if tall else "cols",
                coefficients=coefficients[index, level],
                before=before[index - part.start, level],
                after=after[index - part.start, level],
            )
            for index in part
            for local in [bundle.members[index].local]
            for level in range(geometry.stack)
            if own > 0
        ]

    bundle.sweep("moments", sketch, coefficients, before, after, tasks=tasks, part=part)
    return before, after


def _moments_by_band(
    bundle: Bundle, geometry: Geometry, part: range, coefficients: Tensor, sums: tuple[Tensor, Tensor]
) -> None:
    """Make each sketch band by band and use it at once; add up what the channels were before and after."""
    bases = bases_of(bundle, geometry, part)
    for index in part:
        member, grad = bundle.members[index], bundle.grads[index]
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
                    (sums[0][index - part.start, level], sums[1][index - part.start, level]),
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
