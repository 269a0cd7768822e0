"""The verbs `generate` and `export`: what a trained model writes, and its weights as others read them."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from hardy.cli.failure import SUCCESS
from hardy.cli.output import print_json
from hardy.cli.parser import Parser
from hardy.config import UserError
from hardy.train.folder import RunFolder

if TYPE_CHECKING:
    from torch import nn

    from hardy.data.tokenizer import Tokenizer
    from hardy.train.manifest import Checkpoint


def add_generate(parser: Parser) -> None:
    """Add the options of `hardy generate`."""
    parser.add_argument(
        "source", type=Path, metavar="RUN|FOLDER", help="run folder, or a Hugging Face Llama folder"
    )
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="what the text begins with; may be empty"
    )
    parser.add_argument(
        "--tokens", type=int, default=128, metavar="N", help="most tokens to add (default: 128)"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest with this share")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    _add_common(parser)


def add_export(parser: Parser) -> None:
    """Add the options of `hardy export`."""
    parser.add_argument("source", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty")
    _add_common(parser)


def _add_common(parser: Parser) -> None:
    parser.add_argument(
        "--step", type=int, metavar="N", help="take the checkpoint of this step, not the newest"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def generate_verb(arguments: argparse.Namespace) -> int:
    """Run `hardy generate`."""
    if arguments.tokens < 1:
        raise UserError(f"--tokens must be at least 1, got {arguments.tokens}")
    is_foreign = is_hugging_face(arguments.source)
    if is_foreign and arguments.step is not None:
        raise UserError(f"{arguments.source} is no run and has no checkpoints; leave --step out")
    model, tokenizer = (
        load_folder(arguments.source) if is_foreign else load_run(arguments.source, arguments.step)
    )
    from hardy.model.generate import generate
    from hardy.train.device import choose_hardware

    model.to(choose_hardware("auto", "auto").device)
    prompt_ids = [tokenizer.begin_id, *tokenizer.encode([arguments.prompt])[0]]
    new_ids = generate(
        model,
        prompt_ids,
        max_new_tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        stop_ids=[tokenizer.end_id],
        seed=arguments.seed,
    )
    text = tokenizer.decode(new_ids)
    if arguments.json:
        print_json({"prompt": arguments.prompt, "text": text, "tokens": new_ids})
    else:
        print(arguments.prompt + text)
    return SUCCESS


def export_verb(arguments: argparse.Namespace) -> int:
    """Run `hardy export`."""
    model, tokenizer = load_run(arguments.source, arguments.step)
    from hardy.model.convert import export_folder
    from hardy.model.decoder import Decoder

    if not isinstance(model, Decoder):
        raise UserError(
            f"{arguments.source} trained a model of its own architecture; only hardy's is exported"
        )
    export_folder(
        model,
        arguments.out,
        tokenizer_files=sorted((arguments.source / "tokenizer").glob("*.json")),
        special_ids={"bos": tokenizer.begin_id, "eos": tokenizer.end_id},
    )
    if arguments.json:
        print_json({"folder": arguments.out})
    else:
        print(f"written: {arguments.out}")
    return SUCCESS


def load_run(run_dir: Path, step: int | None) -> "tuple[nn.Module, Tokenizer]":
    """Return the model of a run at a checkpoint, the newest unless `step` is given, and its tokenizer.

    Raises:
        UserError: there is no run, no such checkpoint, or it is damaged.
    """
    config = RunFolder(run_dir).read_config()
    from hardy.data.tokenizer import load_tokenizer
    from hardy.model.build import build_model
    from hardy.train.storage import load_model_tensors

    checkpoint = find_checkpoint(run_dir, step)
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    model = build_model(config.model, vocab_size=tokenizer.vocab_size, device="cpu")
    model.load_state_dict(load_model_tensors(checkpoint))
    return model, tokenizer


def find_checkpoint(run_dir: Path, step: int | None) -> "Checkpoint":
    """Return the checkpoint of `step`, or the newest good one."""
    from hardy.train.manifest import newest_good, sound, step_folder, verify

    root = run_dir / "checkpoints"
    if step is None:
        found, _ = newest_good(root) if root.is_dir() else (None, [])
        if found is None:
            raise UserError(f"{run_dir} has no checkpoint yet; `hardy resume {run_dir}` trains on")
        return found
    if not (root / step_folder(step)).is_dir():
        steps = ", ".join(str(checkpoint.step) for checkpoint in sound(root)) if root.is_dir() else ""
        raise UserError(f"{run_dir} has no checkpoint of step {step}; there are: {steps or 'none'}")
    return verify(root / step_folder(step))


def load_folder(folder: Path) -> "tuple[nn.Module, Tokenizer]":
    """Return the model and tokenizer of a Hugging Face Llama folder.

    Raises:
        UserError: the folder is not complete, or holds another architecture.
    """
    from functools import partial

    import torch

    from hardy.data.tokenizer import load_tokenizer
    from hardy.model.convert import import_folder
    from hardy.model.decoder import Decoder
    from hardy.ops.attention import packed_attention

    found = import_folder(folder)
    with torch.device("meta"):
        model = Decoder(found.shape, attention=partial(packed_attention, backend="auto"))
    model.load_state_dict(dict(found.tensors()), assign=True)
    return model.float(), load_tokenizer(folder)


def is_hugging_face(folder: Path) -> bool:
    """Whether config.json is a model's, not a run's."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "architectures" in config or "model_type" in config
