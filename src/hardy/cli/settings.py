"""From words on a command line to a checked run: a recipe or a TOML file, then `--section.name value`."""

import dataclasses
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardy.config import (
    ConfigError,
    Setting,
    from_dict,
    keep_known,
    override,
    parse_dotted,
    read_toml,
    settings_of,
    to_dict,
    unknown_name,
)
from hardy.recipes.table import RECIPES, recipe
from hardy.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A run as asked for."""

    name: str
    """The recipe's name, or the file's without its ending; names the run folder."""
    config: TrainConfig


_WIDTH = 130
"""Columns of a line of the list of settings."""


def resolve(target: str, arguments: Sequence[str] = ()) -> Resolved:
    """Return the run that `target` names, with the `--section.name value` pairs of `arguments` laid over it.

    Args:
        target: a recipe, or the path of a TOML file, which may name a recipe as its base: `recipe = "tiny"`.
        arguments: pairs as typed; later ones win.

    Example:
        >>> resolve("tiny", ["--optim.lr", "0.01"]).config.optim.lr
        0.01

    Raises:
        ConfigError: a name is unknown or a value refused.
    """
    if target.endswith(".toml") or ("/" in target and Path(target).is_file()):
        name, config = Path(target).stem, _from_file(Path(target))
    elif target.replace("-", "_") in RECIPES:
        name, config = target.replace("-", "_"), recipe(target)
    else:
        raise ConfigError(unknown_name(target, "recipe", RECIPES) + "; or give the path of a .toml file")
    return Resolved(name=name, config=change(config, parse_dotted(arguments)))


def change(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """Return `config` with `changes` laid over it; switching a choice keeps what the new one shares.

    Raises:
        ConfigError: a setting is unknown or a value refused.
    """
    changes = override({}, changes)
    base = keep_known(TrainConfig, to_dict(config), chosen=changes)
    try:
        return from_dict(TrainConfig, override(base, changes))
    except ConfigError as error:
        raise ConfigError(_misplaced(changes, error) or str(error)) from None


def _from_file(path: Path) -> TrainConfig:
    """Read a TOML file over its base."""
    data = read_toml(path)
    base = data.pop("recipe", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"recipe in {path} must be the name of a recipe, got {base!r}")
    try:
        return change(TrainConfig() if base is None else recipe(base), data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _misplaced(changes: Mapping[str, Any], error: ConfigError) -> str | None:
    """Return a better text than `error` for a setting of another section, or of a variant not chosen."""
    settings = list(settings_of(TrainConfig))
    for path in _paths(changes):
        refusal = f"there is no setting {path!r}"
        if not str(error).startswith(refusal):
            continue
        variants = [setting.when for setting in settings if setting.path == path]
        if variants:
            return f"{refusal} here; it belongs to {' and '.join(variants)}"
        leaf = path.rpartition(".")[2]
        others = sorted(setting.path for setting in settings if setting.path.rpartition(".")[2] == leaf)
        if others:
            return f"{refusal}; did you mean {others[0]!r}?"
    return None


def _paths(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def settings_text(recipes_only: bool = False) -> str:
    """Return the recipes and all settings as `hardy train --help` shows them."""
    width = max(map(len, RECIPES))
    lines = ["recipes:"]
    for name, build in RECIPES.items():
        lines.append(f"  {name:<{width}}  {(build.__doc__ or '').strip().splitlines()[0]}")
    if recipes_only:
        return "\n".join(lines)
    lines += ["", "settings, given as --section.name value; in a TOML file as [section] name = value:"]
    for setting in merged(settings_of(TrainConfig)):
        default = "required" if setting.default is dataclasses.MISSING else as_words(setting.default)
        line = f"  --{setting.path} ({setting.allowed}; default {default})"
        only = f"[{setting.when}]" if setting.when else ""
        if len(line + only) < 110:
            lines.append(f"{line} {only}".rstrip())
        else:
            wrapped = textwrap.wrap(line, _WIDTH, subsequent_indent="      ", break_long_words=False)
            wrapped[0] = "  " + wrapped[0].lstrip()
            lines += [*wrapped, f"      {only}"] if only else wrapped
        lines += [f"      {line}" for line in setting.doc.splitlines()]
    return "\n".join(lines)


def merged(settings: Iterable[Setting]) -> list[Setting]:
    """Return each setting once, with all choices that have it; none where every variant has it alike."""
    settings = list(settings)
    variants = list(dict.fromkeys(setting.when for setting in settings if setting.when))
    same: dict[tuple[str, ...], list[Setting]] = {}
    for setting in settings:
        key = (setting.path, setting.allowed, as_words(setting.default), setting.doc)
        same.setdefault(key, []).append(setting)
    result: list[Setting] = []
    for alike in same.values():
        choice = alike[0].when.partition("=")[0]
        among = [when for when in variants if when.partition("=")[0] == choice]
        names = list(dict.fromkeys(setting.when.partition("=")[2] for setting in alike))
        if choice == alike[0].path:  # the setting that chooses
            if any(setting.path == choice for setting in result):
                continue
            every = ", ".join(variant.partition("=")[2] for variant in among)
            alike, names = (
                [dataclasses.replace(alike[0], allowed=f"one of {every}")],
                [when for when in among],
            )
        when = "" if not choice or len(names) == len(among) else f"{choice}={', '.join(names)}"
        result.append(dataclasses.replace(alike[0], when=when))
    return result


def as_words(value: Any) -> str:
    """Return a value as it is typed on the command line.

    Example:
        >>> [as_words(value) for value in (None, True, ("a", "b"), 0.1, ())]
        ['none', 'true', 'a,b', '0.1', "''"]
    """
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(as_words(item) for item in value) or "''"
    return str(value)
