"""The verb `import`: a Hugging Face Llama folder becomes a run folder to go on with."""

import argparse
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hardy.cli.environment import cache_dir
from hardy.cli.failure import SUCCESS
from hardy.cli.output import print_json
from hardy.cli.parser import Parser
from hardy.cli.settings import change, resolve, settings_text
from hardy.config import UserError, parse_dotted

if TYPE_CHECKING:
    from hardy.model.presets import DecoderShape

DECIDED = ("name", "shape", "vocab_size", "context_tokens")
"""Settings of the model that the folder decides."""


def add_import(parser: Parser) -> None:
    """Add the options of `hardy import`."""
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="Hugging Face Llama folder with its tokenizer"
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder to make")
    parser.add_argument(
        "--recipe", default="tiny", metavar="RECIPE|FILE.toml", help="all else (default: tiny)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def import_help() -> str:
    """Return the recipes."""
    return (
        settings_text(recipes_only=True) + "\n\nSettings such as --data.source files:'docs/*.md' may follow."
    )


def import_verb(arguments: argparse.Namespace) -> int:
    """Run `hardy import`."""
    given = parse_dotted(arguments.settings)
    refused = [name for name in DECIDED if name in given.get("model", {})]
    if refused:
        raise UserError(f"model.{refused[0]} cannot be set here: {arguments.folder} decides; leave it out")
    config = resolve(arguments.recipe).config
    from hardy.model.convert import import_folder
    from hardy.train.imported import start_from
    from hardy.train.run import Surroundings

    found = import_folder(arguments.folder)
    config = change(config, {"data.tokenizer": str(arguments.folder.resolve()), "model": _model(found.shape)})
    around = Surroundings(
        cache_dir=cache_dir(config.data.cache_dir, os.environ), command=["hardy", *arguments.words]
    )
    weights = {name: tensor.float() for name, tensor in found.tensors()}
    start_from(weights, change(config, given), arguments.run_dir, around)
    if arguments.json:
        print_json({"run_dir": arguments.run_dir})
    else:
        print(f"written: {arguments.run_dir}; go on with: hardy resume {arguments.run_dir}")
    return SUCCESS


def _model(shape: "DecoderShape") -> Mapping[str, Any]:
    """Return the settings of the model that give it this shape."""
    sizes = dataclasses.asdict(shape)
    rows, context_tokens = sizes.pop("vocab_size"), sizes.pop("context_tokens")
    return {"vocab_size": rows, "context_tokens": context_tokens, "shape": sizes}
