"""The recipes that ship with hardy, by name. Free of torch."""

from collections.abc import Callable

from hardy.config import ConfigError, unknown_name
from hardy.recipes import adaptive, pretrain, small
from hardy.train.config import TrainConfig

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "tiny": small.tiny,
    "demo": small.demo,
    "adaptive": adaptive.adaptive,
    "pretrain_60m": pretrain.pretrain_60m,
    "pretrain_350m": pretrain.pretrain_350m,
    "pretrain_1b": pretrain.pretrain_1b,
    "pretrain_7b": pretrain.pretrain_7b,
}
"""Functions that return a whole run; the first line of their docstring is shown by `hardy train --help`."""


def recipe(name: str) -> TrainConfig:
    """Return the run called `name`; hyphens and underscores are the same.

    Example:
        >>> recipe("pretrain-60m") == recipe("pretrain_60m")
        True

    Raises:
        ConfigError: there is none of that name; the text says which is nearest.
    """
    build = RECIPES.get(name.replace("-", "_"))
    if build is None:
        raise ConfigError(unknown_name(name, "recipe", RECIPES))
    return build()
