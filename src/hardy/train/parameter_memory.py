"""What one worker holds for a model's parameters: weights, gradients, optimizer state. Free of torch.

Exact, from the formulas of `optim/state_bytes.py`; what an optimizer holds during its step is an estimate.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any, Literal

from hardy.config import ConfigError
from hardy.model.presets import DecoderShape
from hardy.optim.presets import MATRIX_ROLES, QUANTIZED_GROUP, Preset, kind_for, preset
from hardy.optim.state_bytes import local_elements, quantized_bytes, state_bytes
from hardy.train.step_memory import Precision

REQUANTIZE_BYTES = 26
"""Temporaries for each int8 weight of a tile that is written anew (`ops/quantize.py`)."""
REQUANTIZE_TILE = {"cpu": 1 << 16, "cuda": 1 << 19}
TEMPORARY_BYTES = 64 << 20
"""Most that a step of our own optimizers holds at once (design note 002)."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One trained parameter."""

    name: str
    shape: tuple[int, ...]
    role: str
    """As `hardy.optim.roles` has it."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An optimizer, how its settings differ from its preset's, and how weights and workers are laid out."""

    optimizer: str
    """A name of `hardy.optim.presets.PRESETS`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    embed_kind: str | None = None
    """Rule of embeddings and head; None is the preset's."""
    precision: Precision = "fp32"
    replicas: int = 1
    shards: int = 1
    release: bool | None = None
    """Gradients applied and let go one by one; None is as the preset says."""
    device: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self) -> None:
        """Refuse what the optimizer cannot do."""
        chosen = preset(self.optimizer)
        if chosen.int8_weights and self.shards > 1:
            raise ConfigError(
                f"{self.optimizer} keeps matrices in int8, which FSDP2 cannot share "
                f"(strategy.mesh.shards={self.shards}); set strategy.mesh.shards to 1, or take apollo_mini"
            )

    @property
    def int8(self) -> bool:
        """Whether matrices are int8; the other weights are then bf16."""
        return preset(self.optimizer).int8_weights

    @property
    def weights_in(self) -> Precision:
        """The precision, which int8 matrices decide."""
        return "bf16_pure" if self.int8 else self.precision

    @property
    def buckets(self) -> bool:
        """Whether DDP holds the gradients."""
        return self.shards == 1 and self.replicas > 1

    @property
    def releases(self) -> bool:
        """Whether gradients are released; DDP averages them too late for that."""
        wanted = preset(self.optimizer).release if self.release is None else self.release
        return wanted and not self.buckets


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that one worker holds for parameters; of uneven shards the largest."""

    weights: int
    gradients: int
    """All of them, or with release the largest that exists at once."""
    state: int
    beside: int = 0
    """What the optimizer keeps beside its state: on a CPU the random projections of APOLLO."""
    temporaries: int = 0
    """Of the optimizer's step."""


def decoder_weights(shape: DecoderShape) -> list[Weight]:
    """Return the parameters of a decoder, named and ordered as the model has them.

    Example:
        >>> from hardy.model.presets import PRESETS
        >>> sum(prod(weight.shape) for weight in decoder_weights(PRESETS["7b"]))
        6738415616
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    block: dict[str, tuple[tuple[int, ...], str]] = {
        "attention_norm": ((hidden,), "vector"),
        "attention.query": ((queries, hidden), "matrix"),
        "attention.key": ((keys, hidden), "matrix"),
        "attention.value": ((keys, hidden), "matrix"),
        "attention.output": ((hidden, queries), "matrix"),
        "feed_forward_norm": ((hidden,), "vector"),
        "feed_forward.gate": ((inner, hidden), "matrix"),
        "feed_forward.up": ((inner, hidden), "matrix"),
        "feed_forward.down": ((hidden, inner), "matrix"),
    }
    table = (shape.vocab_size, hidden)
    named = [("embedding", table, "embedding")]
    named += [(f"blocks.{i}.{name}", *what) for i in range(shape.num_layers) for name, what in block.items()]
    named += [("norm", (hidden,), "vector")] + ([] if shape.tied else [("head", table, "embedding")])
    return [Weight(name=f"{name}.weight", shape=size, role=role) for name, size, role in named]


def routed_weights(groups: Iterable[Mapping[str, Any]]) -> list[Weight]:
    """Return the parameters of any model, from groups of `route_params`, whose roles they keep."""
    return [
        Weight(name=name, shape=tuple(parameter.shape), role=group["role"])
        for group in groups
        for name, parameter in group["params"]
    ]


def held_for(weights: Iterable[Weight], choice: Choice) -> Held:
    """Return what one worker holds for these parameters, of uneven shards the largest."""
    weights = list(weights)
    each = [_held_for_one(weight, choice, preset(choice.optimizer)) for weight in weights]
    gradients = [held.gradients for held in each]
    # With shards, sketches wait for the others' parts, all that fit together. Without, those of one shape are
    # made and used at once, as many as fit; released, one.
    together: dict[tuple[int, ...], list[int]] = {}
    for weight, held in zip(weights, each, strict=True):
        together.setdefault(weight.shape if choice.shards == 1 else (), []).append(held.sketches)
    at_a_time = max if choice.releases and choice.shards == 1 else sum
    sketches = max(map(at_a_time, together.values()))
    temporaries = [held.temporaries for held in each]
    # On a GPU torch's SGD works on the gradients of all parameters at once.
    at_once = sum if choice.device == "cuda" and preset(choice.optimizer).kind == "sgd" else max
    return Held(
        weights=sum(held.weights for held in each),
        gradients=max(gradients) if choice.releases else sum(gradients),
        state=sum(held.state for held in each),
        beside=sum(held.beside for held in each),
        temporaries=min(sketches, TEMPORARY_BYTES) + at_once(temporaries),
    )


@dataclass(frozen=True, kw_only=True)
class _HeldForOne:
    """What one parameter takes; its sketch may stand beside those of others, its temporaries do not."""

    weights: int
    gradients: int
    state: int
    beside: int
    sketches: int
    temporaries: int


def _held_for_one(weight: Weight, choice: Choice, chosen: Preset) -> _HeldForOne:
    elements = local_elements(weight.shape, shards=choice.shards)
    value = 2 if choice.weights_in == "bf16_pure" else 4
    embed_kind = choice.embed_kind or chosen.embed_kind
    kind = kind_for(weight.role, kind=chosen.kind, embed_kind=embed_kind)
    # As make_optimizer does it: the preset's settings are made for its own rule, given ones are for all.
    settings = {**(chosen.settings if kind == chosen.kind else {}), **choice.settings}
    is_int8 = choice.int8 and weight.role in MATRIX_ROLES
    projection, sketch = _sketch_bytes(kind, weight.shape, settings, shards=choice.shards)
    # On a CPU, where drawing is slow, random projections stay from step to step.
    beside = projection if choice.device == "cpu" and settings.get("proj") != "svd" else 0
    return _HeldForOne(
        weights=quantized_bytes(weight.shape, group=settings.get("group_columns", QUANTIZED_GROUP))
        if is_int8
        else elements * value,
        gradients=elements * value,
        state=state_bytes(kind, weight.shape, settings=settings, shards=choice.shards, weight_bytes=value),
        beside=beside,
        sketches=sketch + projection - beside,
        temporaries=REQUANTIZE_BYTES * min(elements, REQUANTIZE_TILE[choice.device])
        if is_int8
        else _temporary_bytes(kind, weight.shape, settings, elements * value),
    )


def _sketch_bytes(
    kind: str, shape: tuple[int, ...], settings: Mapping[str, Any], *, shards: int
) -> tuple[int, int]:
    """Return the bytes of what APOLLO projects a gradient on, and of its sketch with channels' squares."""
    if kind != "apollo":
        return 0, 0
    count = shape[0] if len(shape) == 3 else 1
    rows, columns = shape[-2:] if count > 1 else (shape[0], prod(shape[1:]))
    rank = min(settings.get("rank", 256), rows, columns)
    channels = max(rows, columns)
    # A worker sketches its own rows of a tall matrix; of a wide one all columns, and sends a copy.
    local, copies = (ceil(rows / shards), 1) if rows >= columns else (channels, 1 if shards == 1 else 2)
    return 4 * count * rank * min(rows, columns), copies * 4 * count * (rank + 1) * local


def _temporary_bytes(kind: str, shape: tuple[int, ...], settings: Mapping[str, Any], size: int) -> int:
    """Return what an optimizer holds while it updates a parameter of `size` bytes here, beside sketches.

    Measured on a CPU with torch 2.13: torch's own optimizers, and the steps in which APOLLO-SVD looks for new
    directions.
    """
    if kind == "apollo" and settings.get("proj") == "svd":
        contracted = min(shape[-2:]) if len(shape) == 3 else min(shape[0], prod(shape[1:]))
        return 8 * prod(shape) + 8 * contracted**2
    if kind == "sgd":
        return size if settings.get("weight_decay") and len(shape) > 1 else 0
    if kind == "adafactor":
        return 2 * size
    if kind == "muon":  # the orthogonalisation runs in bf16
        return size + 4 * prod(shape) + 4 * min(shape) ** 2
    return 0
