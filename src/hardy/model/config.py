"""Settings of the model. Free of torch, so that a run can be checked before anything heavy is imported."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hardy.config import Config, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class ShapeConfig(Config):
    """Sizes of the decoder; `none` takes the value of the preset that `model.name` names."""

    section: ClassVar[str] = "model.shape"
    hidden_size: PositiveInt | None = None
    """Width of the residual stream."""
    intermediate_size: PositiveInt | None = None
    """Inner width of the feed-forward block (SwiGLU)."""
    num_layers: PositiveInt | None = None
    """Decoder blocks."""
    num_heads: PositiveInt | None = None
    """Query heads."""
    num_kv_heads: PositiveInt | None = None
    """Key and value heads; fewer than `num_heads` is grouped-query attention."""
    head_size: PositiveInt | None = None
    """Width of one head; the preset's is hidden_size / num_heads."""
    rope_theta: PositiveFloat | None = None
    """Base of the rotary position frequencies."""
    norm_eps: PositiveFloat | None = None
    """Epsilon inside RMSNorm."""
    tied: bool | None = None
    """Whether the output head shares the embedding's weight."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """Which model is trained."""

    section: ClassVar[str] = "model"
    name: str = "1m"
    """A preset (1m, 3m, 10m, 60m, ..., 13b), or hf:PATH for a local Hugging Face causal language model."""
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    """Single sizes that differ from the preset."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding; none takes the tokenizer's size, rounded up to a multiple of 64."""
    context_tokens: PositiveInt | None = None
    """Longest document piece the model may attend over; none takes the preset's."""
    attention: Literal["auto", "reference", "dense", "varlen", "flex"] = "auto"
    """Back end of packed attention; auto probes for the fastest that is right on this device."""
    recompute: Literal["nothing", "blocks"] = "nothing"
    """What the backward pass computes again instead of keeping (activation checkpointing)."""
    compile: bool = False
    """Whether each block goes through torch.compile."""
