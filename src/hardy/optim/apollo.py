"""APOLLO: Adam's step length from a random sketch of the gradient, the raw gradient's direction.

Paper: H. Zhu, Z. Zhang et al., "APOLLO: SGD-like Memory, AdamW-level Performance", 2024 (arXiv 2412.05270v4).
Letters: G gradient, P projection [r, d], R sketch, M, V its moments, d contracted (smaller) dimension, n
channels, s_j factor of channel j, alpha scale, gamma limiter, T = update_proj_gap, eta lr, lam weight_decay.

    R = G P^T / sqrt(r);  M, V = Adam's moments of R;  s_j = |M_j / (sqrt(V_j) + eps)| / |R_j|
    W_j = (1 - eta lam) W_j - eta bc alpha s_j G_j / L        bc = sqrt(1 - b2^t) / (1 - b1^t)

L keeps the norm of the step from growing by more than gamma. APOLLO-Mini has r = 1 and one s for the whole
matrix.

Differs from the released code: P is never stored, but a function of (seed, name, epoch, index); state is
fp32; a zero gradient is never remembered as a norm (the released limiter then freezes the matrix for 1,800
steps), and eps is 1e-12 instead of 1e-6, which shortened the steps of small gradients, so that the limiter
remembered these; sharded weights.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hardy.ops.lowrank import length_ratio, limit_growth, remember_norm
from hardy.ops.quantize import requantize_step
from hardy.ops.updates import Place, Rounding, ScaleTask
from hardy.optim._geometry import Geometry, geometry_of, is_stack
from hardy.optim._rule import Bundle, Group, Member, Rule, StateSpec, require
from hardy.optim._sharded import Gather, Round, Shard, Sum
from hardy.optim._sketches import held_bytes, matrices_of, sketch_and_update
from hardy.optim.adaptive import as_swept, check_betas
from hardy.optim.int8_linear import VirtualWeight

log = logging.getLogger(__name__)


class ApolloRule(Rule):
    """APOLLO with channel-wise or tensor-wise factors, random or singular directions."""

    kind = "apollo"
    defaults: ClassVar[Mapping[str, Any]] = {
        "betas": (0.9, 0.999),
        "eps": 1e-12,
        "rank": 256,
        "scale_type": "channel",
        "scale": 1.0,
        "update_proj_gap": 200,
        "proj": "normal",
        "svd_method": "gram",
        "limiter": "reference",
        "limiter_gamma": 1.01,
        "zero_grad": "skip",
        "bias_correction": True,
        "share_projection": False,
        "side": "auto",
        "wide_state": "shard",
        "stacked": True,
    }

    shaping_settings: ClassVar[tuple[str, ...]] = ("rank", "side", "wide_state", "stacked")

    def shaping(self, group: Group) -> dict[str, Any]:
        """Return what must not change once there is state; a basis is kept for singular directions only."""
        return super().shaping(group) | {"proj": group["proj"] == "svd"}

    def check(self, group: Group) -> None:
        """Refuse settings out of range."""
        check_betas(group)
        require(group["eps"] >= 0, group, "eps", "at least 0")
        require(
            isinstance(group["rank"], int) and group["rank"] >= 1, group, "rank", "a whole number, at least 1"
        )
        require(group["update_proj_gap"] >= 1, group, "update_proj_gap", "at least 1")
        require(group["limiter_gamma"] > 1, group, "limiter_gamma", "above 1")
        require(group["scale"] == "auto" or group["scale"] > 0, group, "scale", "above 0, or 'auto'")
        for setting, words in _CHOICES.items():
            require(group[setting] in words, group, setting, " or ".join(map(repr, words)))
        if group["rank"] < 8 and group["scale_type"] == "channel":
            _warn_once(f"rank={group['rank']} is too low to tell a channel's length; use scale_type='tensor'")

    def specs(self, shard: Shard, dtype: torch.dtype, group: Group, name: str) -> dict[str, StateSpec]:
        """Keep moments of the sketch, the norm of the last step and the key of the random projection."""
        if len(shard.shape) < 2 or 0 in shard.shape:
            raise ValueError(
                f"APOLLO needs matrices, and {name} has shape {shard.shape}; give it to a group with "
                f"kind='adamw', as hardy.optim.route_params does"
            )
        geometry = geometry_of(shard, group, name)
        if group["rank"] > geometry.contracted:
            text = (
                f"rank={group['rank']} exceeds a matrix' shorter side {geometry.contracted}, which is taken"
            )
            _warn_once(text, example=f"{text}; so for {name}")
        stack = shard.shape[:1] if is_stack(shard.shape, group) else ()
        row_dim, col_dim = (1, 2) if stack else (0, 1)
        tall = geometry.contracts == "cols"
        channel_dim, other_dim = (row_dim, col_dim) if tall else (col_dim, row_dim)
        state_dim = len(stack) if tall else len(stack) + 1
        dims = {channel_dim: state_dim} | ({0: 0} if stack else {})
        if geometry.scattered is not None:
            dims[other_dim] = state_dim
        sizes = (geometry.channels, geometry.rank) if tall else (geometry.rank, geometry.channels)
        moment = StateSpec(shape=(*stack, *sizes), dtype=dtype, dims=dims)
        count = StateSpec(shape=stack, dtype=torch.float32, dims={0: 0} if stack else {})
        specs = {"step": count, "exp_avg": moment, "exp_avg_sq": moment}
        specs["limiter_norm"] = StateSpec(shape=stack, dtype=dtype, dims=count.dims)
        specs["proj_key"] = StateSpec(shape=(), dtype=torch.int64)
        if group["proj"] == "svd":
            shape = (*stack, geometry.rank, geometry.contracted)
            specs["basis"] = StateSpec(shape=shape, dtype=dtype, dims=count.dims)
        return specs

    def alike(self, shard: Shard) -> tuple[Any, ...]:
        """Only equal shapes stand together, so that their small numbers are rows of one tensor."""
        return (shard.shape, shard.local_shape)

    def temporary_bytes(self, member: Member) -> int:
        """Hold numbers of channels; and where others have a part of a matrix, the sketch and what is sent."""
        return held_bytes(member, geometry_of(member.shard, member.group, member.name))

    def update(self, bundle: Bundle) -> Iterator[Round]:
        """Take one step: sketch, sum; moments and factors, sum; gather factors, scale the gradient."""
        group, geometry = bundle.group, geometry_of(bundle.members[0].shard, bundle.group, "")
        found = yield from sketch_and_update(bundle, geometry)
        squares, norm, active = found.squares, found.norm, found.active
        before, after = found.before, found.after
        bundle.moved = norm != 0
        step = bundle.stacked("step").view(active.shape)
        step = step + active.to(step.dtype)
        inverse_scale = bundle.inverse_scale()
        alpha = math.sqrt(geometry.contracted / geometry.rank) if group["scale"] == "auto" else group["scale"]
        if group["scale_type"] == "tensor":
            # Where eps is 0, a channel that never had a gradient is 0 / 0.
            totals = torch.stack([before.sum(-1), torch.where(after.isnan(), 0, after).sum(-1)])
            yield Round(sums=[Sum(totals, geometry.channel_splits)])
            ratio = length_ratio(totals[1], totals[0]).unsqueeze(-1)
            step_square = (ratio.squeeze(-1) * norm.sqrt()).square()
        else:
            ratio = length_ratio(after, before)
            # A channel of an inactive matrix may hold NaN; its ratio is 0.
            step_square = torch.where(ratio > 0, ratio * squares.sqrt(), 0).square().sum(-1)
            yield Round(sums=[Sum(step_square, geometry.channel_splits)])
        correction = _bias_correction(step, group, bundle.dtype)
        length = alpha * step_square.sqrt() * (correction if group["limiter"] == "corrected" else 1)
        memory = bundle.stacked("limiter_norm").view_as(length)
        limit = (
            torch.ones_like(length)
            if group["limiter"] == "off"
            else limit_growth(length, memory, gamma=group["limiter_gamma"])
        )
        rate = group["lr"] * alpha * inverse_scale
        scalar = torch.where(active > 0, rate * correction / limit, 0)
        factor = ratio * scalar.unsqueeze(-1)
        gather = _gather_of(factor, geometry, group)
        yield Round(gathers=[gather] if gather is not None else [])
        if gather is not None:
            factor = gather.result.view(*scalar.shape, -1)
        _scale(bundle, geometry, factor, active, step)
        shape = bundle.members[0].local["step"].shape
        bundle.write_back("step", step.view(-1, *shape))
        bundle.write_back("limiter_norm", remember_norm(length / limit, memory, active).view(-1, *shape))


_said: set[str] = set()


def _warn_once(text: str, *, example: str | None = None) -> None:
    """Log a warning, or its first example, once in a process."""
    if text not in _said:
        _said.add(text)
        log.warning(example or text)


_CHOICES = {
    "scale_type": ("channel", "tensor"),
    "proj": ("normal", "rademacher", "svd"),
    "svd_method": ("gram", "exact"),
    "limiter": ("reference", "corrected", "off"),
    "zero_grad": ("skip", "decay"),
    "side": ("auto", "shard_local"),
    "wide_state": ("shard", "replicate"),
}


def _bias_correction(step: Tensor, group: Group, dtype: torch.dtype) -> Tensor | float:
    """Return sqrt(1 - b2^t) / (1 - b1^t); taken in fp64, where 1 - b2 keeps its digits."""
    if not group["bias_correction"]:
        return 1.0
    beta1, beta2 = (as_swept(beta, dtype) for beta in group["betas"])
    count = step.double().clamp(min=1)
    return ((1 - beta2**count).sqrt() / (1 - beta1**count)).to(dtype)


def _gather_of(factor: Tensor, geometry: Geometry, group: Group) -> Gather | None:
    """Return the wish for all channels' factors, where channels were scattered for their state only."""
    if geometry.scattered is None or group["scale_type"] == "tensor":
        return None
    return Gather(factor.reshape(-1, factor.shape[-1]), geometry.channels, geometry.scattered)


def _scale(bundle: Bundle, geometry: Geometry, factor: Tensor, active: Tensor, step: Tensor) -> None:
    """Move the weights along the raw gradients."""
    group = bundle.group
    along = "all" if group["scale_type"] == "tensor" else "rows" if geometry.contracts == "cols" else "cols"
    keep = (1 - active * (group["lr"] * group["weight_decay"])).unsqueeze(-1)
    held = [(i, grad) for i, grad in enumerate(bundle.grads) if grad is not None and grad.numel() > 0]
    for index, grad in held:
        param = bundle.members[index].param
        if isinstance(param, VirtualWeight):
            rounding = _rounding(bundle, index, 0, geometry, step)
            factors, kept = factor[index, 0], keep[index, 0]
            requantize_step(param.matrix(), grad, factor=factors, along=along, keep=kept, rounding=rounding)

    def tasks() -> list[ScaleTask]:
        return [
            ScaleTask(
                param=matrices_of(bundle.params[index], geometry)[level],
                grad=matrices_of(grad, geometry)[level],
                factor=factor[index, level],
                along=along,
                keep=keep[index, level],
                rounding=_rounding(bundle, index, level, geometry, step),
            )
            for index, grad in held
            if not isinstance(bundle.members[index].param, VirtualWeight)
            for level in range(geometry.stack)
        ]

    bundle.sweep("scale", factor, keep, step, tasks=tasks)


def _rounding(bundle: Bundle, index: int, level: int, geometry: Geometry, step: Tensor) -> Rounding:
    shard = bundle.members[index].shard
    first = int(is_stack(shard.shape, bundle.group))
    stride = math.prod(shard.shape[first + 1 :])
    row, col = shard.offset[first], shard.offset[first + 1] * math.prod(shard.shape[first + 2 :])
    expert = (shard.offset[0] + level) if first else 0
    base = (expert * shard.shape[first] + row) * stride + col
    matrices = (geometry.stack, geometry.rows, geometry.cols)
    place = Place(base=base, stride=stride)
    return bundle.rounding(index, place, step[index, level], shape=matrices, level=level)
