"""From a configuration to what trains: model, optimizer, strategy, batches. The same in all three worlds."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hardy.balance.config import BalanceConfig
from hardy.data.corpus import Corpus
from hardy.data.stream import PackStream
from hardy.distributed.balance.attention import context_parallel_attention
from hardy.distributed.build import Trained, build_strategy
from hardy.distributed.comm import Alone, Communicator
from hardy.distributed.config import LocalUpdateConfig
from hardy.distributed.groups import Grid, OuterGroup, split
from hardy.distributed.robust.config import CombinedConfig
from hardy.distributed.sharded import parallelize, place
from hardy.model.build import build_model
from hardy.model.decoder import unit_names
from hardy.model.init import initialise
from hardy.model.presets import DecoderShape, check_context
from hardy.ops.attention import packed_attention
from hardy.optim._shell import RuleOptimizer
from hardy.optim.build import build_optimizer
from hardy.optim.config import OptimizerConfig, QAPOLLOConfig, RuleConfig
from hardy.optim.guard import GradGuard
from hardy.optim.int8 import quantize_model
from hardy.optim.schedules import build_schedule
from hardy.train.balanced import balanced_batches
from hardy.train.config import TrainConfig
from hardy.train.device import Hardware
from hardy.train.identity import identity
from hardy.train.loop import Batches, BatchSource, Plan
from hardy.train.membership import Membership
from hardy.train.plan import RunPlan, plan_run
from hardy.train.step import AutocastSetting, Worker
from hardy.train.trusted import packs_to_trust, trusted_draw

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """A part of a run that changes and comes back."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        ...


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """One worker's run, ready to start."""

    worker: Worker
    plan: Plan
    identity: dict[str, Any]
    """What a checkpoint must have in common with the run that loads it."""
    num_parameters: int
    grid: Grid
    outer: OuterGroup | None = None
    """The group of replicas that come and go."""

    def parts(self) -> dict[str, Stateful]:
        """Return what a checkpoint keeps beside model, optimizer and progress, by the name it has there."""
        parts: dict[str, Stateful] = {"strategy": self.worker.strategy, "schedule": self.plan.schedule}
        return parts if self.worker.guard is None else parts | {"guard": self.worker.guard}


def assemble(
    config: TrainConfig,
    comm: Communicator,
    *,
    corpus: Corpus,
    hardware: Hardware,
    membership: Membership | None = None,
) -> Assembly:
    """Build one worker's side of the run: alone, simulated, or one process of several.

    Args:
        config: the run.
        comm: all workers; of replicas that come and go those of this one.
        corpus: what it reads.
        hardware: where it computes.
        membership: of a replica that comes and goes; it enters its group at the end.

    Raises:
        UserError: settings, data and number of workers do not fit together.
    """
    sizes = plan_run(config, num_workers=comm.size * (membership.replicas if membership else 1))
    grid = _grid(config, comm, replicas=sizes.replicas, membership=membership)
    stream = _stream(config, corpus, split="train")
    stream.check_size(config.train.batch_packs)
    _warn_of_warmup(config, rank=comm.rank)
    model = build_model(
        config.model, vocab_size=corpus.tokenizer.vocab_size, attention=_attention(config.balance)
    )
    names, shape = unit_names(model), getattr(model, "shape", None)
    document_tokens = config.data.document_tokens or config.data.pack_tokens
    check_context(getattr(model, "context_tokens", None), document_tokens=document_tokens)
    num_parameters = sum(p.numel() for p in model.parameters())
    same_run = identity(config, corpus, model)
    int8_group = config.optim.group_columns if isinstance(config.optim, QAPOLLOConfig) else None
    together = replace(sizes, num_workers=grid.inner.size, replicas=grid.inner.size // sizes.shards)
    model = place_model(
        model, grid.inner, sizes=together, hardware=hardware, seed=config.train.seed, int8_group=int8_group
    )
    optimizer = build_optimizer(config.optim, model)
    released = _released(config.optim, optimizer, model, sizes=together)
    guard = build_guard(config.optim, optimizer, device=hardware.device)
    outer = membership.enter() if membership and membership.enter else None
    # FSDP2 casts for itself: its mixed-precision policy also gathers in bf16.
    in_bf16 = hardware.bf16 and sizes.shards == 1
    autocast = AutocastSetting(device_type=hardware.device.type, enabled=in_bf16)
    held_out = _held_out(config, corpus, model, device=hardware.device, autocast=autocast)
    trained = Trained(
        model=model,
        optimizer=optimizer,
        unit_names=names,
        comm=comm,
        grid=grid,
        outer=outer,
        draw_trusted=held_out.draw_trusted,
        seed=config.train.seed,
        elect=membership.elect if membership else None,
    )
    worker = Worker(
        model=model,
        optimizer=optimizer,
        strategy=build_strategy(config.strategy, trained),
        comm=grid.inner,
        everyone=comm,
        replicas=grid.replicas,
        share=(grid.replica * comm.size + comm.rank, sizes.num_workers) if membership else None,
        device=hardware.device,
        autocast=autocast,
        clip_norm=config.optim.clip_norm if guard is None else None,
        guard=guard,
        released=released,
    )
    batches = _batches(config, stream, grid.inner, sizes=sizes, shape=shape)
    return Assembly(
        worker=worker,
        plan=_plan(config, batches, held_out),
        identity=same_run,
        num_parameters=num_parameters,
        grid=grid,
        outer=outer,
    )


def _attention(balance: BalanceConfig) -> Callable[..., Tensor]:
    """Return how a decoder attends: where batches are planned, workers may share a document."""
    if balance.mode == "none":
        return packed_attention
    return context_parallel_attention


def _batches(
    config: TrainConfig,
    stream: PackStream,
    comm: Communicator,
    *,
    sizes: RunPlan,
    shape: DecoderShape | None,
) -> BatchSource:
    """Return who computes what of each global batch."""
    if config.balance.mode == "none":
        packs = config.train.batch_packs
        return Batches(stream=stream, batch_packs=packs, micro_packs=sizes.micro.packs)
    assert shape is not None, "other models were refused"
    return balanced_batches(config, stream, comm, sizes=sizes, shape=shape)


def _plan(config: TrainConfig, batches: BatchSource, held_out: "HeldOut") -> Plan:
    """Return the settings of the loop, resolved."""
    return Plan(
        loop=config.train,
        schedule=build_schedule(config.optim.schedule, peak=config.optim.lr, total_steps=config.train.steps),
        batches=batches,
        validation=held_out.validation,
        validation_packs=held_out.validation_packs,
        checkpoint_every_steps=config.checkpoint.every_steps,
    )


class HeldOut(NamedTuple):
    """Text that is not trained on."""

    validation: PackStream | None
    validation_packs: int
    draw_trusted: Callable[[int], None] | None
    """See `Trained`; None where no rule needs it."""


def _held_out(
    config: TrainConfig,
    corpus: Corpus,
    model: nn.Module,
    *,
    device: torch.device,
    autocast: AutocastSetting,
) -> HeldOut:
    if not corpus.validation.num_documents:
        validation, there = None, 0
    else:
        validation = _stream(config, corpus, split="validation")
        there = validation.num_packs or 0
    draw_trusted = None
    if isinstance(config.strategy, CombinedConfig) and config.strategy.needs_trusted:
        trusted = config.strategy.trusted
        there = packs_to_trust(trusted, validation).start
        assert validation is not None, "refused above"
        draw_trusted = trusted_draw(model, validation, trusted, device=device, autocast=autocast)
    return HeldOut(validation, min(config.train.evaluate_packs, there), draw_trusted)


def _grid(config: TrainConfig, comm: Communicator, *, replicas: int, membership: Membership | None) -> Grid:
    """Return who steps together: all workers, or where replicas train alone those of this one's replica."""
    if membership:
        alone = Alone(clock=comm.clock)
        me = membership.replica
        return Grid(inner=comm, outer=alone, replica=me, replicas=replicas, shard=comm.rank, shards=comm.size)
    if config.strategy.replicas_step_alone:
        return split(comm, replicas=replicas, shards=comm.size // replicas)
    alone = Alone(clock=comm.clock)
    return Grid(inner=comm, outer=alone, replica=0, replicas=1, shard=comm.rank, shards=comm.size)


def build_guard(
    config: OptimizerConfig, optimizer: torch.optim.Optimizer, *, device: torch.device
) -> GradGuard | None:
    """Return the guard that `optim.guard` describes; None where its history is off."""
    if config.guard.history == "off":
        return None
    num_tensors = sum(len(group["params"]) for group in optimizer.param_groups)
    return GradGuard(config.guard, max_norm=config.clip_norm, num_tensors=num_tensors, device=device)


def _warn_of_warmup(config: TrainConfig, *, rank: int) -> None:
    """Warn of local updates that only ever warm up."""
    strategy, total_steps = config.strategy, config.train.steps
    if isinstance(strategy, LocalUpdateConfig) and strategy.warmup_steps >= total_steps and rank == 0:
        logger.warning(
            "strategy.warmup_steps=%d is not below train.steps=%d: no replica ever trains alone; lower it, a "
            "twentieth of the run is a good measure",
            strategy.warmup_steps,
            total_steps,
        )


def _released(
    config: OptimizerConfig, optimizer: torch.optim.Optimizer, model: nn.Module, *, sizes: RunPlan
) -> bool:
    """Let parameters be updated in the last backward pass of a step, where that was asked for."""
    asked = isinstance(config, RuleConfig) and config.release
    if not asked or not isinstance(optimizer, RuleOptimizer):
        return False
    # FSDP2 hands out gradients with the last micro-batch only.
    optimizer.enable_release(model, accumulation_steps=1 if sizes.shards > 1 else sizes.micro.count)
    return True


def place_model(
    model: nn.Module,
    comm: Communicator,
    *,
    sizes: RunPlan,
    hardware: Hardware,
    seed: int,
    int8_group: int | None = None,
) -> nn.Module:
    """Lay the model out over the workers and give it its initial weights, the same on every world size.

    Sharded models never exist whole: they are laid out on the meta device and filled shard by shard. With
    `int8_group` linear layers are kept in int8, so many columns to a scale.
    """
    is_new = any(p.is_meta for p in model.parameters())
    if sizes.shards == 1:
        _fill(model, is_new=is_new, device=hardware.device, seed=seed)
        if int8_group is not None:
            quantize_model(model, group=int8_group)
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
