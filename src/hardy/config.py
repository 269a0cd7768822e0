"""Configuration: nested frozen dataclasses, checked when built; to and from dicts, TOML, dotted overrides.

A component writes its settings as a subclass of `Config`; limits stand in the annotations, and a string under
each field documents it. Every refusal is a `ConfigError` that names the setting's path, the value, what is
allowed and, for a name nobody knows, the nearest name that exists. Standard library only, so it imports fast.
"""

import ast
import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeGuard, TypeVar, Union


class UserError(ValueError):
    """Something the user gave cannot work; the text says what and the way out. Shown without a traceback."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or out of range."""


def reason_of(error: Exception) -> str:
    """Return why something failed, in words; of what the system says without its number and the file.

    Example:
        >>> reason_of(FileNotFoundError(2, "No such file or directory", "x.json"))
        'No such file or directory'
    """
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@dataclass(frozen=True, kw_only=True)
class Range:
    """Limits of a number, to stand in an annotation: `Annotated[float, Range(above=0)]`."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        """Whether `value` lies within; NaN never does."""
        return (
            not math.isnan(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """Return the limits in words, such as "at least 0 and below 1"; infinity goes without saying."""
        words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
        limits = ((text, getattr(self, key)) for key, text in words.items())
        return " and ".join(f"{text} {limit:g}" for text, limit in limits if limit not in (None, math.inf))


PositiveInt = Annotated[int, Range(least=1)]
NonNegativeInt = Annotated[int, Range(least=0)]
PositiveFloat = Annotated[float, Range(above=0, below=math.inf)]
NonNegativeFloat = Annotated[float, Range(least=0, below=math.inf)]
UnitFloat = Annotated[float, Range(least=0, most=1)]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all settings: checks types and limits of its own fields when built.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Meeting(Config):
        ...     section: ClassVar[str] = "meeting"
        ...     every_steps: PositiveInt = 8
        >>> Meeting(every_steps=0)
        Traceback (most recent call last):
        ...
        hardy.config.ConfigError: meeting.every_steps must be a whole number at least 1, got 0
    """

    section: ClassVar[str] = ""
    any_name_like: ClassVar[str] = ""
    """Of a variant that is chosen by many names: what they look like, such as "torch.optim.CLASS"; its `name`
    is text, and every name that begins as this one does up to its last dot belongs to it."""

    def __post_init__(self) -> None:
        """Check every field; subclasses add checks between fields and call this first."""
        for field, hint in _hints(type(self)).items():
            checked = _convert(getattr(self, field), hint, _join(self.section, field))
            object.__setattr__(self, field, checked)

    @classmethod
    def takes_name(cls, name: str) -> bool:
        """Whether this is the variant for `name`, one of many that look alike."""
        stem = cls.any_name_like.rpartition(".")[0] + "."
        return len(stem) > 1 and name.startswith(stem) and len(name) > len(stem)


class Text(str):
    """A value as typed on a command line, read by the type of the setting it lands in."""


ConfigT = TypeVar("ConfigT", bound=Config)
ClassT = TypeVar("ClassT")


def from_dict(cls: type[ConfigT], data: Mapping[str, Any], *, path: str = "") -> ConfigT:
    """Build `cls` from nested plain values; `path` is where `data` stands in the whole config.

    A table names only what is other than in the default of its setting, also where that default is a choice.

    Raises:
        ConfigError: a key is unknown, a required one missing, or a value refused.
    """
    if not _is_table(data):
        raise ConfigError(f"{path or 'the config'} must be a table of settings, got {data!r}")
    hints = _hints(cls)
    for key in data:
        if key not in hints:
            raise ConfigError(
                unknown_name(_join(path, str(key)), "setting", [_join(path, name) for name in hints])
            )
    for field in dataclasses.fields(cls):
        if field.name not in data and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{_join(path, field.name)} is required")
    defaults = {field.name: field for field in dataclasses.fields(cls)}
    values = {key: _over_default(value, defaults[key]) for key, value in data.items()}
    return cls(**{key: _convert(value, hints[key], _join(path, key)) for key, value in values.items()})


def _over_default(value: Any, field: "dataclasses.Field[Any]") -> Any:
    """Return a table laid over the table that is the default, unless it chooses another variant."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if not _is_table(value) or not isinstance(default, Config):
        return value
    name = getattr(default, "name", None)
    return override(to_dict(default), value) if value.get("name", name) == name else value


def to_dict(config: Config) -> dict[str, Any]:
    """Return the config as nested plain values, defaults included; `from_dict` takes it back."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {key: to_dict(value) if isinstance(value, Config) else value for key, value in values.items()}


def override(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data` with the dotted `changes` laid over it; later keys win, `data` is left alone.

    A table may be given at once (`{"optim": {"lr": 1e-3}}`) or by path (`{"optim.lr": 1e-3}`).
    """
    result = {key: override(value, {}) if _is_table(value) else value for key, value in data.items()}
    for dotted, value in changes.items():
        name, _, rest = dotted.partition(".")
        old = result.get(name)
        if rest:
            value = {rest: value}
        result[name] = override(old if _is_table(old) else {}, value) if _is_table(value) else value
    return result


def keep_known(cls: type[Config], data: Mapping[str, Any], *, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data` without what the newly `chosen` variants do not have.

    When an override switches `optim.name`, the recipe's settings that the new optimizer shares stay (learning
    rate, schedule) and the others go; what the user gave is never dropped, so a misspelling is refused.
    """
    result = dict(data)
    for name, hint in _hints(cls).items():
        value, given = result.get(name), chosen.get(name, {})
        if not _is_table(value) or not _is_table(given):
            continue
        variant = _variant(_members(hint), given.get("name", value.get("name")))
        if variant is not None:
            known = _hints(variant)
            shared = {key: item for key, item in value.items() if key in known}
            result[name] = keep_known(variant, shared, chosen=given)
    return result


def parse_dotted(arguments: Iterable[str]) -> dict[str, Any]:
    """Read `--a.b value` and `--a.b=value` pairs into nested tables of `Text`.

    Raises:
        ConfigError: a word is no option, or an option has no value.
    """
    changes: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        if not word.startswith("--") or "." not in word.split("=", 1)[0]:
            raise ConfigError(f"{word!r} is not a setting; settings are written --section.name value")
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise ConfigError(f"--{name} needs a value")
        changes = override(changes, {name.replace("-", "_"): Text(value)})
    return changes


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; a fault in it is a `ConfigError` with the line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"the config file {path} cannot be read: {reason_of(error)}") from None


def read_arguments(pairs: Iterable[str], *, setting: str) -> dict[str, Any]:
    """Return further arguments of a constructor, given as name=value; what is no Python literal is text.

    Args:
        pairs: such as "momentum=0.9".
        setting: where they were given, for the error.

    Example:
        >>> read_arguments(["momentum=0.9", "mode=fast"], setting="optim.arguments")
        {'momentum': 0.9, 'mode': 'fast'}

    Raises:
        ConfigError: one is no such pair.
    """
    arguments: dict[str, Any] = {}
    for text in pairs:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"{setting} must be name=value pairs, got {text!r}")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    return arguments


def unknown_name(name: str, kind: str, known: Iterable[str]) -> str:
    """Return the text that refuses `name` and says which name was probably meant."""
    known = sorted(known)
    shared = name.rpartition(".")[0] + "."
    if not all(other.startswith(shared) for other in known):
        shared = ""
    ends = [other.removeprefix(shared) for other in known]
    close = difflib.get_close_matches(name.removeprefix(shared), ends, n=1, cutoff=0.5)
    hint = f"; did you mean {shared + close[0]!r}?" if close else "."
    listed = f"Known: {', '.join(known)}" if known else "There are none"
    return f"there is no {kind} {name!r}{hint} {listed}"


def class_at(path: str, base: type[ClassT], *, kind: str) -> type[ClassT]:
    """Import and return the class at a dotted path.

    Args:
        path: of the class, with its module.
        base: what it must derive from.
        kind: what such a class is called in the text of a refusal.

    Raises:
        ConfigError: no such module, or no such class in it; the text says which is nearest.

    Example:
        >>> class_at("decimal.Rounded", ArithmeticError, kind="error").__name__
        'Rounded'
    """
    home, _, leaf = path.rpartition(".")
    if not home:
        raise ConfigError(f"{kind} {path!r}: give module.Class")
    try:
        module = importlib.import_module(home)
    except ImportError as error:
        raise ConfigError(
            f"{kind} {path!r}: the module {home} cannot be imported ({error}); give module.Class"
        ) from error
    classes = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base
    }
    if leaf not in classes:
        raise ConfigError(unknown_name(path, kind, [f"{home}.{name}" for name in classes]))
    return classes[leaf]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting as documentation shows it."""

    path: str
    allowed: str
    default: Any
    """`dataclasses.MISSING` where the setting is required."""
    doc: str
    when: str = ""
    """The choice that has this setting, such as "optim.name=adamw"; empty where there is no choice."""


def settings_of(cls: type[Config], *, path: str = "", when: str = "") -> Iterator[Setting]:
    """Yield every setting below `cls`, depth first, in the order of definition; each variant in turn."""
    docs = _field_docs(cls)
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        here, hint = _join(path, field.name), hints[field.name]
        variants = _variants(hint)
        for variant in variants:
            choice = f"{here}.name={_name_of(variant)}" if len(variants) > 1 else when
            yield from settings_of(variant, path=here, when=choice)
        if not variants:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            doc = docs.get(field.name, "")
            yield Setting(path=here, allowed=_allowed(hint), default=default, doc=doc, when=when)


def _convert(value: Any, hint: Any, path: str) -> Any:
    """Return `value` as the type `hint` wants it, or raise."""
    if isinstance(value, Text):
        value = _read_text(value, hint)
    variants = _variants(hint)
    if _is_table(value) and variants:
        variant = _variant(variants, value.get("name"))
        if variant is None:
            names = [_name_of(variant) for variant in variants]
            if "name" not in value:
                raise ConfigError(f"{path}.name is required, one of {', '.join(names)}")
            raise ConfigError(unknown_name(str(value["name"]), f"{path}.name", names))
        return from_dict(variant, value, path=path)
    for member in _members(hint):
        found, converted = _accept(value, member)
        if found:
            return converted
    got = f"the table {dict(value)!r}" if _is_table(value) else repr(value)
    raise ConfigError(f"{path} must be {_allowed(hint)}, got {got}" + _nearest_choice(value, hint))


def _accept(value: Any, member: Any) -> tuple[bool, Any]:
    """Return whether `value` fits one type and the value as that type."""
    origin, arguments = typing.get_origin(member), typing.get_args(member)
    if origin is Annotated:
        found, converted = _accept(value, arguments[0])
        return found and all(converted in limit for limit in arguments[1:]), converted
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments), value
    if origin is tuple:
        if not _is_list(value):
            return False, value
        parts = [_accept(item, arguments[0]) for item in value]
        return all(found for found, _ in parts), tuple(converted for _, converted in parts)
    if member is float and type(value) is int:
        return abs(value) <= sys.float_info.max, float(value) if abs(value) <= sys.float_info.max else value
    return type(value) is member or (_is_config(member) and isinstance(value, member)), value


def _read_text(text: str, hint: Any) -> Any:
    """Read a word of a command line as the type `hint` wants; left a string where nothing else fits."""
    kinds = [typing.get_args(m)[0] if typing.get_origin(m) is Annotated else m for m in _members(hint)]
    choices = {str(choice): choice for kind in kinds for choice in _choices(kind)}
    lists = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is tuple]
    if text in choices:
        return choices[text]
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            with contextlib.suppress(ValueError):
                return kind(text)
    if lists:
        return [_read_text(part.strip(), lists[0]) for part in text.split(",") if part.strip()]
    return str(text)


@functools.cache
def _hints(cls: type[Config]) -> dict[str, Any]:
    """Return the annotations of the fields, limits included, class variables left out."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the one type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_table(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def _is_list(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, list | tuple)


def _is_config(member: object) -> TypeGuard[type[Config]]:
    return isinstance(member, type) and issubclass(member, Config)


def _variants(hint: Any) -> list[type[Config]]:
    """Return the config classes among the alternatives of a union."""
    return [member for member in _members(hint) if _is_config(member)]


def _variant(members: Iterable[Any], name: object) -> type[Config] | None:
    """Return the config class among `members` whose `name` is `name`; the only class needs no name."""
    variants = [member for member in members if _is_config(member)]
    if len(variants) == 1:
        return variants[0]
    exact = next((variant for variant in variants if _name_of(variant) == name), None)
    if exact is not None:
        return exact
    return next((variant for variant in variants if variant.takes_name(str(name))), None)


def _name_of(variant: type[Config]) -> str:
    """Return the name by which a variant of a choice is chosen."""
    return variant.any_name_like or str(_choices(_hints(variant)["name"])[0])


def _choices(member: Any) -> tuple[Any, ...]:
    """Return the values a `Literal` allows; none for another type."""
    return typing.get_args(member) if typing.get_origin(member) is Literal else ()


def _allowed(hint: Any) -> str:
    """Say in words what a setting takes."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "none"}
    parts: list[str] = []
    for member in _members(hint):
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if origin is Annotated:
            limits = " and ".join(str(limit) for limit in arguments[1:])
            parts.append(f"{words[arguments[0]]} {limits}")
        elif origin is Literal:
            parts.append("one of " + ", ".join(map(str, arguments)))
        elif origin is tuple:
            parts.append("a list of " + _allowed(arguments[0]))
        else:
            parts.append("a table of settings" if _is_config(member) else words.get(member, str(member)))
    return " or ".join(parts)


def _nearest_choice(value: object, hint: Any) -> str:
    """Return "; did you mean ...?" where a word is close to one that is allowed."""
    kinds = [typing.get_args(m)[0] if typing.get_origin(m) is tuple else m for m in _members(hint)]
    choices = [str(choice) for kind in kinds for choice in _choices(kind)]
    words = [str(item) for item in (value if _is_list(value) else [value]) if str(item) not in choices]
    close = [match for word in words for match in difflib.get_close_matches(word, choices, n=1, cutoff=0.7)]
    return f"; did you mean {close[0]!r}?" if close else ""


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@functools.cache
def _field_docs(cls: type) -> Mapping[str, str]:
    """Return the string that stands under each field of a class, bases first."""
    docs = dict(_field_docs(cls.__mro__[1])) if _is_config(cls.__mro__[1]) else {}
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except OSError:  # defined where no source can be found, such as at a prompt
        return docs
    statements = body.body if isinstance(body, ast.ClassDef) else []
    for statement, below in zip(statements, statements[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                docs[statement.target.id] = inspect.cleandoc(str(below.value.value))
    return docs
