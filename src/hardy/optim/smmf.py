"""SMMF: Adam-like moments kept as four short vectors and one sign bit per weight.

Paper: K. Park, S. Lee, "SMMF: Square-Matricized Momentum Factorization for Memory-Efficient Optimization",
AAAI 2025 (arXiv 2412.08894). Letters: g gradient, m, v moments (exist per element only, inside the sweep),
r_M, c_M, r_V, c_V their factors over the square-ish matrix of all elements, S signs of m, t step from 1, beta
= beta1, lambda = growth_rate, gamma = decay_rate, eta lr, lam weight_decay.

    m = beta lambda^(t-1) S r_M c_M + (1 - beta lambda^(t-1)) g,   v = (1 - t^gamma) r_V c_V + t^gamma g^2
    w = (1 - eta lam) w - eta m / (sqrt(v) + eps),   S = sign m;  factors of |m| and v: row sums, column
    shares

Differs from the released code: signs are really one bit; nothing drifts where the gradient is exactly zero
(`mask_zero_grad`); shapes without a near-square divisor use a virtual one; sharded weights; bf16 weights are
rounded stochastically.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hardy.ops.factorize import matrix_shape
from hardy.ops.updates import Place, SweepTask
from hardy.optim._rule import Bundle, Group, Member, Rule, StateSpec, largest_numel, require, table
from hardy.optim._sharded import Round, Shard, Sum
from hardy.optim.adaptive import (
    flat_place,
    flat_rows,
    gate,
    may_stand_still,
    moment_spec,
    square_norms,
    sweep_dense,
)


class SMMFRule(Rule):
    """Square-matricized momentum factorization of tensors of any rank."""

    kind = "smmf"
    defaults: ClassVar[Mapping[str, Any]] = {
        "beta1": 0.9,
        "eps": 1e-8,
        "decay_rate": -0.8,
        "growth_rate": 0.999,
        "vector_reshape": True,
        "weight_decay_mode": "adamw",
        "beta1_floor": 0.0,
        "max_update": None,
        "mask_zero_grad": True,
        "shape_policy": "auto",
        "pack": True,
        "per_slice": False,
    }

    shaping_settings: ClassVar[tuple[str, ...]] = ("vector_reshape", "shape_policy", "pack", "per_slice")

    def shaping(self, group: Group) -> dict[str, Any]:
        """Return what must not change once there is state; without momentum it is not kept."""
        return super().shaping(group) | {"beta1": group["beta1"] is None}

    def check(self, group: Group) -> None:
        """Refuse settings out of range."""
        beta1 = group["beta1"]
        require(beta1 is None or 0 <= beta1 <= 1, group, "beta1", "in [0, 1], or None for no momentum")
        require(group["eps"] >= 0, group, "eps", "at least 0")
        require(-1 <= group["decay_rate"] <= 0, group, "decay_rate", "in [-1, 0]")
        require(0 <= group["growth_rate"] <= 1, group, "growth_rate", "in [0, 1]")
        require(0 <= group["beta1_floor"] <= 1, group, "beta1_floor", "in [0, 1]")
        limit = group["max_update"]
        require(limit is None or limit > 0, group, "max_update", "above 0, or None")
        require(group["weight_decay_mode"] in ("adamw", "l2"), group, "weight_decay_mode", "'adamw' or 'l2'")
        policies = ("exact", "virtual", "auto")
        require(group["shape_policy"] in policies, group, "shape_policy", " or ".join(map(repr, policies)))

    def specs(self, shard: Shard, dtype: torch.dtype, group: Group, name: str) -> dict[str, StateSpec]:
        """Keep factors, the same on all workers, and signs, cut as the parameter is."""
        if 0 in shard.shape:
            raise ValueError(f"{name} of shape {shard.shape} has no elements; leave it out of the groups")
        specs = {"step": StateSpec(shape=(), dtype=torch.float32)}
        if _is_dense(shard.shape, group):
            moments = ("exp_avg_sq",) if group["beta1"] is None else ("exp_avg", "exp_avg_sq")
            if group["beta1"] is None:
                raise ValueError(f"{name}: beta1=None needs vector_reshape=True, or a group of kind 'adamw'")
            if group["max_update"] is not None:
                raise ValueError(
                    f"{name}: max_update={group['max_update']} needs vector_reshape=True, or "
                    f"max_update=None in a group of its own"
                )
            return specs | {key: moment_spec(shard, dtype) for key in moments}
        if any(split.dim > 1 for split in shard.splits):
            raise ValueError(
                f"{name} of shape {shard.shape} is cut along dimension {shard.splits[0].dim}; SMMF takes "
                f"parameters cut along dimensions 0 and 1"
            )
        stack, numel = _stack(shard.shape, group)
        height, width = matrix_shape(numel, policy=group["shape_policy"])
        dims = {0: 0} if stack else {}
        for moment in ("v",) if group["beta1"] is None else ("m", "v"):
            specs[f"row_{moment}"] = StateSpec(shape=(*stack, height), dtype=dtype, dims=dims)
            specs[f"col_{moment}"] = StateSpec(shape=(*stack, width), dtype=dtype, dims=dims)
        if group["beta1"] is not None:
            specs["sign"] = _sign_spec(shard, group, name)
        return specs

    def alike(self, shard: Shard) -> tuple[Any, ...]:
        """Only equal shapes stand together, so that their sums are rows of one tensor."""
        return (shard.shape, shard.local_shape)

    def temporary_bytes(self, member: Member) -> int:
        """Hold the sums of |m| and v."""
        vectors = [spec for key, spec in member.specs.items() if key.startswith(("row_", "col_"))]
        return 2 * 4 * sum(largest_numel(spec, member.shard) for spec in vectors)

    def update(self, bundle: Bundle) -> Iterator[Round]:
        """Take one step: one sweep, then one sum for the factors."""
        group, shard = bundle.group, bundle.members[0].shard
        step = bundle.stacked("step")
        active = bundle.allowed().expand(len(step))
        dense = _is_dense(shard.shape, group)
        # A sweep sums squares too, but of gradients with l2's share, and knows them only afterwards.
        ahead = may_stand_still(group["lr"]) and (dense or group["weight_decay_mode"] == "l2")
        if ahead or group["nonfinite"] == "skip":
            squares = square_norms(bundle)
            yield Round(sums=[Sum(squares, shard.splits)])
            active = active * gate(squares, group)
            bundle.moved = squares != 0
        else:
            yield Round()
        coefficients = _coefficients(bundle, active, step)
        if dense:
            _sweep_dense(bundle, coefficients, step)
            yield Round()
            commit = active * bundle.present()
        else:
            sums = _sweep(bundle, coefficients, step)
            totals = torch.stack([sums[..., -1].sum(-1), bundle.present()])
            shared = tuple(
                split for split in shard.splits if not (_stack(shard.shape, group)[0] and split.dim == 0)
            )
            yield Round(sums=[Sum(sums, shared), Sum(totals, shard.splits)])
            commit = active * gate(totals[0], group) * (totals[1] > 0)
            _commit_factors(bundle, sums, commit)
            if not ahead:
                bundle.moved = totals[0] != 0
        bundle.write_back("step", step + commit.to(step.dtype))
        yield Round()


def _is_dense(shape: tuple[int, ...], group: Group) -> bool:
    """Whether the moments of a vector are kept as they are."""
    return not group["vector_reshape"] and sum(size != 1 for size in shape) <= 1


def _stack(shape: tuple[int, ...], group: Group) -> tuple[tuple[int, ...], int]:
    """Return the shape of a stack of factorizations, () for one, and the elements that one covers."""
    if group["per_slice"] and len(shape) == 3:
        return shape[:1], shape[1] * shape[2]
    return (), math.prod(shape)


def _sign_spec(shard: Shard, group: Group, name: str) -> StateSpec:
    shape = shard.shape
    first, rest = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    per_byte = 8 if group["pack"] else 1
    spec = StateSpec(shape=(first, -(-rest // per_byte)), dtype=torch.uint8, dims={0: 0, 1: 1})
    for split in shard.splits_of(1):
        columns = -(-shape[1] // split.size) * math.prod(shape[2:])
        if columns != -(-spec.shape[1] // split.size) * per_byte:
            raise ValueError(
                f"{name} of shape {shape} is cut along dimension 1 into pieces of {columns} columns, which "
                f"do not fill the bytes of its packed signs; "
                + (
                    "set pack=False for this group, so that each sign has its own byte"
                    if group["pack"]
                    else "cut dim 0"
                )
            )
    return spec


def _schedules(group: Group, step: Tensor) -> tuple[Tensor, Tensor]:
    """Return beta1 and beta2 of the step about to be taken, in fp64."""
    before = step.double()
    if group["beta1"] is None:
        beta1 = torch.zeros_like(before)
    else:
        beta1 = group["beta1"] * group["growth_rate"] ** before
        if group["beta1_floor"] > 0:
            beta1 = beta1.clamp(min=group["beta1_floor"])
    return beta1, 1 - (before + 1) ** group["decay_rate"]


def _coefficients(bundle: Bundle, active: Tensor, step: Tensor) -> Tensor:
    group = bundle.group
    lr, decay = group["lr"], group["weight_decay"]
    beta1, beta2 = _schedules(group, step)
    decoupled = group["weight_decay_mode"] == "adamw"
    limit = math.inf if group["max_update"] is None else group["max_update"]
    columns: list[Tensor | float] = [
        active,
        beta1,
        beta2,
        lr,
        1 - lr * decay if decoupled else 1.0,
        0.0 if decoupled else decay,
        group["eps"],
        bundle.inverse_scale(),
        limit,
    ]
    return table(columns, like=active.to(bundle.dtype))


def _sweep(bundle: Bundle, coefficients: Tensor, step: Tensor) -> Tensor:
    """Update the weights and signs; return the sums [n, stack, height + width (twice), 1]."""
    group, member = bundle.group, bundle.members[0]
    shape, stack = member.shard.local_shape, 1
    stacked = bool(_stack(member.shard.shape, group)[0])
    rows, cols = flat_rows(member.shard)
    place = flat_place(member.shard)
    if stacked:
        stack, rows, cols = shape[0], 1, shape[1] * shape[2]
        width = member.shard.shape[2]
        place = Place(base=member.shard.offset[1] * width, stride=member.shard.shape[1] * width)
    keys = [key for key in ("row_m", "col_m", "row_v", "col_v") if key in member.local]
    length = sum(member.local[key].shape[-1] for key in keys) + 1
    sums = coefficients.new_zeros(len(bundle.members), stack, length)
    following = step + 1

    def task(index: int, grad: Tensor, level: int) -> SweepTask:
        local = bundle.members[index].local
        factors = {key: local[key].view(stack, -1)[level] for key in keys}
        sign = local.get("sign")
        sizes = (stack, rows, cols)
        return SweepTask(
            param=bundle.params[index].view(sizes)[level],
            grad=grad.view(sizes)[level],
            row_m=factors.get("row_m"),
            col_m=factors.get("col_m"),
            row_v=factors["row_v"],
            col_v=factors["col_v"],
            sign=None if sign is None else sign.view(stack, -1, sign.shape[-1])[level],
            packed=group["pack"],
            coefficients=coefficients[index],
            skip_zeros=group["mask_zero_grad"],
            place=place,
            sums=sums[index, level],
            rounding=bundle.rounding(index, place, following[index], shape=sizes, level=level),
        )

    def tasks() -> list[SweepTask]:
        return [
            task(index, grad, level)
            for index, grad in enumerate(bundle.grads)
            if grad is not None and grad.numel() > 0
            for level in range(stack)
        ]

    bundle.sweep("sweep", coefficients, sums, following, tasks=tasks)
    return sums


def _commit_factors(bundle: Bundle, sums: Tensor, commit: Tensor) -> None:
    """Replace the factors by the new sums, columns as shares of their total, where the step counts.

    The sums are used up.
    """
    members = bundle.members
    keys = [key for key in ("row_m", "col_m", "row_v", "col_v") if key in members[0].local]
    sizes = [members[0].local[key].shape[-1] for key in keys]
    new = sums[..., :-1]
    for key, part in zip(keys, new.split(sizes, dim=-1), strict=True):
        if key.startswith("col_"):
            total = part.sum(-1, keepdim=True)
            part.copy_(torch.where(total > 0, part / total, part))
    # All factors in one launch of each kind: on a GPU these small ones take longer to start than to run.
    old = torch.cat([member.local[key] for member in members for key in keys], dim=-1)
    old = old.view(new.shape[1], len(members), -1).transpose(0, 1)
    torch.where(commit.view(-1, 1, 1) > 0, new, old, out=old)
    held = [member.local[key] for key in keys for member in members]
    parts = [one.view(held[0].shape[:-1] + one.shape[-1:]) for x in old.split(sizes, -1) for one in x]
    torch._foreach_copy_(held, parts)  # pyright: ignore[reportPrivateImportUsage]


def _sweep_dense(bundle: Bundle, coefficients: Tensor, step: Tensor) -> None:
    """Update vectors whose moments are kept whole, by the same schedules."""
    group = bundle.group
    active = coefficients[:, 0]
    columns: list[Tensor | float] = [active, coefficients[:, 1], coefficients[:, 2], coefficients[:, 3], 1.0]
    columns += [group["eps"], coefficients[:, 4], coefficients[:, 5], coefficients[:, 7]]
    sweep_dense(bundle, table(columns, like=active.to(bundle.dtype)), step + 1)
