"""From settings to an optimizer: the table, and the fastest implementation that fits the parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hardy.optim.config import AdamWConfig, OptimizerConfig, SGDConfig
from hardy.optim.param_groups import parameter_groups

Groups = list[dict[str, Any]]


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """Return the optimizer that `config` names over the trained parameters of `model`.

    Call it after `fully_shard`, which replaces the parameters. Groups carry `param_names`.

    Example:
        >>> build_optimizer(AdamWConfig(lr=0.01), nn.Linear(2, 2)).param_groups[0]["param_names"]
        ['weight']
    """
    groups = parameter_groups(model.named_parameters(), weight_decay=config.weight_decay)
    return OPTIMIZERS[config.name](config, groups)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give every group of `optimizer` the learning rate `lr`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return each group's settings, those that the optimizer's constructor takes."""
    return [{key: group[key] for key in optimizer.defaults} for group in optimizer.param_groups]


def set_hyperparameters(optimizer: Optimizer, settings: list[dict[str, Any]]) -> None:
    """Give each group the settings that `hyperparameters` returned."""
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def _adamw(config: AdamWConfig, groups: Groups) -> Optimizer:
    fused = _devices(groups) <= {"cpu", "cuda"}
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        **({"fused": True} if fused else {"foreach": True}),
    )


def _sgd(config: SGDConfig, groups: Groups) -> Optimizer:
    return torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        # Torch's fused SGD has no sharding rule for DTensor (2.13); on a CPU a plain loop is faster.
        foreach=_devices(groups) != {"cpu"},
    )


OPTIMIZERS: dict[str, Callable[[Any, Groups], Optimizer]] = {"adamw": _adamw, "sgd": _sgd}
"""Builders by `optim.name`; each takes its own config and the parameter groups."""


def _devices(groups: Groups) -> set[str]:
    return {parameter.device.type for group in groups for _, parameter in group["params"]}
