"""The command `hardy`: a table of verbs, and what its exit code means.

Nothing heavy is imported before a verb needs it, so that help and refusals come at once.
"""

import argparse
import errno
import hashlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from hardy.cli import failure
from hardy.cli.parser import Parser, split_settings
from hardy.config import UserError, unknown_name


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One verb; its module has `add_<verb>(parser)`, `<verb>_verb(arguments)` and perhaps `<verb>_help()`."""

    module: str
    about: str
    takes_settings: bool = False
    """Whether `--section.name value` is understood; the handler finds the words in `arguments.settings`."""


VERBS: dict[str, Verb] = {
    "train": Verb(module="train", about="train a recipe or a TOML file", takes_settings=True),
    "resume": Verb(module="train", about="go on with a run from its newest checkpoint", takes_settings=True),
    "generate": Verb(module="weights", about="let a trained model write"),
    "export": Verb(module="weights", about="write a run's model as a Hugging Face folder"),
    "import": Verb(
        module="imports", about="make a run folder of a Hugging Face Llama folder", takes_settings=True
    ),
    "plan": Verb(module="plan", about="say how much memory a run would take", takes_settings=True),
    "simulate": Verb(
        module="simulate",
        about="play strategies on a cluster that is described in a file",
        takes_settings=True,
    ),
    "compare": Verb(module="compare", about="put runs side by side: a table, figures, a page"),
    "reproduce": Verb(module="reproduce", about="run the repository's experiments again, and judge them"),
    "cite": Verb(module="cite", about="print the BibTeX of what a run used"),
    "probe": Verb(module="probe", about="ask which layer of a model knows what, by linear classifiers"),
    "local-steps": Verb(module="local_steps", about="say how many steps replicas should take alone"),
    "balance": Verb(module="balance", about="plan batches of mixed lengths, simulated, and profile a model"),
    "data": Verb(module="data", about="look at what a run would read", takes_settings=True),
    "doctor": Verb(module="doctor", about="say what this machine can do and what is missing"),
    "version": Verb(module="doctor", about="print the version"),
}


_ABOUT_THE_DISK = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS), "make room, or write elsewhere"
) | {errno.EACCES: "ask for the permission, or choose another place"}
"""What the system refuses to do with a file, and the way out: no fault of the program's."""


def run() -> None:
    """Entry point of the command."""
    for name in ("stdin", "stdout", "stderr"):  # in this order each gets its own number, also for workers
        if getattr(sys, name) is None:  # was closed, as by `hardy ... >&-`
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))
    logging.basicConfig(level=logging.WARNING, format="hardy: %(message)s")
    sys.exit(main(sys.argv[1:]))


def main(words: Sequence[str]) -> int:
    """Run the command line `words` and return its exit code, one of those in `failure`."""
    try:
        code = _obey(words)
        sys.stdout.flush()  # or a reader that went away would be noticed only by Python's own end
        return code
    except UserError as error:
        return _say(str(error), failure.USER_ERROR)
    except failure.CommandFailedError as error:
        return _say(str(error), failure.FAILURE)
    except KeyboardInterrupt:
        return _say("interrupted", failure.INTERRUPTED)
    except failure.Terminated:
        return _say("terminated", failure.TERMINATED)
    except (BrokenPipeError, SystemExit):  # rich makes the second of the first; nothing else here does
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or the flush at exit would fail again
        return failure.READER_GONE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _ABOUT_THE_DISK:
            where = f" ({error.filename})" if error.filename else ""
            return _say(f"{error.strerror}{where}; {_ABOUT_THE_DISK[error.errno]}", failure.FAILURE)
        traceback.print_exc()
        return _say(
            "this is a fault of hardy's own; please report it with the lines above, the command line and the "
            "output of `hardy doctor --json`",
            failure.FAILURE,
        )


def _obey(words: Sequence[str]) -> int:
    """Do what the command line asks for and return the exit code."""
    if not words or words[0] in ("--help", "-h", "help"):
        print(_help())
        return failure.SUCCESS if words else failure.USER_ERROR
    parsed = parse(words)
    return failure.SUCCESS if parsed is None else parsed[0](parsed[1])


def _say(text: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    if code == failure.USER_ERROR and _is_said(text):
        return code
    print(f"hardy: {text}" if rank == "0" else f"hardy (worker {rank}): {text}", file=sys.stderr)
    return code


def _is_said(text: str) -> bool:
    """Return whether another worker of this machine has said this; most refuse what all refuse."""
    folder = os.environ.get(failure.SAID)
    if folder is None:
        return False
    try:
        name = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        os.close(os.open(os.path.join(folder, name), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return True
    except OSError:  # better twice than never
        return False
    return False


def parse(words: Sequence[str]) -> tuple[Callable[[argparse.Namespace], int], argparse.Namespace] | None:
    """Return what the command line asks for, as a handler and its arguments; None when help was printed.

    Raises:
        UserError: a verb or option is unknown, or a word is missing.
    """
    name = {"--version": "version"}.get(words[0], words[0])
    if name not in VERBS:
        kind = "option" if name.startswith("-") else "verb"
        raise UserError(unknown_name(name, kind, [*VERBS, "--help", "--version"]) + " (see `hardy --help`)")
    verb = VERBS[name]
    module = import_module(f"hardy.cli.{verb.module}")
    stem = name.replace("-", "_")
    long_help = getattr(module, f"{stem}_help", None)
    parser = Parser(prog=f"hardy {name}", description=verb.about, long_help=long_help)
    getattr(module, f"add_{stem}")(parser)
    others, settings = split_settings(words[1:]) if verb.takes_settings else (words[1:], [])
    try:
        arguments = parser.parse(others, settings=_setting_paths if verb.takes_settings else list)
    except SystemExit:  # argparse ends so after printing help
        return None
    arguments.settings, arguments.words = settings, list(words)
    return getattr(module, f"{stem}_verb"), arguments


def _help() -> str:
    width = max(map(len, VERBS))
    return "\n".join(
        [
            "usage: hardy VERB ...",
            "",
            "Efficient and robust training of language models.",
            "",
            *(f"  {name:<{width}}  {verb.about}" for name, verb in VERBS.items()),
            "",
            "`hardy VERB --help` says more; `hardy train --help` lists all recipes and settings.",
        ]
    )


def _setting_paths() -> list[str]:
    from hardy.config import settings_of
    from hardy.train.config import TrainConfig

    return [setting.path for setting in settings_of(TrainConfig)]
