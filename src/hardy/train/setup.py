"""From a configuration to what trains: model, optimizer, strategy, batches. The same in all three worlds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from hardy.config import UserError, to_dict
from hardy.data.corpus import Corpus
from hardy.data.stream import PackStream
from hardy.distributed.comm import Communicator
from hardy.distributed.sharded import parallelize, place
from hardy.distributed.strategy import build_strategy
from hardy.model.build import build_model
from hardy.model.decoder import Decoder, unit_names
from hardy.model.init import initialise
from hardy.model.presets import check_context
from hardy.optim.build import build_optimizer
from hardy.train.config import TrainConfig
from hardy.train.device import Hardware
from hardy.train.folder import differing
from hardy.train.loop import Batches, Plan
from hardy.train.plan import RunPlan, plan_run
from hardy.train.step import AutocastSetting, Worker


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """One worker's run, ready to start."""

    worker: Worker
    plan: Plan
    identity: dict[str, Any]
    """What a checkpoint must have in common with the run that loads it."""
    num_parameters: int


def assemble(config: TrainConfig, comm: Communicator, *, corpus: Corpus, hardware: Hardware) -> Assembly:
    """Build one worker's side of the run: alone, simulated, or one process of several.

    Raises:
        UserError: settings, data and number of workers do not fit together.
    """
    sizes = plan_run(config, num_workers=comm.size)
    stream = _stream(config, corpus, split="train")
    stream.check_size(config.train.batch_packs)
    model = build_model(config.model, vocab_size=corpus.tokenizer.vocab_size)
    document_tokens = config.data.document_tokens or config.data.pack_tokens
    check_context(getattr(model, "context_tokens", None), document_tokens=document_tokens)
    num_parameters = sum(p.numel() for p in model.parameters())
    same_run = identity(config, corpus, model)
    model = place_model(model, comm, sizes=sizes, hardware=hardware, seed=config.train.seed)
    sharded = sizes.shards > 1
    worker = Worker(
        model=model,
        optimizer=build_optimizer(config.optim, model),
        strategy=build_strategy(config.strategy, model, comm),
        comm=comm,
        device=hardware.device,
        # FSDP2 casts for itself: its mixed-precision policy also gathers in bf16.
        autocast=AutocastSetting(device_type=hardware.device.type, enabled=hardware.bf16 and not sharded),
        clip_norm=config.optim.clip_norm,
    )
    validation = _stream(config, corpus, split="validation") if corpus.validation.num_documents else None
    plan = Plan(
        loop=config.train,
        peak_lr=config.optim.lr,
        schedule=config.optim.schedule,
        batches=Batches(stream=stream, batch_packs=config.train.batch_packs, micro_packs=sizes.micro.packs),
        validation=validation,
        validation_packs=min(config.train.evaluate_packs, validation.num_packs or 0) if validation else 0,
        checkpoint_every_steps=config.checkpoint.every_steps,
    )
    return Assembly(worker=worker, plan=plan, identity=same_run, num_parameters=num_parameters)


def place_model(
    model: nn.Module, comm: Communicator, *, sizes: RunPlan, hardware: Hardware, seed: int
) -> nn.Module:
    """Lay the model out over the workers and give it its initial weights, the same on every world size.

    Sharded models never exist whole: they are laid out on the meta device and filled shard by shard.
    """
    is_new = any(p.is_meta for p in model.parameters())
    if sizes.shards == 1:
        _fill(model, is_new=is_new, device=hardware.device, seed=seed)
    wrapped = parallelize(
        model,
        comm,
        replicas=sizes.replicas,
        shards=sizes.shards,
        unit_names=unit_names(model),
        device_type="cuda" if hardware.device.type == "cuda" else "cpu",
        precision="bf16" if hardware.bf16 else "fp32",
    )
    if sizes.shards > 1:
        _fill(wrapped, is_new=is_new, device=hardware.device, seed=seed)
    return wrapped


def _fill(model: nn.Module, *, is_new: bool, device: torch.device, seed: int) -> None:
    """Give a meta-device model memory and weights; move one that brings its own."""
    if is_new:
        model.to_empty(device=device)
        initialise(model, seed=seed, place=place)
    else:
        model.to(device)


def _stream(config: TrainConfig, corpus: Corpus, *, split: Literal["train", "validation"]) -> PackStream:
    """Return the packs of one split: endless for training, each once for validation."""
    return PackStream(
        corpus.train if split == "train" else corpus.validation,
        pack_tokens=config.data.pack_tokens,
        document_tokens=config.data.document_tokens,
        packing=config.balance.packing,
        seed=config.train.seed,
        end_id=corpus.tokenizer.end_id,
        num_epochs=None if split == "train" else 1,
    )


def identity(config: TrainConfig, corpus: Corpus, model: nn.Module) -> dict[str, Any]:
    """Return what makes two runs the same run: model, vocabulary, data and the order in which it is read."""
    shape = asdict(model.shape) if isinstance(model, Decoder) else {"name": config.model.name}
    return {
        "model": shape,
        "tokenizer": corpus.tokenizer.fingerprint,
        "data": corpus.fingerprint,
        "order": {
            "train.seed": config.train.seed,
            "train.batch_packs": config.train.batch_packs,
            "data.pack_tokens": config.data.pack_tokens,
            "data.document_tokens": config.data.document_tokens,
            "balance.packing": config.balance.packing,
        },
        "strategy": to_dict(config.strategy)["name"],
    }


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], *, run_dir: str) -> None:
    """Refuse to resume another model, vocabulary or data than the checkpoint's.

    Raises:
        UserError: with what differs, the saved value, the new one, and the way out.
    """
    words = {
        "model": "the model",
        "tokenizer": "the vocabulary",
        "data": "the data",
        "order": "the order of the data",
        "strategy": "the strategy",
    }
    for key, name in words.items():
        changes = list(differing({key: saved.get(key)}, {key: now[key]}))
        if changes:
            raise UserError(
                f"cannot resume {run_dir}: {name} changed since the checkpoint ({'; '.join(changes[:3])}); "
                f"put it back, or start a new run with another --run-dir"
            )
