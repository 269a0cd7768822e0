"""The optimizers to use: each a `torch.optim.Optimizer` with one rule as its own and the others for the
asking.

A parameter group may name another `kind` ("adamw", "apollo", "smmf"), so one object trains a whole model:
matrices by APOLLO, norms by AdamW, embeddings by SMMF. `hardy.optim.make_optimizer` builds such groups from a
model.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from hardy.optim._rule import Rule
from hardy.optim._shell import RuleOptimizer
from hardy.optim.adaptive import AdamWRule
from hardy.optim.apollo import ApolloRule
from hardy.optim.int8_linear import VirtualWeight
from hardy.optim.smmf import SMMFRule

log = logging.getLogger(__name__)

RULES: Mapping[str, Rule] = {rule.kind: rule for rule in (AdamWRule(), ApolloRule(), SMMFRule())}
"""Kinds of parameter groups."""
MINI_SCALE = math.sqrt(128)
"""APOLLO-Mini's alpha, from the paper."""


class AdaptiveAdamW(RuleOptimizer):
    """AdamW with fp32 state for weights of any dtype, clipping and skipping without waiting for the device.

    The core of the adaptive recipe (arXiv 2412.04718, our reading; see `adaptive.py`); `GradGuard` gives the
    `grad_scale` and `found_inf` of `step`. State: 8 bytes per element.

    Args:
        params: `model.named_parameters()`, parameters, or groups.
        lr: learning rate, a number or a 0-d tensor.
        betas: decays of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay per unit of learning rate.
        shared: settings of groups of any kind: `bf16_update` ("stochastic", "kahan", "nearest": how bf16
        weights
            are written), `nonfinite` ("propagate" or "skip" parameters whose gradient is not finite; costs a
            read of the gradient), `backend` ("auto", "foreach", "native", "triton"), `seed`.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 4)
        >>> AdaptiveAdamW(layer.named_parameters(), lr=1e-3).param_groups[0]["param_names"]
        ['weight', 'bias']
    """

    rules: ClassVar[Mapping[str, Rule]] = RULES

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **shared: Any,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, kind="adamw", settings=settings | shared)


class APOLLO(RuleOptimizer):
    """APOLLO (arXiv 2412.05270): Adam's step length per channel from a sketch of rank `rank`; see
    `apollo.py`.

    State: 8 * rank bytes per channel (a channel is a row or column along the matrix' longer side).

    Args:
        params: matrices; `model.named_parameters()`, or groups, so that projections follow names.
        lr: learning rate; AdamW's times about sqrt(d / rank) / scale, d the shorter side.
        betas: decays of the sketch's moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay per unit of learning rate.
        rank: rows of the sketch; at most the shorter side is used.
        scale: the paper's alpha; "auto" is sqrt(d / rank), with which `lr` has AdamW's meaning.
        settings: `scale_type` ("channel" or "tensor"), `scale_squared` (alpha squared, as the released code
            wants it; instead of `scale`), `update_proj_gap` (200 calls per projection), `proj` ("normal",
            "rademacher", "svd"), `svd_method` ("gram", "exact"), `limiter` ("reference", "corrected", "off"),
            `limiter_gamma` (1.01), `zero_grad` ("skip": a zero gradient is no step; "decay"),
            `bias_correction`, `share_projection` (one projection per length), `side` ("auto", "shard_local":
            contract the axis that is not cut), `wide_state` ("shard", "replicate"), `stacked` (3-D parameters
            are stacks), and the shared ones of `AdaptiveAdamW`.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(16, 8, bias=False)
        >>> optimizer = APOLLO(layer.named_parameters(), lr=0.01, rank=4)
        >>> layer(torch.ones(1, 16)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[layer.weight]["exp_avg"].shape
        torch.Size([4, 16])
    """

    rules: ClassVar[Mapping[str, Rule]] = RULES

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        rank: int = 256,
        scale: float | Literal["auto"] | None = None,
        **settings: Any,
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank}
        super().__init__(params, kind="apollo", settings=own | _alpha(scale, settings, default=1.0))


class APOLLOMini(RuleOptimizer):
    """APOLLO-Mini: rank 1, one factor for a whole matrix; state is 8 bytes per channel.

    Args:
        params: as for `APOLLO`.
        lr: learning rate; the paper pre-trains with 1e-2.
        betas: decays of the sketch's moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay per unit of learning rate.
        scale: the paper's alpha, sqrt(128) unless given.
        settings: as for `APOLLO`, but `rank` and `scale_type`.

    Raises:
        ValueError: a rank other than 1, or another `scale_type`; those are `APOLLO`.
    """

    rules: ClassVar[Mapping[str, Rule]] = RULES

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        scale: float | Literal["auto"] | None = None,
        **settings: Any,
    ) -> None:
        mini = {"rank": 1, "scale_type": "tensor"}
        for setting, value in mini.items():
            if settings.get(setting, value) != value:
                raise ValueError(
                    f"APOLLOMini has {setting}={value!r}, got {settings[setting]!r}; for another use APOLLO"
                )
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **mini}
        super().__init__(params, kind="apollo", settings=own | _alpha(scale, settings, default=MINI_SCALE))


class QAPOLLO(RuleOptimizer):
    """Q-APOLLO: APOLLO for int8 weights, which it updates where they are stored (see `int8.py`).

    Takes int8 and plain parameters, in any groups; int8 ones must be in groups of kind "apollo". State is
    that of `APOLLO`. With `enable_release` a model needs a byte per weight and one gradient at a time.

    Args:
        params: of a model after `quantize_model`; otherwise as for `APOLLO`.
        lr: learning rate; as for `APOLLO`.
        betas: decays of the sketch's moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay per unit of learning rate.
        rank: rows of the sketch; 1 with `scale_type="tensor"` is Q-APOLLO-Mini.
        scale: the paper's alpha; None is 1, and sqrt(128) for Mini.
        settings: as for `APOLLO`; `bf16_update` also says how int8 weights are written: "stochastic" keeps
            the mean of updates, "nearest" loses those below half a quantization step, "kahan" is refused.

    Example:
        >>> import torch
        >>> from hardy.optim.int8 import quantize_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8, bias=False))
        >>> names = quantize_model(model)
        >>> optimizer = QAPOLLO(model.named_parameters(), lr=0.01, rank=1, scale_type="tensor")
        >>> model(torch.ones(1, 16)).sum().backward()
        >>> optimizer.step()
        >>> model[0].q.dtype, optimizer.state[model[0].weight]["exp_avg"].shape
        (torch.uint8, torch.Size([1, 16]))
    """

    rules: ClassVar[Mapping[str, Rule]] = RULES

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        rank: int = 256,
        scale: float | Literal["auto"] | None = None,
        **settings: Any,
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank}
        is_mini = rank == 1 and settings.get("scale_type") == "tensor"
        alpha = _alpha(scale, settings, default=MINI_SCALE if is_mini else 1.0)
        super().__init__(params, kind="apollo", settings=own | alpha)
        if not any(isinstance(x, VirtualWeight) for group in self.param_groups for x in group["params"]):
            log.warning(
                "QAPOLLO was given no int8 weight, so it saves no weight memory; call "
                "hardy.optim.int8.quantize_model(model) before, or use APOLLO"
            )


class SMMF(RuleOptimizer):
    """SMMF (arXiv 2412.08894): both moments in four vectors and one sign bit per weight; see `smmf.py`.

    State: 8 (height + width) bytes of factors, about 16 sqrt(N), and N / 8 bytes of signs.

    Args:
        params: tensors of any rank; `model.named_parameters()`, or groups.
        lr: learning rate; tune upward from AdamW's.
        beta1: momentum at the first step; None for no momentum and no signs.
        eps: added to the root of the second moment.
        weight_decay: decay per unit of learning rate.
        decay_rate: exponent of the second moment's schedule; -0.8 for Transformers, -0.5 for CNNs.
        growth_rate: what beta1 is multiplied with each step; 1 keeps momentum for ever.
        settings: `vector_reshape` (False keeps dense moments for vectors), `weight_decay_mode` ("adamw",
        "l2"),
            `beta1_floor`, `max_update` (largest |u|), `mask_zero_grad`, `shape_policy` ("auto", "exact",
            "virtual"), `pack` (False: a byte per sign), `per_slice` (a factorization per matrix of a 3-D
            stack), and the shared ones of `AdaptiveAdamW`.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(16, 8, bias=False)
        >>> optimizer = SMMF(layer.named_parameters(), lr=0.01)
        >>> layer(torch.ones(1, 16)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[layer.weight])
        ['col_m', 'col_v', 'row_m', 'row_v', 'sign', 'step']
    """

    rules: ClassVar[Mapping[str, Rule]] = RULES

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        beta1: float | None = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay_rate: float = -0.8,
        growth_rate: float = 0.999,
        **settings: Any,
    ) -> None:
        own = {"lr": lr, "beta1": beta1, "eps": eps, "weight_decay": weight_decay}
        own |= {"decay_rate": decay_rate, "growth_rate": growth_rate}
        super().__init__(params, kind="smmf", settings=own | settings)


def apollo_scale_from_released(scale: float) -> float:
    """Return the paper's alpha for the `scale` of the released code, which enters there as its square root.

    Example:
        >>> apollo_scale_from_released(128.0) == MINI_SCALE
        True
    """
    return math.sqrt(scale)


def _alpha(scale: float | str | None, settings: Mapping[str, Any], *, default: float) -> dict[str, Any]:
    """Return the settings with `scale`, from itself or from its square."""
    rest = dict(settings)
    squared = rest.pop("scale_squared", None)
    if squared is not None and scale is not None:
        raise ValueError(
            f"give scale={scale} or scale_squared={squared}, not both; scale is the root of the other"
        )
    if squared is not None:
        scale = apollo_scale_from_released(squared)
    return rest | {"scale": default if scale is None else scale}
