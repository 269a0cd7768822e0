"""From settings to a strategy."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hardy.config import ConfigError, read_arguments
from hardy.distributed.comm import Communicator
from hardy.distributed.config import (
    AEDiTConfig,
    AnomalyConfig,
    CompressionConfig,
    DelayedConfig,
    DiLoCoConfig,
    EDiTConfig,
    LocalSGDConfig,
    LocalUpdateConfig,
    OuterSGDConfig,
    OuterTorchConfig,
    PostLocalSGDConfig,
    StrategyConfig,
    StreamingDiLoCoConfig,
    SynchronousConfig,
)
from hardy.distributed.gossip.build import build_push_sum
from hardy.distributed.gossip.config import PushSumConfig
from hardy.distributed.groups import FixedGroup, Grid, OuterGroup
from hardy.distributed.local.anomaly import AnomalyGuard, Finite, ZTest
from hardy.distributed.local.averaging import Aggregation, Anchored, Mean, SoftmaxNorm, StepWeighted
from hardy.distributed.local.compression import BF16, Compression, Full, Int8, TopK
from hardy.distributed.local.gathered import keep_fresh
from hardy.distributed.local.lane import Lane
from hardy.distributed.local.outer import OuterOptimizer, OuterSGD, TorchOuter
from hardy.distributed.local.round import Manner, Parts
from hardy.distributed.local.triggers import EverySeconds, EverySteps, Trigger
from hardy.distributed.local.units import Units
from hardy.distributed.local.updates import LocalUpdates
from hardy.distributed.robust.build import build_combiner
from hardy.distributed.robust.config import DStarConfig, RobustConfig
from hardy.distributed.robust.fastest import FastestGroup
from hardy.distributed.robust.fastest_strategy import FastestRobust
from hardy.distributed.robust.hooks import RobustRanks
from hardy.distributed.robust.sender import Sender
from hardy.distributed.robust.strategy import Robust
from hardy.distributed.robust.trusted import TrustedGradient
from hardy.distributed.sharded import bare, check_same
from hardy.distributed.strategy import Strategy, Synchronous, watch_units

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a strategy may lay its hands on."""

    model: nn.Module
    """As it is trained, wrapped or plain."""
    optimizer: Optimizer
    unit_names: Sequence[str]
    """Submodules that are gathered and exchanged as a whole, in the order of the forward pass."""
    comm: Communicator
    """All workers."""
    grid: Grid
    """The same workers as replicas, and those of this one's replica."""
    outer: OuterGroup | None = None
    """The replicas, where they may come and go; None takes those of the grid."""
    draw_trusted: Callable[[int], None] | None = None
    """Adds to `grad` the gradient of the mean loss on a trusted batch, given its number."""
    seed: int = 0
    """Of what strategies draw."""
    elect: Callable[[int], FastestGroup] | None = None
    """Comes to replicas whose steps go on with the first k, given the steps that the weights have done."""


def _build_synchronous(_config: SynchronousConfig, trained: Trained) -> Strategy:
    return Synchronous(trained.model, trained.comm)


LocalConfig = (
    EDiTConfig
    | AEDiTConfig
    | LocalSGDConfig
    | PostLocalSGDConfig
    | DiLoCoConfig
    | StreamingDiLoCoConfig
    | DelayedConfig
)


def _build_local(config: LocalConfig, trained: Trained) -> Strategy:
    grid = trained.grid
    if grid.replicas == 1:
        logger.warning(
            "strategy.name=%s with one replica exchanges with nobody; only its outer optimizer acts",
            config.name,
        )
    is_beside = config.layerwise or config.delay_steps > 0 or config.delay_rounds > 0
    units = Units(trained.model, trained.unit_names)
    config.check_units(len(units))
    outer = trained.outer or FixedGroup(grid.outer)
    strategy = LocalUpdates(
        units,
        trained.optimizer,
        inner=grid.inner,
        outer=outer,
        parts=local_parts(config),
        manner=Manner(
            warmup_steps=config.warmup_steps,
            clip_norm=config.clip_norm,
            judges_per_rate=config.anomaly.relative_to_rate,
            inner_state=config.inner_state,
            fragments=config.fragments,
            delay_steps=config.delay_steps,
            delay_rounds=config.delay_rounds,
            mix=config.mix,
            layerwise=config.layerwise,
            offload=config.offload,
        ),
        lane=Lane(beside=is_beside and outer.runs_beside, device=units.device),
    )
    if config.layerwise:
        model = bare(trained.model)
        watch_units(model, trained.unit_names, strategy)
        if units.is_sharded:
            keep_fresh(model, trained.unit_names, inner=grid.inner, meets=lambda: bool(strategy.pending))
    return strategy


def _build_robust(config: RobustConfig | DStarConfig, trained: Trained) -> Strategy:
    grid, model = trained.grid, trained.model
    num_workers = trained.comm.size if config.worker == "rank" else grid.replicas
    combine = build_combiner(config, num_workers=num_workers, seed=trained.seed)
    if config.worker == "rank":
        return RobustRanks(model, trained.comm, combine)
    trusted = None
    if config.needs_trusted:
        if trained.draw_trusted is None:
            raise ConfigError(
                f"strategy.rule={config.rule!r} needs the gradient of a trusted batch; give Trained a "
                f"draw_trusted that adds it to grad, or choose another rule"
            )
        trusted = TrustedGradient(
            [param for param in model.parameters() if param.requires_grad],
            trained.draw_trusted,
            every_steps=config.trusted.every_steps,
            agree=config.trusted.agree,
        )
    if config.fastest is None:
        return Robust(
            model,
            inner=grid.inner,
            outer=grid.outer,
            combine=combine,
            exchange=config.exchange,
            momentum=config.worker_momentum,
            trusted=trusted,
        )
    if trained.elect is None:
        raise ConfigError(
            "strategy.fastest needs a coordinator, which `hardy train` starts; in a loop of your own give "
            "Trained an elect that returns a FastestGroup, or leave strategy.fastest out"
        )
    return FastestRobust(
        trained.optimizer,
        sender=Sender(model, inner=grid.inner, momentum=config.worker_momentum, trusted=trusted),
        inner=grid.inner,
        enter=trained.elect,
        combine=combine,
        form=config.exchange,
        keeps_late=config.fastest.late == "dampen",
    )


def _build_push_sum(config: PushSumConfig, trained: Trained) -> Strategy:
    return build_push_sum(
        config,
        trained.model,
        unit_names=trained.unit_names,
        inner=trained.grid.inner,
        outer=trained.outer or trained.grid.outer,
    )


def local_parts(config: LocalUpdateConfig) -> Parts:
    """Return the parts that a local-update strategy is composed of."""
    trigger: Trigger
    if config.every_steps is not None:
        trigger = EverySteps(config.every_steps, fragments=config.fragments)
    else:
        assert config.every_s is not None, "the config has one of them"
        trigger = EverySeconds(config.every_s, min_steps=config.min_steps)
    aggregation: Aggregation = Mean()
    if config.aggregate == "softmax_norm":
        aggregation = SoftmaxNorm(config.temperature, relative=config.relative_temperature)
    if config.step_share:
        aggregation = StepWeighted(config.step_share, aggregation)
    if config.aggregate == "anchored":
        aggregation = Anchored(config.anchors, aggregation)
    outer: OuterOptimizer
    if isinstance(config.outer, OuterSGDConfig):
        outer = OuterSGD(config.outer.lr, momentum=config.outer.momentum, nesterov=config.outer.nesterov)
    else:
        further = read_arguments(config.outer.arguments, setting="strategy.outer.arguments")
        outer = _torch_outer(config.outer, further)
    return Parts(
        trigger=trigger,
        aggregation=aggregation,
        anomaly=partial(_guard, config.anomaly),
        compression=_compression(config.compression),
        outer_optimizer=outer,
    )


def _torch_outer(config: OuterTorchConfig, further: Mapping[str, Any]) -> OuterOptimizer:
    """Return an outer optimizer of torch; a refusal names the settings."""
    if "lr" in further:
        raise ConfigError(
            f"strategy.outer.arguments has lr={further['lr']!r}; set strategy.outer.lr to it instead"
        )
    try:
        return TorchOuter.named(config.name, lr=config.lr, **further)
    except ConfigError as error:
        settings = "strategy.outer.name, strategy.outer.arguments" if further else "strategy.outer.name"
        raise ConfigError(f"{settings}: {error}") from error


def _guard(config: AnomalyConfig, num_units: int) -> AnomalyGuard:
    if config.name == "finite":
        return Finite()
    return ZTest(
        delta=config.delta,
        alpha=config.alpha,
        warmup_rounds=config.warmup_rounds,
        relative_floor=config.relative_floor,
        num_units=num_units,
    )


def _compression(config: CompressionConfig) -> Compression:
    if config.name == "int8":
        return Int8(block=config.block)
    if config.name == "topk":
        return TopK(density=config.density, decay=config.decay)
    return BF16() if config.name == "bf16" else Full()


STRATEGIES: dict[str, Callable[[Any, Trained], Strategy]] = {
    "synchronous": _build_synchronous,
    "robust": _build_robust,
    "dstar": _build_robust,
    "push_sum": _build_push_sum,
} | dict.fromkeys(
    ("edit", "a_edit", "local_sgd", "post_local_sgd", "diloco", "streaming_diloco", "delayed"), _build_local
)
"""What `strategy.name` may be. A new strategy is its file, its config class and its line here."""


def build_strategy(config: StrategyConfig, trained: Trained) -> Strategy:
    """Return the strategy that `config` describes; all workers of `trained.comm` call it together.

    Raises:
        ConfigError: a setting that these workers or this model cannot have.
        UserError: the workers of real processes hold different models or settings.
    """
    check_same(trained.model, trained.comm, settings=repr(config))
    return STRATEGIES[config.name](config, trained)
