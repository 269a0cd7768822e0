"""What a checkpoint and the run that goes on from it must share, and what is said where they do not."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from hardy.config import UserError, to_dict
from hardy.data.corpus import Corpus
from hardy.model.decoder import Decoder
from hardy.train.balanced import levelled_by
from hardy.train.config import TrainConfig
from hardy.train.folder import differing


def identity(config: TrainConfig, corpus: Corpus, model: nn.Module) -> dict[str, Any]:
    """Return what makes two runs the same run: model, vocabulary, data and the order in which it is read.

    Under "settings" stands what a user would look for where the first three differ; it is not compared.
    """
    shape = asdict(model.shape) if isinstance(model, Decoder) else {"name": config.model.name}
    data = config.data
    told = {
        "data.source": data.source,
        "data.text_field": data.text_field,
        "data.limit_mb": data.limit_mb,
        "data.tokenizer": data.tokenizer,
        "data.validation_fraction": data.validation_fraction,
    }
    return {
        "model": shape,
        "tokenizer": corpus.tokenizer.fingerprint,
        "data": corpus.fingerprint,
        "order": {
            "train.seed": config.train.seed,
            "train.batch_packs": config.train.batch_packs,
            "data.pack_tokens": data.pack_tokens,
            "data.document_tokens": data.document_tokens,
            "balance.packing": config.balance.packing,
            **levelled_by(config, model.shape if isinstance(model, Decoder) else None),
        },
        "strategy": to_dict(config.strategy)["name"],
        "settings": {"model": {"model.name": config.model.name}, "tokenizer": told, "data": told},
    }


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], *, run_dir: str) -> None:
    """Refuse to resume another model, vocabulary or data than the checkpoint's.

    Raises:
        UserError: with the settings that differ, the saved values, the new ones, and the way out.
    """
    words = {
        "tokenizer": "the vocabulary",  # first: it decides the rows of the model
        "model": "the model",
        "data": "the data",
        "order": "the order of the data",
        "strategy": "the strategy",
    }
    for key, name in words.items():
        if not list(differing({key: saved.get(key)}, {key: now[key]})):
            continue
        before, after = _as_settings(saved, key), _as_settings(now, key)
        both = [path for path in after if path in before]
        changes = list(differing({path: before[path] for path in both}, {path: after[path] for path in both}))
        if not changes:
            files = " or ".join(f"{path}={after[path]}" for path in _FILES[key])
            changes = [f"{files} holds something else now"]
        raise UserError(
            f"cannot resume {run_dir}: {name} changed since the checkpoint ({'; '.join(changes[:3])}); "
            f"put it back, or start a new run with another --run-dir"
        )


_FILES = {
    "tokenizer": ("data.source", "data.tokenizer"),
    "model": ("model.name",),
    "data": ("data.source",),
}
"""Settings that may stay while what they name changes."""


def _as_settings(told: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a part of an identity by the paths of the settings that decide it."""
    named, part = told.get("settings", {}).get(key, {}), told.get(key)  # none in older checkpoints
    if key == "order":
        return {"balance.delay_steps": 0, **(part or {})}
    if key == "strategy":
        return {"strategy.name": part}
    if key == "model" and isinstance(part, Mapping):
        direct = ("name", "vocab_size", "context_tokens")
        sizes = {f"model.{'' if size in direct else 'shape.'}{size}": value for size, value in part.items()}
        return {**named, **sizes}
    return named
