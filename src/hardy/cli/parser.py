"""argparse as hardy wants it: errors as exceptions, nearest names, settings kept apart from options."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from hardy.config import UserError, unknown_name

_NUMBERS: dict[Any, str] = {int: "a whole number", float: "a number"}
_NO_VALUE = re.compile(r": expected (one|at least one) argument$")
"""How argparse ends the refusal of an option that stands alone."""


class Parser(argparse.ArgumentParser):
    """A parser that raises `UserError` instead of ending the process, and may add long help on demand."""

    def __init__(self, *args: Any, long_help: Callable[[], str] | None = None, **kwargs: Any) -> None:
        super().__init__(
            *args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )
        self._long_help = long_help

    def format_help(self) -> str:
        """Return the usual help with the long part below it."""
        return super().format_help() + (f"\n{self._long_help()}\n" if self._long_help else "")

    def print_help(self, file: Any = None) -> None:
        """Print the help; unlike argparse's own it says when the reader went away."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print, in our words where they are plainer."""
        text = message.removeprefix("argument ")
        raise UserError(f"{_NO_VALUE.sub(' needs a value', text)} (see `{self.prog} --help`)")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as refusal:
            if action.type not in _NUMBERS:
                raise
            self.error(f"{refusal.argument_name} must be {_NUMBERS[action.type]}, got {arg_string!r}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            kind = action.option_strings[-1] if action.option_strings else action.dest
            self.error(unknown_name(str(value), kind, map(str, action.choices)))

    def parse(
        self, words: Sequence[str], *, settings: Callable[[], Sequence[str]] = list
    ) -> argparse.Namespace:
        """Parse all of `words`; an unknown option is refused with the nearest that exists.

        Args:
            words: the command line after the verb.
            settings: returns the paths of settings, which an unknown option may have meant.
        """
        arguments, unknown = self.parse_known_args(words)
        for word in unknown:
            name = word.split("=", 1)[0]
            if name.startswith("-"):
                raise UserError(self._unknown_option(name, settings()))
        if unknown:
            raise UserError(f"{unknown[0]!r} is one word too many (see `{self.prog} --help`)")
        return arguments

    def _unknown_option(self, name: str, settings: Sequence[str]) -> str:
        leaf = name.lstrip("-").replace("-", "_")
        meant = sorted(path for path in settings if path.rpartition(".")[2] == leaf)
        if meant:
            return f"there is no option {name!r}; did you mean the setting {'--' + meant[0]!r}?"
        options = [
            option for action in self._actions for option in action.option_strings if option[:2] == "--"
        ]
        return unknown_name(name, "option", options)


NAMED = ("--model", "--optim", "--strategy")
"""Sections that are chosen by name."""


def split_settings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (other words, settings): a setting is `--section.key value` or `--section.key=value`.

    `--strategy edit` is short for `--strategy.name edit`; so with model and optim.

    Example:
        >>> split_settings(["tiny", "--optim.lr", "0.1", "--json", "--train.steps=5"])
        (['tiny', '--json'], ['--optim.lr', '0.1', '--train.steps=5'])
        >>> split_settings(["tiny", "--strategy", "edit"])
        (['tiny'], ['--strategy.name', 'edit'])
    """
    others: list[str] = []
    settings: list[str] = []
    rest = iter(words)
    for given in rest:
        word = given
        name, equals, value = word.partition("=")
        if name in NAMED:
            name += ".name"
            word = name + equals + value
        if word.startswith("--") and "." in name:
            settings.append(word)
            if not equals:
                settings += [value for value in [next(rest, None)] if value is not None]
        else:
            others.append(word)
    return others, settings
