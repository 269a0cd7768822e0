"""Our optimizers in axolotl: a plugin that is named in its YAML file.

    plugins: [hardy.integrations.axolotl.Plugin]
    hardy: {preset: apollo-mini, embed_kind: smmf}

axolotl has a hook `create_optimizer`, which nothing of it calls (looked up in 0.8, 0.12 and 0.19); so the
plugin also hands its trainer, once that is built, the factory of `hardy.integrations.hf`. Learning rate,
weight decay, betas and eps are those of the YAML file.
"""

import functools
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch.optim import Optimizer

from hardy.config import ConfigError, UserError
from hardy.integrations.hf import Factory, trainer_optimizer

_BY_GROUP = ("loraplus_lr_ratio", "embedding_lr", "embedding_lr_scale", "lr_groups")
"""Settings of axolotl that it carries out only where it makes the optimizer itself."""


def __getattr__(name: str) -> Any:
    """Return `Plugin` or `Args`; made on first use, since their bases are axolotl's and pydantic's."""
    if name in ("Plugin", "Args"):
        return {"Plugin": _plugin_class, "Args": _args_class}[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _plugin_class() -> type:
    try:
        base: Any = import_module("axolotl.integrations.base").BasePlugin
    except ImportError as error:
        raise UserError(
            f"hardy.integrations.axolotl needs axolotl ({error}); install it by pip install axolotl"
        ) from None

    class Plugin(base):
        """Gives axolotl's trainer the optimizer that `hardy` in its configuration says."""

        def get_input_args(self) -> str:
            """Return the path of the settings that this adds to axolotl's."""
            return f"{__name__}.Args"

        def create_optimizer(self, cfg: Any, trainer: Any) -> Optimizer:
            """Return the optimizer."""
            return Factory()(trainer.model, **_settings(cfg, trainer.args))

        def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
            """Let the trainer make the optimizer when it starts."""
            settings = _settings(cfg, trainer.args)
            trainer.optimizer_cls_and_kwargs = trainer_optimizer(settings.pop("preset"), **settings)

    return Plugin


@functools.cache
def _args_class() -> type:
    pydantic: Any = import_module("pydantic")
    return pydantic.create_model("Args", hardy=(dict[str, Any] | None, None))


def _settings(cfg: Any, args: Any) -> dict[str, Any]:
    """Return what the factory is called with.

    Raises:
        ConfigError: no preset, or settings of axolotl that would be dropped.
    """
    said = cfg.get("hardy")
    if not isinstance(said, Mapping) or "preset" not in said:
        raise ConfigError(
            f"hardy must be a table with a preset, such as {{preset: apollo-mini}}, got {said!r}"
        )
    dropped = [name for name in _BY_GROUP if getattr(args, name, None) is not None]
    if dropped:
        raise ConfigError(
            f"{', '.join(dropped)} has no effect on an optimizer of a plugin; leave it out and say rates by "
            f"hardy.rules, such as [['embed', 'adamw', {{lr: 1e-4}}]]"
        )
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
    return {"args": args, **plain}
