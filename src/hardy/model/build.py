"""From settings to a model."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from hardy.config import ConfigError
from hardy.model.config import ModelConfig, ShapeConfig
from hardy.model.decoder import Decoder, compile_blocks
from hardy.model.presets import HF_PREFIX, resolve_shape
from hardy.ops.attention import packed_attention


def build_model(
    config: ModelConfig,
    *,
    vocab_size: int,
    device: torch.device | str = "meta",
    attention: Callable[..., Tensor] = packed_attention,
) -> nn.Module:
    """Build the model that `config` describes.

    A decoder has no weights yet: it stands on the meta device, or has uninitialised memory on `device`;
    `initialise` draws them. A model of `hf:PATH` brings its weights (`pretrained` is true) and stands on the
    CPU where `device` is meta.

    Args:
        config: the model's settings.
        vocab_size: the tokenizer's.
        device: where parameters live.
        attention: of a decoder; is given `backend=config.attention` besides.

    Raises:
        ConfigError: settings that contradict each other or the tokenizer.
        UserError: `hf:PATH` names no model that can be used.
    """
    if config.name.startswith(HF_PREFIX):
        model = _build_hf(config, vocab_size=vocab_size, device=device)
    else:
        shape = resolve_shape(config, vocab_size=vocab_size)
        with torch.device("meta"):
            chosen = partial(attention, backend=config.attention)
            model = Decoder(shape, attention=chosen, recompute=config.recompute)
        if torch.device(device).type != "meta":
            model.to_empty(device=device)
    if config.compile:
        compile_blocks(model)
    return model


def _build_hf(config: ModelConfig, *, vocab_size: int, device: torch.device | str) -> nn.Module:
    """Load a local Hugging Face model; its own config decides the sizes."""
    from hardy.model.hf import HFCausalLM

    if config.shape != ShapeConfig():
        raise ConfigError(f"model.shape cannot change {config.name}: its config.json decides; leave it out")
    for setting in ("vocab_size", "context_tokens"):
        if getattr(config, setting) is not None:
            raise ConfigError(f"model.{setting} cannot change {config.name}: its config.json decides")
    model = HFCausalLM(
        config.name.removeprefix(HF_PREFIX), backend=config.attention, recompute=config.recompute
    )
    if model.vocab_size < vocab_size:
        raise ConfigError(
            f"{config.name} has {model.vocab_size} tokens, data.tokenizer {vocab_size}: a tokenizer whose "
            f"vocabulary does not fit the model; set data.tokenizer to the model's own folder"
        )
    return model if torch.device(device).type == "meta" else model.to(device)
