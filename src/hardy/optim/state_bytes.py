"""Bytes of optimizer state of one parameter, by formula: exact, without tensors and free of torch.

Letters, as in the specification: N elements of the parameter, d0 its first dimension; of a matrix n = max and
d = min of its two dimensions, r rank; height x width the square-ish matrix of SMMF. State is fp32 whatever
the weights are (fp64 for fp64 weights); but `sgd`, `muon` and `adafactor` are torch's and keep it in the
weights' dtype.

    adamw     8 N + 4 (step)
    apollo    8 n r + 4 (step) + 4 (limiter_norm) + 8 (proj_key); proj="svd" adds the basis, 4 r d
    smmf      8 (height + width) + d0 ceil((N / d0) / 8) + 4; without momentum 4 (height + width) + 4
    sgd       0, with momentum one value per weight
    muon      one value per weight
    adafactor rows and columns of each matrix of the last two dimensions, N for vectors; + 4 (step)

`bf16_update="kahan"` adds 2 N to the first three, for bf16 weights. With `shards` the result is what the
fullest worker holds: dim 0 is cut into chunks of ceil(d0 / shards) rows, as FSDP2 cuts it; small state is
held by all.
"""

from collections.abc import Callable, Mapping
from math import ceil, prod
from typing import Any

from hardy.config import ConfigError
from hardy.ops.matrix_shape import matrix_shape
from hardy.optim.presets import QUANTIZED_GROUP, check_kind

Shape = tuple[int, ...]
Settings = Mapping[str, Any]
NO_SETTINGS: Settings = {}

BF16 = 2
FP32 = 4
FP64 = 8
STEP = 4
PROJ_KEY = 8


def state_bytes(
    kind: str, shape: Shape, *, settings: Settings = NO_SETTINGS, shards: int = 1, weight_bytes: int = FP32
) -> int:
    """Return the bytes of state that a rule keeps for one parameter.

    Args:
        kind: a rule of `hardy.optim.presets.KINDS`.
        shape: of the whole parameter.
        settings: of its group; what is left out has the rule's default. `stacked=False` makes one matrix of a
            tensor of three dimensions, which APOLLO otherwise takes as a stack of experts.
        shards: workers that share the parameter; the result is for the one that holds most.
        weight_bytes: of one weight.

    Raises:
        ConfigError: no such rule, or the rule cannot take a tensor of this shape.

    Example:
        >>> state_bytes("adamw", (4, 3)), state_bytes("apollo", (4, 3), settings={"rank": 1})
        (100, 48)
    """
    check_kind(kind)
    size = FORMULAS[kind](shape, settings, shards, weight_bytes)
    kahan = (
        settings.get("bf16_update") == "kahan"
        and kind in ("adamw", "apollo", "smmf")
        and weight_bytes == BF16
    )
    return size + (BF16 * local_elements(shape, shards=shards) if kahan else 0)


def local_elements(shape: Shape, *, shards: int) -> int:
    """Return the elements of a parameter that the fullest of `shards` workers holds.

    Example:
        >>> local_elements((5, 3), shards=2)
        9
    """
    return prod((_rows(shape, shards), *shape[1:]))


def quantized_bytes(shape: Shape, *, shards: int = 1, group: int = QUANTIZED_GROUP) -> int:
    """Return the bytes of a matrix in int8: a byte per weight, fp32 scale and uint8 zero point per group.

    A group is `group` columns of one row, the last may be shorter (APOLLO's specification, Q-APOLLO).

    Example:
        >>> quantized_bytes((2, 130))
        280
    """
    rows, columns = _rows(shape, shards), prod(shape[1:])
    return rows * (columns + 5 * ceil(columns / group))


def _rows(shape: Shape, shards: int) -> int:
    return ceil(shape[0] / shards) if shape else 1


def _value(weight_bytes: int) -> int:
    """Return the bytes of one value of state of our own rules."""
    return FP64 if weight_bytes == FP64 else FP32


def _adamw(shape: Shape, settings: Settings, shards: int, weight_bytes: int) -> int:
    return 2 * _value(weight_bytes) * local_elements(shape, shards=shards) + STEP


def _apollo(shape: Shape, settings: Settings, shards: int, weight_bytes: int) -> int:
    if len(shape) < 2 or 0 in shape:
        raise ConfigError(
            f"kind 'apollo' takes matrices, got a parameter of shape {shape}; give it to kind 'adamw'"
        )
    value = _value(weight_bytes)
    stack = shape[0] if len(shape) == 3 and settings.get("stacked", True) else 0
    rows, columns = shape[1:] if stack else (shape[0], prod(shape[1:]))
    cut = shards > 1 and not stack
    tall = rows >= columns or (cut and settings.get("side") == "shard_local")
    channels, contracted = (rows, columns) if tall else (columns, rows)
    rank = min(settings.get("rank", 256), contracted)
    count = ceil(stack / shards) if stack else 1
    # A tall matrix has its channels where its rows are. Of a wide one the sketches are summed and scattered,
    # so that its channels are shared out too, although it is the contracted rows that are cut.
    if cut and (tall or settings.get("wide_state") != "replicate"):
        channels = ceil(channels / shards)
    basis = rank * contracted if settings.get("proj") == "svd" else 0
    return count * (value * (2 * channels * rank + basis + 1) + STEP) + PROJ_KEY


def _smmf(shape: Shape, settings: Settings, shards: int, weight_bytes: int) -> int:
    moments = 1 if settings.get("beta1", 0.9) is None else 2
    value, elements = _value(weight_bytes), prod(shape)
    if not settings.get("vector_reshape", True) and sum(size != 1 for size in shape) <= 1:
        return moments * value * local_elements(shape, shards=shards) + STEP
    stack = shape[0] if settings.get("per_slice", False) and len(shape) == 3 else 1
    sides = sum(matrix_shape(elements // stack, policy=settings.get("shape_policy", "auto")))
    held = ceil(stack / shards) if stack > 1 else 1
    size = moments * value * held * sides + STEP
    if moments == 1:
        return size
    row = elements // shape[0] if shape else 1
    return size + _rows(shape, shards) * (ceil(row / 8) if settings.get("pack", True) else row)


def _sgd(shape: Shape, settings: Settings, shards: int, weight_bytes: int) -> int:
    return weight_bytes * local_elements(shape, shards=shards) if settings.get("momentum", 0.0) else 0


def _adafactor(shape: Shape, settings: Settings, shards: int, weight_bytes: int) -> int:
    if len(shape) < 2:
        return weight_bytes * local_elements(shape, shards=shards) + STEP
    *outer, rows, columns = shape
    local = (ceil(shape[0] / shards), *shape[1:])
    by_row = prod(local[:-1])
    by_column = prod(local[:-2]) * columns if outer else columns
    return weight_bytes * (by_row + by_column) + STEP


def _muon(shape: Shape, settings: Settings, shards: int, weight_bytes: int) -> int:
    if len(shape) != 2:
        raise ConfigError(
            f"kind 'muon' takes matrices, got a parameter of shape {shape}; give it to kind 'adamw'"
        )
    return weight_bytes * local_elements(shape, shards=shards)


FORMULAS: dict[str, Callable[[Shape, Settings, int, int], int]] = {
    "adamw": _adamw,
    "apollo": _apollo,
    "smmf": _smmf,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "muon": _muon,
}
"""Bytes of (shape, settings, shards, weight_bytes) by rule."""
