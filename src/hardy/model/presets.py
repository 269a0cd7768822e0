"""Named sizes of the decoder, and what settings make of them. Free of torch.

60m to 7b are the Llama shapes of GaLore's and APOLLO's experiments (vocabulary 32000, untied); 13b is Llama
2's, 3b is ours. The small ones are for laptops and tests: the embedding is tied and counted at 4096 rows.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from hardy.config import ConfigError, unknown_name
from hardy.model.config import ModelConfig

VOCAB_MULTIPLE = 64
HF_PREFIX = "hf:"


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """Every size of a decoder."""

    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Inner width of the feed-forward block."""
    num_layers: int
    """Decoder blocks."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads."""
    head_size: int
    """Width of one head, even."""
    context_tokens: int
    """Longest document the model may attend over."""
    rope_theta: float
    """Base of the rotary position frequencies."""
    norm_eps: float
    """Epsilon inside RMSNorm."""
    tied: bool
    """Whether the output head shares the embedding's weight."""


def _shape(hidden_size: int, intermediate_size: int, num_heads: int, num_layers: int) -> DecoderShape:
    """Return an untied preset with all heads alike."""
    return DecoderShape(
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=hidden_size // num_heads,
        context_tokens=4096 if hidden_size > 2048 else 2048,
        rope_theta=10000.0,
        norm_eps=1e-6,
        tied=False,
    )


PRESETS: dict[str, DecoderShape] = {
    "1m": replace(_shape(128, 320, 4, 5), vocab_size=512, tied=True, norm_eps=1e-5),
    "3m": replace(_shape(192, 512, 6, 5), vocab_size=4096, tied=True, norm_eps=1e-5),
    "10m": replace(_shape(320, 864, 5, 7), vocab_size=4096, tied=True, norm_eps=1e-5),
    "30m": replace(_shape(512, 1376, 8, 9), vocab_size=4096, tied=True, norm_eps=1e-5),
    "60m": _shape(512, 1376, 8, 8),
    "130m": _shape(768, 2048, 12, 12),
    "350m": _shape(1024, 2736, 16, 24),
    "1b": _shape(2048, 5461, 32, 24),
    "3b": _shape(3072, 8192, 24, 24),
    "7b": _shape(4096, 11008, 32, 32),
    "13b": _shape(5120, 13824, 40, 40),
}


def resolve_shape(config: ModelConfig, *, vocab_size: int) -> DecoderShape:
    """Return the preset of `config.name` with the single sizes of `config.shape` laid over it.

    Args:
        config: the model's settings; `name` is a preset.
        vocab_size: the tokenizer's; the embedding gets `config.vocab_size` rows, or as many as the tokenizer
            needs, rounded up to a multiple of 64.

    Raises:
        ConfigError: no such preset, sizes that do not divide, or a vocabulary that does not fit the model.

    Example:
        >>> resolve_shape(ModelConfig(name="1m"), vocab_size=258).vocab_size
        320
    """
    if config.name not in PRESETS:
        raise ConfigError(f"model.name: {unknown_name(config.name, 'preset', PRESETS)}, or {HF_PREFIX}PATH")
    preset, given = PRESETS[config.name], config.shape
    num_heads = given.num_heads or preset.num_heads
    hidden_size = given.hidden_size or preset.hidden_size
    shape = DecoderShape(
        vocab_size=_vocab_rows(config, vocab_size=vocab_size),
        hidden_size=hidden_size,
        intermediate_size=given.intermediate_size or preset.intermediate_size,
        num_layers=given.num_layers or preset.num_layers,
        num_heads=num_heads,
        # The presets give every query head its own keys; a changed number of heads keeps that.
        num_kv_heads=given.num_kv_heads or num_heads,
        head_size=given.head_size or _head_size(config.name, hidden_size, num_heads),
        context_tokens=config.context_tokens or preset.context_tokens,
        rope_theta=given.rope_theta or preset.rope_theta,
        norm_eps=given.norm_eps or preset.norm_eps,
        tied=preset.tied if given.tied is None else given.tied,
    )
    _check_heads(shape)
    return shape


def check_folder(name: str) -> None:
    """Refuse a `model.name` of hf:PATH where no model lies; no more is read.

    Raises:
        ConfigError: with the file that is missing.
    """
    file = Path(name.removeprefix(HF_PREFIX)) / "config.json"
    if name.startswith(HF_PREFIX) and not file.is_file():
        raise ConfigError(f"model.name={name}: there is no {file}; give a local model folder")


def check_context(context_tokens: int | None, *, document_tokens: int) -> None:
    """Refuse documents longer than the model may attend over; None is no limit.

    Raises:
        ConfigError: `document_tokens` is above `context_tokens`.
    """
    if context_tokens is not None and document_tokens > context_tokens:
        raise ConfigError(
            f"data.document_tokens={document_tokens} is longer than model.context_tokens="
            f"{context_tokens}; lower data.document_tokens (none means data.pack_tokens) or raise "
            f"model.context_tokens"
        )


def count_parameters(shape: DecoderShape) -> int:
    """Return the number of trainable values of a decoder; a tied head counts once.

    Example:
        >>> count_parameters(PRESETS["7b"])
        6738415616
    """
    embedding = shape.vocab_size * shape.hidden_size
    attention = 2 * shape.hidden_size * (shape.num_heads + shape.num_kv_heads) * shape.head_size
    feed_forward = 3 * shape.hidden_size * shape.intermediate_size
    block = attention + feed_forward + 2 * shape.hidden_size
    return embedding * (1 if shape.tied else 2) + shape.num_layers * block + shape.hidden_size


def _vocab_rows(config: ModelConfig, *, vocab_size: int) -> int:
    """Return the rows of the embedding."""
    if config.vocab_size is None:
        return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if config.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.vocab_size} is below the tokenizer's vocabulary of {vocab_size}, "
            f"which does not fit the model; leave model.vocab_size out, raise it, or "
            f"choose a smaller data.tokenizer"
        )
    return config.vocab_size


def _head_size(name: str, hidden_size: int, num_heads: int) -> int:
    """Return hidden_size / num_heads where that is whole."""
    if hidden_size % num_heads:
        raise ConfigError(
            f"model.shape.hidden_size={hidden_size} is not a multiple of model.shape.num_heads={num_heads} "
            f"(what is not set is preset {name!r}'s); change one or set model.shape.head_size"
        )
    return hidden_size // num_heads


def _check_heads(shape: DecoderShape) -> None:
    """Refuse heads that cannot be shared or rotated."""
    if shape.num_heads % shape.num_kv_heads:
        raise ConfigError(
            f"model.shape.num_heads={shape.num_heads} is not a multiple of "
            f"model.shape.num_kv_heads={shape.num_kv_heads}; choose a divisor of {shape.num_heads}"
        )
    if shape.head_size % 2:
        raise ConfigError(
            f"model.shape.head_size={shape.head_size} is odd, rotary positions turn pairs; make it even "
            f"(it is model.shape.hidden_size / model.shape.num_heads unless given)"
        )
