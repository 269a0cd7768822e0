"""Optimizers of others: what their classes take, and factories that other packages registered.

A package registers `name = "module:factory"` under the group `hardy.optimizers`; `factory(model, **settings)`
returns a `torch.optim.Optimizer`. Nothing of theirs is imported before it is asked for.
"""

import inspect
from collections.abc import Callable, Collection
from importlib.metadata import EntryPoint, entry_points

from torch.optim import Optimizer

from hardy.config import ConfigError, unknown_name

Build = Callable[..., Optimizer]

ENTRY_POINTS = "hardy.optimizers"
"""Entry-point group of other packages."""


def registered_factory(name: str, *, beside: Collection[str]) -> Build:
    """Return the factory that another package registered as `name`; hyphens and underscores are the same.

    What it returns is checked to be an optimizer.

    Args:
        name: as registered under `ENTRY_POINTS`.
        beside: names that are known without any other package, for the text of the error.

    Raises:
        ConfigError: none of that name, more than one, or one that cannot be loaded.
    """
    points = list(entry_points(group=ENTRY_POINTS))
    matching = [point for point in points if point.name.replace("-", "_") == name.replace("-", "_")]
    if not matching:
        known = [*beside, *(point.name for point in points)]
        text = unknown_name(name, "optimizer", known)
        raise ConfigError(f"{text}; any class by its path, such as torch.optim.RMSprop")
    if len(matching) > 1:
        values = ", ".join(sorted(point.value for point in matching))
        raise ConfigError(
            f"optimizer {name!r} is registered more than once ({values}); uninstall all but one"
        )
    factory = _loaded(matching[0])

    def checked(*arguments: object, **settings: object) -> Optimizer:
        optimizer = factory(*arguments, **settings)
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                f"optimizer {name!r} ({matching[0].value}) returned a {type(optimizer).__name__}, not a "
                f"torch.optim.Optimizer; it must be a factory(model, **settings)"
            )
        return optimizer

    return checked


def settings_of(build: Build) -> tuple[frozenset[str], bool]:
    """Return the settings that a constructor names, and whether it takes others too.

    Example:
        >>> import torch
        >>> names, is_open = settings_of(torch.optim.Muon)
        >>> "ns_steps" in names, is_open
        (True, False)
    """
    parameters = inspect.signature(build).parameters.values()
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = frozenset(parameter.name for parameter in parameters if parameter.kind not in rest)
    return names - {"params"}, any(parameter.kind == rest[1] for parameter in parameters)


def refuse_unknown(settings: Collection[str], what: str, known: Collection[str]) -> None:
    """Refuse a setting that is not known.

    Raises:
        ConfigError: with the nearest name.
    """
    for key in settings:
        if key not in known:
            raise ConfigError(unknown_name(key, what, known))


def _loaded(point: EntryPoint) -> Build:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"optimizer {point.name!r} is registered as {point.value}, which cannot be loaded: {error}; "
            f"mend or uninstall the package that registers it"
        ) from error
