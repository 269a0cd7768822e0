"""From settings to an optimizer: the table of builders by `optim.name`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hardy.config import ConfigError, read_arguments
from hardy.optim._sharded import is_sharded
from hardy.optim.config import (
    AdafactorConfig,
    AdamWConfig,
    AdaptiveAdamWConfig,
    APOLLOConfig,
    APOLLOMiniConfig,
    MuonConfig,
    OptimizerConfig,
    QAPOLLOConfig,
    RuleConfig,
    SGDConfig,
    SharedConfig,
    SMMFConfig,
    TorchConfig,
)
from hardy.optim.make import make_optimizer
from hardy.optim.param_groups import parameter_groups

Groups = list[dict[str, Any]]
OwnConfig = AdaptiveAdamWConfig | APOLLOConfig | APOLLOMiniConfig | QAPOLLOConfig | SMMFConfig

_NOT_SETTINGS = frozenset({"params", "param_names", "initial_lr", "calls", "kind", "role"})
"""Keys of a group that say what it holds or has done, not how it is trained."""


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """Return the optimizer that `config` names over the trained parameters of `model`.

    Call it after `fully_shard`, which replaces the parameters. Groups carry `param_names`.

    Raises:
        ConfigError: the optimizer cannot train this model, or does not know a setting.

    Example:
        >>> build_optimizer(AdamWConfig(lr=0.01), nn.Linear(2, 2)).param_groups[0]["param_names"]
        ['weight']
    """
    return OPTIMIZERS.get(config.name, _by_path)(config, model)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give every group of `optimizer` the learning rate `lr`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return each group's settings."""
    return [
        {key: value for key, value in group.items() if key not in _NOT_SETTINGS}
        for group in optimizer.param_groups
    ]


def set_hyperparameters(optimizer: Optimizer, settings: list[dict[str, Any]]) -> None:
    """Give each group the settings that `hyperparameters` returned."""
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def _adamw(config: AdamWConfig, model: nn.Module) -> Optimizer:
    groups = parameter_groups(model.named_parameters(), weight_decay=config.weight_decay)
    fused = _devices(groups) <= {"cpu", "cuda"}
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        **({"fused": True} if fused else {"foreach": True}),
    )


def _sgd(config: SGDConfig, model: nn.Module) -> Optimizer:
    groups = parameter_groups(model.named_parameters(), weight_decay=config.weight_decay)
    return torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        # Torch's fused SGD has no sharding rule for DTensor (2.13); on a CPU a plain loop is faster.
        foreach=_devices(groups) != {"cpu"},
    )


def _by_rule(config: OwnConfig, model: nn.Module) -> Optimizer:
    """Build one of hardy's own; settings left at their defaults are not forced on groups of other kinds."""
    settings = _changed(config)
    if settings.pop("release", False):
        settings["nonfinite"] = "skip"  # nobody looks at the whole gradient before it is used
    if isinstance(config, QAPOLLOConfig):
        settings.pop("group_columns", None)
        if config.rank > 1:
            settings |= {"scale_type": "channel", "scale": config.scale or 1.0}
    if not isinstance(config, SMMFConfig) and settings.keys() & {"beta1", "beta2"}:
        settings = {key: value for key, value in settings.items() if key not in ("beta1", "beta2")}
        settings["betas"] = (config.beta1, config.beta2)
    return make_optimizer(model, config.name, lr=config.lr, weight_decay=config.weight_decay, **settings)


def _muon(config: MuonConfig, model: nn.Module) -> Optimizer:
    _refuse_shards(config.name, model)
    return make_optimizer(
        model,
        "muon",
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )


def _adafactor(config: AdafactorConfig, model: nn.Module) -> Optimizer:
    _refuse_shards(config.name, model)
    return make_optimizer(
        model,
        "adafactor",
        lr=config.lr,
        weight_decay=config.weight_decay,
        beta2_decay=config.beta2_decay,
    )


_UNFIT = {
    "torch.optim.LBFGS": "computes the loss again within a step",
    "torch.optim.SparseAdam": "takes sparse gradients only, and a language model's are dense",
}
"""Classes that a training step of ours cannot drive, and why."""


def _by_path(config: TorchConfig, model: nn.Module) -> Optimizer:
    if config.name in _UNFIT:
        raise ConfigError(
            f"optim.name={config.name} cannot train here: it {_UNFIT[config.name]}; choose another class, or "
            f"one of {', '.join(OPTIMIZERS)}"
        )
    arguments = read_arguments(config.arguments, setting="optim.arguments")
    return make_optimizer(model, config.name, lr=config.lr, weight_decay=config.weight_decay, **arguments)


OPTIMIZERS: dict[str, Callable[[Any, nn.Module], Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "adaptive_adamw": _by_rule,
    "apollo": _by_rule,
    "apollo_mini": _by_rule,
    "qapollo": _by_rule,
    "smmf": _by_rule,
    "muon": _muon,
    "adafactor": _adafactor,
}
"""Builders by `optim.name`; each takes its own config and the model. Dotted names go to `_by_path`."""


def _changed(config: RuleConfig) -> dict[str, Any]:
    """Return the settings of the rule that differ from their defaults."""
    shared = {field.name for field in dataclasses.fields(SharedConfig)} | {"name", "lr"}
    fields = [field for field in dataclasses.fields(config) if field.name not in shared]
    return {
        field.name: getattr(config, field.name)
        for field in fields
        if getattr(config, field.name) != field.default
    }


def _refuse_shards(name: str, model: nn.Module) -> None:
    """Refuse to train shards by a rule that needs whole matrices."""
    if any(is_sharded(param) for param in model.parameters()):
        raise ConfigError(
            f"optim.name={name} needs whole matrices, and strategy.mesh.shards splits them; set it to 1, "
            f"or use apollo, apollo_mini, smmf or adamw"
        )


def _devices(groups: Groups) -> set[str]:
    return {parameter.device.type for group in groups for _, parameter in group["params"]}
