"""What a gradient is projected on: random numbers by counter, or its own leading directions.

Source: APOLLO (arXiv 2412.05270), section 3; counters as in `hardy.ops.philox`. Nothing random is stored:
element (a, k) of a projection is a function of (seed, parameter name, epoch, expert, k * rank + a), k counted
in the whole tensor, so every worker draws what it needs alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hardy.ops.lowrank import top_directions
from hardy.ops.philox import key_for
from hardy.optim._geometry import Geometry, is_stack
from hardy.optim._rule import Bundle, Member
from hardy.optim._sharded import copy_of_first, gather_whole, local_part


def bases_of(
    bundle: Bundle, member: Member, geometry: Geometry, grad: Tensor | None
) -> Callable[[int], Tensor]:
    """Return a function from the local matrix's place in the stack to its projection [K, rank]."""
    group = bundle.group
    low = grad is not None and grad.dtype == torch.bfloat16
    epoch, late = divmod(group["calls"], group["update_proj_gap"])
    offset = member.shard.offset[0] if is_stack(member.shard.shape, group) else 0
    if group["proj"] == "svd":
        if late == 0:
            _refresh_basis(bundle, member, geometry, epoch)
        begin, length = geometry.contracted_begin, geometry.local_contracted
        basis = member.local["basis"].view(geometry.stack, geometry.rank, geometry.contracted)
        part = basis[:, :, begin : begin + length].transpose(-1, -2).contiguous()
        return lambda level: _representable(part[level], low)
    return lambda level: _random_basis(bundle, member, geometry, epoch, offset + level, low)


def _representable(basis: Tensor, low: bool) -> Tensor:
    """Return values that a bf16 product can take as they are, for bf16 gradients, on every device."""
    return basis.to(torch.bfloat16).to(basis.dtype) if low else basis


def _random_basis(
    bundle: Bundle, member: Member, geometry: Geometry, epoch: int, expert: int, low: bool
) -> Tensor:
    """Return the random projection of one matrix; on a CPU, where drawing is slow, keep it for its epoch."""
    group, rank = bundle.group, geometry.rank
    key = member.projection_key
    if group["share_projection"]:
        key, expert = key_for(group["seed"], f"contracted {geometry.contracted}", purpose="hardy.proj.v1"), 0
    begin, length = geometry.contracted_begin, geometry.local_contracted
    where = (key, expert, begin, length, rank, group["proj"], low, bundle.dtype, bundle.device)
    kept_epoch, kept = bundle.projections.get(where, (None, None))
    if kept is not None and kept_epoch == epoch:
        return kept
    drawn = torch.empty(length, rank, dtype=torch.float32, device=bundle.device)
    draw = bundle.backend.fill_normals if group["proj"] == "normal" else bundle.backend.fill_signs
    draw(drawn, key, start=begin * rank, epoch=epoch, slice=expert)
    drawn = _representable(drawn.to(bundle.dtype), low)
    if bundle.device.type == "cpu" or group["share_projection"]:
        bundle.projections[where] = (epoch, drawn)
    return drawn


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
        bundle.backend.fill_normals(drawn, member.projection_key, start=0, epoch=epoch, slice=expert)
        random = torch.linalg.qr(drawn.to(basis.dtype)).Q.T
        old = torch.where((basis[level] != 0).any(), basis[level], random)
        basis[level].copy_(torch.where(usable, new, old))


def _whole_sizes(geometry: Geometry) -> tuple[int, int]:
    sizes = (geometry.channels, geometry.contracted)
    return sizes if geometry.contracts == "cols" else (sizes[1], sizes[0])
