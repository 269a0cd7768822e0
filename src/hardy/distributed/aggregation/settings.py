"""Checks the settings of rules, of what comes before them and of attacks: types and limits, as annotated."""

import dataclasses
import functools
import typing
from typing import Any

import numpy as np

from hardy.config import Config


def check_settings(part: Any, *, section: str) -> None:
    """Refuse a dataclass whose fields are not what their annotations say; call it in `__post_init__`.

    A number of numpy counts as the number of Python that it is, and a whole one as a number.

    Args:
        part: what has the settings; those that are given, not what it keeps to itself.
        section: whose they are, for the text.

    Raises:
        ConfigError: names the setting, what it may be and what it is.

    Example:
        >>> from hardy.config import PositiveInt
        >>> @dataclasses.dataclass(frozen=True)
        ... class Keep:
        ...     rows: PositiveInt
        ...     def __post_init__(self) -> None:
        ...         check_settings(self, section="keep")
        >>> Keep(1.0)
        Traceback (most recent call last):
        ...
        hardy.config.ConfigError: keep.rows must be a whole number at least 1, got 1.0
    """
    names = [field.name for field in dataclasses.fields(part) if field.init]
    given = {name: getattr(part, name) for name in names}
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
    checked = _config_of(type(part), section)(**plain)
    for name in names:
        object.__setattr__(part, name, getattr(checked, name))


@functools.cache
def _config_of(kind: type, section: str) -> type[Config]:
    """Return the class that checks what `kind` is given."""
    hints = typing.get_type_hints(kind, include_extras=True)
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    return dataclasses.make_dataclass(
        "Settings",
        [(name, hints[name]) for name in names],
        bases=(Config,),
        namespace={"section": section},
        frozen=True,
        kw_only=True,
    )
