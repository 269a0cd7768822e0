"""Our optimizers in the Trainer of transformers, with its learning rate, weight decay, betas and eps.

    Trainer(model, args, optimizer_cls_and_kwargs=trainer_optimizer("apollo-mini", args))

The Trainer calls a class that is no Optimizer as a factory, `Factory()(model, **kwargs)` (transformers 5.2
and later; tried with 5.23), so that parameters have names, but tells it none of its own settings.
"""

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hardy.config import ConfigError, UserError, class_at
from hardy.optim.foreign import settings_of
from hardy.optim.make import make_optimizer
from hardy.optim.presets import PRESETS, WHOLE_MODEL_KINDS
from hardy.optim.presets import preset as preset_called


class Factory:
    """What the Trainer calls to get its optimizer; see `trainer_optimizer`."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        if arguments or more:
            raise UserError(
                "this Trainer takes optimizer_cls_and_kwargs for a class and calls it with parameters, as "
                "transformers did before 5.2; install a later one, or write "
                "Trainer(optimizers=(make_optimizer(model, preset, lr=...), None))"
            )

    def __call__(
        self, model: nn.Module, *told: Any, preset: str, args: Any = None, **settings: Any
    ) -> Optimizer:
        """Return the optimizer.

        Args:
            model: as the Trainer hands it over.
            told: what it says beside; axolotl its TrainingArguments.
            preset: as for `make_optimizer`.
            args: the TrainingArguments.
            settings: those of `make_optimizer`; each comes before what `args` says.

        Raises:
            ConfigError: no `args`, or a setting that `make_optimizer` refuses.
        """
        args = told[0] if told else args
        if args is None:
            raise ConfigError(
                "the factory does not know the Trainer's learning rate and weight decay; write "
                "optimizer_cls_and_kwargs=trainer_optimizer(preset, args)"
            )
        said = {
            "lr": args.learning_rate,
            "weight_decay": args.weight_decay,
            "decayed": decayed_names(model),
            **_betas_and_eps(args, preset, embed_kind=settings.get("embed_kind")),
        }
        return make_optimizer(model, preset, **{**said, **settings})


def trainer_optimizer(preset: str, args: Any, **settings: Any) -> tuple[type[Factory], dict[str, Any]]:
    """Return what `Trainer(optimizer_cls_and_kwargs=...)` wants.

    The Trainer's learning rate, weight decay, betas and eps hold for all parameters, whatever their rule, and
    those decay that the Trainer would decay: all but biases and norms, embeddings included. `args.optim` has
    no part in it.

    Args:
        preset: as for `make_optimizer`.
        args: the TrainingArguments that the Trainer gets.
        settings: more of `make_optimizer`, such as `rank` or `embed_kind`; each comes before what `args`
            says. `decayed` for a Trainer that chooses otherwise which parameters decay.

    Example:
        >>> from types import SimpleNamespace
        >>> factory, settings = trainer_optimizer("apollo", SimpleNamespace(learning_rate=1e-3), rank=64)
        >>> factory.__name__, sorted(settings)
        ('Factory', ['args', 'preset', 'rank'])
    """
    return Factory, {"preset": preset, "args": args, **settings}


def decayed_names(model: nn.Module) -> Collection[str]:
    """Return the names of the parameters that the installed transformers decays."""
    from transformers import Trainer

    # It asks nothing of the trainer, and a copy of its patterns would age.
    unbound: Any = Trainer.get_decay_parameter_names
    return unbound(None, model)


def _betas_and_eps(args: Any, preset: str, *, embed_kind: str | None) -> dict[str, Any]:
    """Return the Trainer's betas and eps in the words of an optimizer that has such."""
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if preset.replace("-", "_") in PRESETS:
        found = preset_called(preset)
        if found.kind in WHOLE_MODEL_KINDS:
            return {}
        has_smmf = "smmf" in (found.kind, embed_kind or found.embed_kind)
        return adam | ({"beta1": args.adam_beta1} if has_smmf else {})
    if "." in preset:
        names, _ = settings_of(class_at(preset, Optimizer, kind="optimizer"))
        return adam if adam.keys() <= names else {}
    return {}
