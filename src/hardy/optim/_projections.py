"""What a gradient is projected on: random numbers by counter, or its own leading directions.

Source: APOLLO (arXiv 2412.05270), section 3; counters as in `hardy.ops.philox`. Nothing random is stored:
element (a, k) of a projection is a function of (seed, parameter name, epoch, expert, k * rank + a), k counted
in the whole tensor, so every worker draws what it needs alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hardy.ops.lowrank import top_directions
from hardy.ops.philox import key_for
from hardy.ops.updates import FillTask
from hardy.optim._geometry import Geometry, is_stack
from hardy.optim._rule import Bundle, Group, Member
from hardy.optim._sharded import copy_of_first, gather_whole, local_part


@dataclass(frozen=True, slots=True)
class Bases:
    """The projections of a bundle's matrices."""

    of: Callable[[int, int], Tensor]
    """From a member's index and a local matrix's place in the stack to its projection [K, rank]."""
    memory: Sequence[Tensor]
    """The tensors that all of them lie in."""


def bases_of(bundle: Bundle, geometry: Geometry, part: range | None = None) -> Bases:
    """Return what the gradients of a bundle's members, or of those in `part`, are projected on.

    On a CPU, where drawing is slow, random projections are kept for their epoch; elsewhere those of the
    bundle are drawn together, at each step, for bf16 gradients as bf16.
    """
    group, part = bundle.group, bundle.all if part is None else part
    if group["proj"] == "svd":
        own = {index: _own_basis(bundle, index, geometry) for index in part}
        return Bases(lambda index, level: own[index][level], [*own.values()])
    places = [(index, level) for index in part for level in range(geometry.stack)]
    if bundle.device.type == "cpu" or group["share_projection"]:
        kept = {place: _kept_projection(bundle, *place, geometry) for place in places}
        return Bases(lambda index, level: kept[index, level], [*kept.values()])
    low = any(grad is not None and grad.dtype == torch.bfloat16 for grad in bundle.grads)
    sizes = (len(part), geometry.stack, geometry.local_contracted, geometry.rank)
    drawn = torch.empty(sizes, dtype=torch.bfloat16 if low else torch.float32, device=bundle.device)
    bundle.sweep(
        "fill",
        drawn,
        tasks=lambda: [
            _draw(drawn[index - part.start, level], _numbers_of(bundle, index, level, geometry))
            for index, level in places
        ],
        epoch=_epoch(group),
        part=part,
    )
    whole = drawn if low else drawn.to(bundle.dtype)
    return Bases(lambda index, level: whole[index - part.start, level], [whole])


def projection_bytes(param: Tensor, geometry: Geometry) -> int:
    """Return what is drawn for a parameter at each step and not kept."""
    return 0 if param.device.type == "cpu" else 2 * geometry.most_contracted * geometry.rank


def _epoch(group: Group) -> int:
    return group["calls"] // group["update_proj_gap"]


class _Numbers(NamedTuple):
    """Which random numbers a projection is made of; equal ones are equal projections."""

    distribution: Literal["normal", "rademacher"]
    key: int
    start: int
    epoch: int
    slice: int


def _numbers_of(bundle: Bundle, index: int, level: int, geometry: Geometry) -> _Numbers:
    group, member = bundle.group, bundle.members[index]
    expert = level + (member.shard.offset[0] if is_stack(member.shard.shape, group) else 0)
    key = member.projection_key
    if group["share_projection"]:
        key, expert = key_for(group["seed"], f"contracted {geometry.contracted}", purpose="hardy.proj.v1"), 0
    start = geometry.contracted_begin * geometry.rank
    return _Numbers(group["proj"], key, start, _epoch(group), expert)


def _draw(out: Tensor, numbers: _Numbers) -> FillTask:
    return FillTask(out=out, **numbers._asdict())


def _kept_projection(bundle: Bundle, index: int, level: int, geometry: Geometry) -> Tensor:
    """Return the random projection of one matrix, drawn at most once in its epoch."""
    grad, numbers = bundle.grads[index], _numbers_of(bundle, index, level, geometry)
    low = grad is not None and grad.dtype == torch.bfloat16
    sizes = (geometry.local_contracted, geometry.rank)
    where = (*numbers._replace(epoch=0), *sizes, low, bundle.dtype, bundle.device)
    kept_epoch, kept = bundle.projections.get(where, (None, None))
    if kept is not None and kept_epoch == numbers.epoch:
        return kept
    drawn = torch.empty(sizes, dtype=torch.float32, device=bundle.device)
    bundle.backend.fill([_draw(drawn, numbers)])
    drawn = _representable(drawn.to(bundle.dtype), low)
    bundle.projections[where] = (numbers.epoch, drawn)
    return drawn


def _representable(basis: Tensor, low: bool) -> Tensor:
    """Return values that a bf16 product can take as they are, for bf16 gradients, on every device."""
    return basis.to(torch.bfloat16).to(basis.dtype) if low else basis


def _own_basis(bundle: Bundle, index: int, geometry: Geometry) -> Tensor:
    """Return the local part of the singular directions, [stack, K, rank]; new ones at the gap."""
    group, member, grad = bundle.group, bundle.members[index], bundle.grads[index]
    epoch, late = divmod(group["calls"], group["update_proj_gap"])
    if late == 0:
        _refresh_basis(bundle, member, geometry, epoch)
    begin, length = geometry.contracted_begin, geometry.local_contracted
    basis = member.local["basis"].view(geometry.stack, geometry.rank, geometry.contracted)
    part = basis[:, :, begin : begin + length].transpose(-1, -2).contiguous()
    return _representable(part, grad is not None and grad.dtype == torch.bfloat16)


def _refresh_basis(bundle: Bundle, member: Member, geometry: Geometry, epoch: int) -> None:
    """Take the leading directions of the present gradient; without one, keep what there is.

    The whole gradient is gathered, once per `update_proj_gap` calls.
    """
    group, shard = bundle.group, member.shard
    grad = member.param.grad
    if grad is None:
        grad = torch.zeros_like(member.param)
    basis = member.local["basis"].view(geometry.stack, geometry.rank, geometry.contracted)
    first = int(is_stack(shard.shape, group))
    inner = [split for split in shard.splits if not first or split.dim > 0]
    whole = gather_whole(grad) if inner else local_part(grad)
    if first and inner and shard.splits_of(0):
        whole = whole[shard.offset[0] : shard.offset[0] + geometry.stack]
    whole = whole.reshape(geometry.stack, *_whole_sizes(geometry))
    for level in range(geometry.stack):
        usable = (bundle.allowed() > 0) & whole[level].isfinite().all() & (whole[level] != 0).any()
        new = top_directions(
            whole[level], geometry.rank, contracts=geometry.contracts, method=group["svd_method"]
        ).to(basis.dtype)
        if inner:
            copy_of_first(new, inner)
        drawn = torch.empty(geometry.contracted, geometry.rank, device=basis.device)
        expert = shard.offset[0] + level if first else 0
        numbers = _Numbers("normal", member.projection_key, 0, epoch, expert)
        bundle.backend.fill([_draw(drawn, numbers)])
        random = torch.linalg.qr(drawn.to(basis.dtype)).Q.T
        old = torch.where((basis[level] != 0).any(), basis[level], random)
        basis[level].copy_(torch.where(usable, new, old))


def _whole_sizes(geometry: Geometry) -> tuple[int, int]:
    sizes = (geometry.channels, geometry.contracted)
    return sizes if geometry.contracts == "cols" else (sizes[1], sizes[0])
