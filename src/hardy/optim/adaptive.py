"""AdamW as one kind of group, with state in fp32 whatever the weights are.

Paper: Chen et al., "Adaptive Optimization for Enhanced Efficiency in Large-Scale Language Model Training",
2024 (arXiv 2412.04718), takes Adam as its core; I. Loshchilov, F. Hutter, "Decoupled Weight Decay
Regularization", 2019. Letters: g gradient, m, v moments, w weight, eta = lr, lam = weight_decay, b1, b2 =
betas.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    w = (1 - eta lam) w - eta (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

The paper's controllers are parts of their own: `guard.py` (clipping and skipping), `perf_decay.py` (learning
rate).
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hardy.ops.updates import AdamTask, Place
from hardy.optim._rule import Bundle, Group, Member, Rule, StateSpec, require, table
from hardy.optim._sharded import Round, Shard, Sum


class AdamWRule(Rule):
    """Adam with decoupled weight decay."""

    kind = "adamw"
    defaults: ClassVar[Mapping[str, Any]] = {"betas": (0.9, 0.999), "eps": 1e-8}

    def check(self, group: Group) -> None:
        """Refuse moments that do not decay and a denominator that may be zero."""
        check_betas(group)
        require(group["eps"] > 0, group, "eps", "above 0")

    def specs(self, shard: Shard, dtype: torch.dtype, group: Group, name: str) -> dict[str, StateSpec]:
        """Keep the step count and both moments."""
        return {"step": StateSpec(shape=(), dtype=torch.float32)} | {
            key: moment_spec(shard, dtype) for key in ("exp_avg", "exp_avg_sq")
        }

    def alike(self, shard: Shard) -> tuple[Any, ...]:
        """Any shapes may stand together."""
        return ()

    def temporary_bytes(self, member: Member) -> int:
        """Hold nothing between rounds."""
        return 0

    def update(self, bundle: Bundle) -> Iterator[Round]:
        """Take one step; only a step that may be empty needs a word with the other workers."""
        lr, group = bundle.group["lr"], bundle.group
        step = bundle.stacked("step")
        active = bundle.allowed().expand(len(step))
        if may_stand_still(lr) or group["nonfinite"] == "skip":
            squares = square_norms(bundle)
            yield Round(sums=[Sum(squares, bundle.members[0].shard.splits)])
            bundle.moved = squares != 0
            active = active * gate(squares, group)
        else:
            yield Round()
        counted = (step + active).double().clamp(min=1)
        beta1, beta2 = (as_swept(beta, bundle.dtype) for beta in group["betas"])
        columns: list[Tensor | float] = [
            active,
            beta1,
            beta2,
            lr / (1 - beta1**counted),
            1 / (1 - beta2**counted).sqrt(),
            group["eps"],
            1 - lr * group["weight_decay"],
            0.0,
            bundle.inverse_scale(),
        ]
        coefficients = table(columns, like=active.to(bundle.dtype))
        step = step + active * bundle.present()
        sweep_dense(bundle, coefficients, step)
        bundle.write_back("step", step)
        yield Round()
        yield Round()


def sweep_dense(bundle: Bundle, coefficients: Tensor, step: Tensor) -> None:
    """Update parameters with moments of their own shape.

    Args:
        bundle: the parameters.
        coefficients: [n, 9], those of `AdamTask`.
        step: [n], counts of steps, this one included.
    """

    def tasks() -> list[AdamTask]:
        return [
            _dense_task(bundle, index, grad, coefficients[index], step[index])
            for index, grad in enumerate(bundle.grads)
            if grad is not None and grad.numel() > 0
        ]

    bundle.sweep("adam", coefficients, step, tasks=tasks)


def _dense_task(bundle: Bundle, index: int, grad: Tensor, coefficients: Tensor, step: Tensor) -> AdamTask:
    member, rows = bundle.members[index], flat_rows(bundle.members[index].shard)
    return AdamTask(
        param=bundle.params[index].view(rows),
        grad=grad.view(rows),
        exp_avg=member.local["exp_avg"].view(rows),
        exp_avg_sq=member.local["exp_avg_sq"].view(rows),
        coefficients=coefficients,
        rounding=bundle.rounding(index, flat_place(member.shard), step, shape=(1, *rows)),
    )


def moment_spec(shard: Shard, dtype: torch.dtype) -> StateSpec:
    """Return state of the parameter's own shape."""
    return StateSpec(shape=shard.shape, dtype=dtype, dims={dim: dim for dim in range(len(shard.shape))})


def may_stand_still(lr: Any) -> bool:
    """Whether the host cannot rule out that the learning rate is 0."""
    return isinstance(lr, Tensor) or lr == 0


def gate(squares: Tensor, group: Group) -> Tensor:
    """Return 1 where a step is to be taken: not for zero gradients at rate 0, nor for NaN if so wished."""
    lr = group["lr"]
    moves = (squares != 0) | (
        torch.as_tensor(lr, device=squares.device) != 0 if isinstance(lr, Tensor) else lr != 0
    )
    if group["nonfinite"] == "skip":
        moves = moves & squares.isfinite()
    return moves.to(squares.dtype)


def square_norms(bundle: Bundle) -> Tensor:
    """Return [n]: the sum of squares of each local gradient; 0 where there is none."""
    result = torch.zeros(len(bundle.grads), dtype=bundle.dtype, device=bundle.device)
    held = [(index, grad) for index, grad in enumerate(bundle.grads) if grad is not None]
    for (index, _), norm in zip(held, norms([grad for _, grad in held], bundle.dtype), strict=True):
        result[index] = norm.square()
    return result


def norms(grads: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the L2 norm of each tensor, added up in `dtype`."""
    return [torch.linalg.vector_norm(grad, dtype=dtype) for grad in grads]


def as_swept(beta: float, dtype: torch.dtype) -> float:
    """Return a decay as the sweeps know it: fp32's 1 - 0.999 is off by 1.3e-5, so 1 - 0.999^t must be too."""
    return beta if dtype == torch.float64 else struct.unpack("f", struct.pack("f", beta))[0]


def check_betas(group: Group) -> None:
    """Refuse decays outside [0, 1)."""
    betas = group["betas"]
    require(len(betas) == 2 and all(0 <= beta < 1 for beta in betas), group, "betas", "two numbers in [0, 1)")


def flat_rows(shard: Shard) -> tuple[int, int]:
    """Return the local part as [rows of dimension 0, the rest]; a scalar is [1, 1].

    Parts cut along a dimension beyond the second have no such view.
    """
    local = shard.local_shape
    if not local:
        return 1, 1
    rest = 1
    for size in local[1:]:
        rest *= size
    return local[0], rest


def flat_place(shard: Shard) -> Place:
    """Return where `flat_rows` lies in the whole."""
    if not shard.shape:
        return Place(base=0, stride=1)
    stride = 1
    for size in shard.shape[1:]:
        stride *= size
    inner = 1
    for size in shard.shape[2:]:
        inner *= size
    column = shard.offset[1] * inner if len(shard.shape) > 1 else 0
    return Place(base=shard.offset[0] * stride + column, stride=stride)
