"""The verb `plan`: what a run would hold in memory, several optimizers side by side. Needs no torch."""

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardy.cli.dry_run import plan_lines
from hardy.cli.failure import SUCCESS
from hardy.cli.output import print_json
from hardy.cli.parser import Parser
from hardy.cli.settings import resolve, settings_text
from hardy.config import ConfigError, UserError, to_dict
from hardy.model.presets import HF_PREFIX, DecoderShape, resolve_shape
from hardy.optim.presets import PRESETS, check_kind, preset
from hardy.optim.table_text import aligned, bytes_text
from hardy.train.config import TrainConfig
from hardy.train.memory import Prediction, largest_fitting, predict
from hardy.train.parameter_memory import Choice, Held, Weight, decoder_weights, held_for
from hardy.train.plan import RunPlan, plan_run
from hardy.train.step_memory import Precision

OPTIMIZERS = "adamw,apollo,apollo_mini,smmf,qapollo,sgd"
GB = 10**9
PRECISIONS: dict[str, Precision] = {"fp32": "fp32", "bf16": "bf16", "bf16_pure": "bf16_pure"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One optimizer's line."""

    name: str
    held: Held
    needed_bytes: int
    """The peak, or with --params-only what parameters take."""
    fits: bool
    prediction: Prediction | None = None
    largest_micro_packs: int | None = None


def add_plan(parser: Parser) -> None:
    """Add the options of `hardy plan`."""
    parser.add_argument("target", metavar="RECIPE|FILE.toml", nargs="?", default="tiny", help="default: tiny")
    parser.add_argument(
        "--gpu-gb",
        type=float,
        default=80.0,
        metavar="GB",
        help="memory of one GPU in 10^9 bytes (default: 80)",
    )
    parser.add_argument(
        "--optimizers", metavar="A,B", help=f"rows of the table (default: {OPTIMIZERS}, and the run's own)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="default: as many as strategy.mesh says")
    parser.add_argument(
        "--precision", metavar="P", help="fp32, bf16 (autocast), bf16_pure (default: train.precision)"
    )
    parser.add_argument("--embed-kind", metavar="KIND", help="rule of embeddings (default: the optimizer's)")
    parser.add_argument(
        "--release", action="store_true", help="apply and drop gradients one by one, for every optimizer"
    )
    parser.add_argument("--params-only", action="store_true", help="leave activations out; takes hf:PATH too")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, in bytes")


def plan_help() -> str:
    """Return the recipes."""
    return settings_text(recipes_only=True) + "\n\nSettings such as --train.micro_packs 1 may follow."


def plan_verb(arguments: argparse.Namespace) -> int:
    """Run `hardy plan`."""
    config = resolve(arguments.target, arguments.settings).config
    choices = list(_choices(config, arguments))
    mesh = config.strategy.mesh
    workers = arguments.workers if arguments.workers is not None else (mesh.replicas or 1) * mesh.shards
    if workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}")
    if arguments.gpu_gb <= 0:
        raise UserError(f"--gpu-gb must be above 0, got {arguments.gpu_gb:g}")
    sizes = plan_run(config, num_workers=workers)
    rows, refused = _rows(config, choices, sizes, arguments)
    if arguments.json:
        print_json(_as_json(arguments, sizes, rows, refused))
    else:
        print("\n".join(_as_text(arguments, sizes, rows)))
        print("".join(f"{reason}\n" for reason in refused.values()), end="")
    return SUCCESS


def _choices(config: TrainConfig, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the keywords of each row's `Choice` that do not depend on the workers, names checked."""
    device = "cpu" if config.train.device == "cpu" else "cuda"
    by_config = "bf16" if device == "cuda" and config.train.precision != "fp32" else "fp32"
    precision = PRECISIONS.get(arguments.precision or by_config)
    if precision is None:
        known = ", ".join(PRECISIONS)
        raise UserError(f"--precision must be one of {known}, got {arguments.precision!r}")
    if arguments.embed_kind is not None:
        check_kind(arguments.embed_kind)
    own = {key: value for key, value in to_dict(config.optim).items() if not isinstance(value, Mapping)}
    names = [name.strip().replace("-", "_") for name in (arguments.optimizers or OPTIMIZERS).split(",")]
    if arguments.optimizers is None and own["name"] in PRESETS and own["name"] not in names:
        names.append(own["name"])
    for name in names:
        preset(name)
        settings = own if own["name"] == name else {}
        yield {
            "optimizer": name,
            "settings": settings,
            "embed_kind": arguments.embed_kind or settings.get("embed_kind"),
            "precision": precision,
            "release": True if arguments.release else None,
            "device": device,
        }


def _rows(
    config: TrainConfig, choices: list[dict[str, Any]], sizes: RunPlan, arguments: argparse.Namespace
) -> tuple[list[Row], dict[str, str]]:
    """Return the lines, and why others cannot be; refuse if none can."""
    shape, weights = _model(config, params_only=arguments.params_only)
    rows: list[Row] = []
    refused: dict[str, str] = {}
    for keywords in choices:
        try:
            choice = Choice(**keywords, replicas=sizes.replicas, shards=sizes.shards)
            held = held_for(weights, choice)
        except ConfigError as error:
            refused[keywords["optimizer"]] = str(error)
            continue
        if shape is None or arguments.params_only:
            needed = held.weights + held.gradients + held.state + held.beside
            fits = needed <= arguments.gpu_gb * GB
            rows.append(Row(name=choice.optimizer, held=held, needed_bytes=needed, fits=fits))
        else:
            rows.append(_step_row(config, shape, choice, sizes, limit_bytes=arguments.gpu_gb * GB))
    if not rows:
        raise ConfigError("; ".join(refused.values()))
    return rows, refused


def _step_row(
    config: TrainConfig, shape: DecoderShape, choice: Choice, sizes: RunPlan, *, limit_bytes: float
) -> Row:
    """Return the line of one optimizer, with the largest micro-batch that fits."""

    def of(packs: int) -> Prediction:
        return predict(
            shape,
            choice,
            tokens=packs * config.data.pack_tokens,
            micro_batches=sizes.micro.count,
            recompute=config.model.recompute,
        )

    here = of(sizes.micro.packs)
    return Row(
        name=choice.optimizer,
        held=here.held,
        needed_bytes=here.peak_bytes,
        fits=here.peak_bytes <= limit_bytes,
        prediction=here,
        largest_micro_packs=largest_fitting(lambda packs: of(packs).peak_bytes <= limit_bytes),
    )


def _model(config: TrainConfig, *, params_only: bool) -> tuple[DecoderShape | None, list[Weight]]:
    """Return the decoder's sizes, none for a foreign model, and the parameters."""
    name = config.model.name
    if name.startswith(HF_PREFIX):
        if not params_only:
            raise UserError(
                f"model.name={name}: the activations of a foreign model are not known; add --params-only, or "
                f"plan a preset of its sizes"
            )
        return None, _foreign_weights(Path(name.removeprefix(HF_PREFIX)))
    from hardy.data.tokenizer import bpe_size, open_tokenizer  # imports numpy

    tokenizer = config.data.tokenizer
    rows = bpe_size(tokenizer) or open_tokenizer(tokenizer).vocab_size
    shape = resolve_shape(config.model, vocab_size=rows)
    return shape, decoder_weights(shape)


def _foreign_weights(path: Path) -> list[Weight]:
    """Return the parameters of a Hugging Face model, built from its config without memory."""
    if not (path / "config.json").is_file():
        raise UserError(
            f"model.name=hf:{path}: there is no {path / 'config.json'}; give a local model folder"
        )
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"model.name=hf:PATH needs transformers ({error}); install it by pip install 'hardy[hf]'"
        ) from None
    import torch

    from hardy.optim.routing import route_params
    from hardy.train.parameter_memory import routed_weights

    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_config(config)
    return routed_weights(route_params(model))


def _as_text(arguments: argparse.Namespace, sizes: RunPlan, rows: list[Row]) -> Iterator[str]:
    """Yield the lines of the table and what stands around it."""
    yield from plan_lines(sizes)[:3]
    yield ""
    if rows[0].prediction is None:
        heading = ("optimizer", "weights", "gradients", "state", "together", "fits")
        table = [_parameter_cells(row) for row in rows]
        yield aligned([heading, *table], words=1)
        return
    heading = (
        *("optimizer", "weights", "gradients", "state", "activations", "other"),
        *("peak", "fits", "micro-batch"),
    )
    yield aligned([heading, *(_step_cells(row) for row in rows)], words=1)
    yield ""
    yield "this is what stands in memory of each worker at the fullest moment of a step:"
    moments: dict[str, list[str]] = {}
    for row in rows:
        moments.setdefault(row.prediction.peak_at if row.prediction else "", []).append(row.name)
    yield from (f"  {moment} ({', '.join(names)})" for moment, names in moments.items())
    yield f"fits: into {arguments.gpu_gb:g} GB; micro-batch: the most packs at once that do"
    yield "other: the loss, copies of weights in another type or place, temporaries"


def _parameter_cells(row: Row) -> tuple[str, ...]:
    sizes = (row.held.weights, row.held.gradients, row.held.state, row.needed_bytes)
    return row.name, *map(bytes_text, sizes), "yes" if row.fits else "no"


def _step_cells(row: Row) -> tuple[str, ...]:
    assert row.prediction is not None, "a row of --params-only"
    held = row.prediction.at_peak
    shown = [held["weights"], held["gradients"], held["state"], held["activations"]]
    other = row.needed_bytes - sum(shown)
    cells = map(bytes_text, (*shown, other, row.needed_bytes))
    packs = f"{row.largest_micro_packs:,}" if row.largest_micro_packs else "none"
    return row.name, *cells, "yes" if row.fits else "no", packs


def _as_json(
    arguments: argparse.Namespace, sizes: RunPlan, rows: list[Row], refused: Mapping[str, str]
) -> dict[str, Any]:
    """Return everything as plain values."""
    return {
        "gpu_bytes": round(arguments.gpu_gb * GB),
        "plan": dataclasses.asdict(sizes),
        "optimizers": {row.name: _row_as_json(row) for row in rows},
        "refused": dict(refused),
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    held = {f"{key}_bytes": value for key, value in dataclasses.asdict(row.held).items()}
    if row.prediction is None:
        return {**held, "together_bytes": row.needed_bytes, "fits": row.fits}
    return {
        **held,
        "peak_bytes": row.needed_bytes,
        "peak_at": row.prediction.peak_at,
        "at_peak_bytes": dict(row.prediction.at_peak),
        "fits": row.fits,
        "largest_micro_packs": row.largest_micro_packs,
    }
