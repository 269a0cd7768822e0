"""Our optimizers in torchtitan: a container of optimizers that its trainer builds from its config.

    Trainer.Config(..., optimizer=optimizer_config("apollo-mini", lr=1e-2))

Written against torchtitan 0.3: a component is a class with a `Config` whose `build(model_parts=...)` the
trainer calls once the model is sharded. Its container steps, saves by parameter name and loads; before both
it takes a step with zero gradients at rate 0, which creates our state and changes nothing else.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hardy.config import ConfigError, UserError
from hardy.optim.make import make_optimizer


def optimizer_config(
    preset: str, *, lr: float | None = None, weight_decay: float = 0.0, **settings: Any
) -> Any:
    """Return what torchtitan's `Trainer.Config.optimizer` takes.

    With pipeline parallelism each stage is routed by itself: give `vocab_size`, by which a stage without
    embedding knows the head, and only `rules` that match in every stage.

    Args:
        preset: as for `make_optimizer`.
        lr: learning rate at the peak; None means the preset's.
        weight_decay: of matrices under the preset's own rule.
        settings: more of `make_optimizer`, such as `rank` or `embed_kind`.

    Raises:
        UserError: torchtitan is missing or older than 0.3.
    """
    return container_class().Config(preset=preset, lr=lr, weight_decay=weight_decay, settings=settings)


@functools.cache
def container_class() -> Any:
    """Return the class of the container; made here, since its base is torchtitan's.

    Raises:
        UserError: torchtitan is missing or older than 0.3.
    """
    try:
        base: Any = import_module("torchtitan.components.optimizer").OptimizersContainer
    except ImportError as error:
        raise UserError(
            f"hardy.integrations.torchtitan needs torchtitan ({error}); install it by pip install torchtitan"
        ) from None
    if not hasattr(base, "Config"):
        raise UserError(
            "this torchtitan is older than 0.3, where optimizers became components with a Config; install a "
            "later one"
        )

    class HardyOptimizers(base):
        """One of our optimizers for each part of the model."""

        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            """Settings of `make_optimizer`; `implementation` has no meaning for it."""

            preset: str = "apollo_mini"
            lr: float | None = None
            weight_decay: float = 0.0
            settings: dict[str, Any] = field(default_factory=dict[str, Any])

        def __init__(self, config: Any, *, model_parts: Sequence[nn.Module]) -> None:
            if config.param_groups:
                raise ConfigError(
                    "param_groups is not read with optimizer_config, which routes parameters itself; say by "
                    "rules=[(pattern, kind, settings)] which go elsewhere"
                )
            self.model_parts = list(model_parts)
            self.optimizers = [
                make_optimizer(
                    part, config.preset, lr=config.lr, weight_decay=config.weight_decay, **config.settings
                )
                for part in self.model_parts
            ]
            held = [
                parameter
                for optimizer in self.optimizers
                for group in optimizer.param_groups
                for parameter in group["params"]
            ]
            Optimizer.__init__(self, held, {})  # for the hooks that torchtitan registers on the container

    return HardyOptimizers
