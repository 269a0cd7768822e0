"""The verb `probe`: which layer of a language model knows what, read by linear classifiers."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hardy.cli.failure import SUCCESS
from hardy.cli.output import print_json
from hardy.cli.parser import Parser
from hardy.config import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hardy.cli.probe_layers import LayerScores
    from hardy.cli.probe_tasks import Examples
    from hardy.data.tokenizer import Tokenizer


def add_probe(parser: Parser) -> None:
    """Add the options of `hardy probe`."""
    parser.add_argument("source", type=Path, metavar="RUN|FOLDER", help="run folder, or Hugging Face folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--labels",
        type=Path,
        metavar="FILE.jsonl",
        help='lines of {"text": "...", "label": "...", "group": "..."}; a group (an author, a file, ...; '
        "optional) stays on one side of the split",
    )
    what.add_argument("--task", metavar="NAME", help="a built-in question, listed below")
    parser.add_argument(
        "--pool",
        choices=["mean", "last"],
        default="mean",
        help="a text's vector: the mean over its tokens, or the last one (default: mean)",
    )
    parser.add_argument(
        "--examples", type=int, default=1000, metavar="N", help="most texts of a --task (default: 1000)"
    )
    parser.add_argument(
        "--tokens", type=int, default=256, metavar="N", help="most tokens of a text (default: 256)"
    )
    parser.add_argument(
        "--test-share", type=float, default=0.25, metavar="Q", help="texts to test on (default: 0.25)"
    )
    parser.add_argument(
        "--max-iter", type=int, default=1000, metavar="N", help="most steps of a probe (default: 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split and the draw of texts (default: 0)")
    parser.add_argument(
        "--step", type=int, metavar="N", help="take the checkpoint of this step, not the newest"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def probe_help() -> str:
    """Return the built-in tasks."""
    from hardy.cli.probe_tasks import TASKS

    return "\n".join(["tasks:", *(f"  {name:<10} {about}" for name, (_, about) in TASKS.items())])


def probe_verb(arguments: argparse.Namespace) -> int:
    """Run `hardy probe`."""
    _check(arguments)
    _check_scikit_learn()
    from hardy.cli.probe_split import split_by_group

    examples = _examples(arguments)
    split = split_by_group(
        examples.labels, examples.groups, test_share=arguments.test_share, seed=arguments.seed
    )
    model, tokenizer = _load(arguments.source, arguments.step)
    from hardy.cli.probe_layers import majority_accuracy, probe_layers

    vectors_NLD, num_cut = vectors_of(
        model, tokenizer, examples.texts, pool=arguments.pool, most_tokens=arguments.tokens
    )
    scores = probe_layers(vectors_NLD, examples.labels, split, max_iter=arguments.max_iter)
    result = {
        "classes": len(set(examples.labels)),
        "train_texts": len(split.train),
        "test_texts": len(split.test),
        "train_groups": split.num_train_groups,
        "test_groups": split.num_test_groups,
        "cut_texts": num_cut,
        "majority_accuracy": majority_accuracy(examples.labels, split),
        "layers": [dataclasses.asdict(score) for score in scores],
        "best_layer": max(scores, key=lambda score: score.ours.accuracy).layer,
        "best_layer_scikit_learn": max(scores, key=lambda score: score.theirs.accuracy).layer,
    }
    if arguments.json:
        print_json(result)
    else:
        print(table(scores, result))
    return SUCCESS


def vectors_of(
    model: "nn.Module", tokenizer: "Tokenizer", texts: list[str], *, pool: Any, most_tokens: int
) -> "tuple[Tensor, int]":
    """Return the vectors of all texts and layers, and how many texts were cut.

    Raises:
        UserError: a text has no token.
    """
    from hardy.linear.hidden import hidden_vectors
    from hardy.model.decoder import unit_names
    from hardy.train.device import choose_hardware

    context_tokens = getattr(model, "context_tokens", None) or most_tokens + 1
    limit = min(most_tokens, context_tokens - 1)  # one for the begin token
    documents = tokenizer.encode(texts)
    for place, document in enumerate(documents):
        if not document:
            raise UserError(f"text {place + 1} ({texts[place]!r}) has no tokens; remove it")
    model.to(choose_hardware("auto", "auto").device)
    vectors_NLD = hidden_vectors(
        model,
        unit_names(model),
        [document[:limit] for document in documents],
        begin_id=tokenizer.begin_id,
        pool=pool,
    )
    if not bool(vectors_NLD.isfinite().all()):
        raise UserError("the model's hidden states hold NaN or Inf; choose another checkpoint by --step")
    return vectors_NLD, sum(len(document) > limit for document in documents)


def table(scores: "list[LayerScores]", result: dict[str, Any]) -> str:
    """Return the result as text."""
    lines = [
        f"{result['train_texts']} texts of {result['train_groups']} groups to train, "
        f"{result['test_texts']} of {result['test_groups']} to test, {result['classes']} classes"
        + (f"; {result['cut_texts']} texts were cut" if result["cut_texts"] else ""),
        "",
        f"{'':<10}  {'normalised logistic regression':^30}  {'scikit-learn':^30}",
        f"{'layer':<10}" + f"  {'accuracy':>9} {'iterations':>11} {'s':>8}" * 2,
    ]
    for score in scores:
        cells = ""
        for one in (score.ours, score.theirs):
            iterations = f"{one.iterations}{'' if one.converged else '*'}"
            cells += f"  {one.accuracy:>9.3f} {iterations:>11} {one.seconds:>8.2f}"
        lines.append(f"{score.layer:<10}{cells}")
    lines += [
        f"{'majority':<10}  {result['majority_accuracy']:>9.3f}",
        "",
        f"known best by layer: {result['best_layer']} ({result['best_layer_scikit_learn']} by scikit-learn)",
    ]
    if not all(one.converged for score in scores for one in (score.ours, score.theirs)):
        lines.append("* ours: training texts are not separated; scikit-learn's: ended by --max-iter")
    return "\n".join(lines)


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (("examples", 4), ("tokens", 1), ("max_iter", 1)):
        if getattr(arguments, name) < least:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} must be at least {least}, got {getattr(arguments, name)}")
    if not 0 < arguments.test_share < 1:
        raise UserError(f"--test-share must be above 0 and below 1, got {arguments.test_share:g}")


def _check_scikit_learn() -> None:
    """Refuse before a model is loaded."""
    from importlib.util import find_spec

    if find_spec("sklearn") is None:
        raise UserError("hardy probe needs scikit-learn; install it by pip install 'hardy[linear]'")


def _examples(arguments: argparse.Namespace) -> "Examples":
    """Return the texts that were asked for."""
    from hardy.cli.probe_tasks import TASKS, built_in, read_labels
    from hardy.config import unknown_name

    if arguments.labels is not None:
        found, where = read_labels(arguments.labels), f"--labels {arguments.labels}"
    else:
        if arguments.task not in TASKS:
            raise UserError(unknown_name(arguments.task, "task", TASKS))
        found = built_in(arguments.task, num_examples=arguments.examples, seed=arguments.seed)
        where = f"--task {arguments.task}"
    found.check(where=where)
    return found


def _load(source: Path, step: int | None) -> "tuple[nn.Module, Tokenizer]":
    """Return model and tokenizer: a Llama folder without transformers, any other Hugging Face folder with."""
    from hardy.cli.weights import is_hugging_face, load_folder, load_run

    if not is_hugging_face(source):
        return load_run(source, step)
    if step is not None:
        raise UserError(f"{source} is no run and has no checkpoints; leave --step out")
    from hardy.data.tokenizer import load_tokenizer
    from hardy.model.convert import shape_from_config

    try:
        shape_from_config(json.loads((source / "config.json").read_text(encoding="utf-8")), folder=source)
    except UserError:  # no Llama that the decoder computes
        from hardy.model.hf import HFCausalLM

        return HFCausalLM(source), load_tokenizer(source)
    return load_folder(source)
