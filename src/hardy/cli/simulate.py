"""The verb `simulate`: strategies side by side on a cluster that exists in a file only."""

import argparse
import ctypes
import dataclasses
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hardy.cli.environment import cache_dir
from hardy.cli.failure import SUCCESS
from hardy.cli.output import plain, print_json
from hardy.cli.parser import Parser
from hardy.cli.settings import as_words
from hardy.config import UserError, settings_of, to_dict
from hardy.optim.table_text import aligned
from hardy.train.simulate_config import EventConfig, SimulationConfig
from hardy.train.simulate_strategies import DEFAULT_STRATEGIES, STRATEGIES, Entry, Simulation, read_simulation

if TYPE_CHECKING:
    from hardy.train.simulate_result import StrategyResult

_M_ARENA_MAX = -8
"""From malloc.h."""


def add_simulate(parser: Parser) -> None:
    """Add the options of `hardy simulate`."""
    parser.add_argument("cluster", type=Path, metavar="CLUSTER.toml", help="workers, network, events, task")
    parser.add_argument(
        "--strategies",
        metavar="A,B",
        help=f"what to compare (default: those of the file, else {','.join(DEFAULT_STRATEGIES)})",
    )
    parser.add_argument(
        "--no-train",
        action="store_true",
        help="count time and bytes alone, without a model; thousands of workers",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write results.json, and curves.png where trained"
    )
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="where tokenised text lies (default: the user's cache)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def simulate_help() -> str:
    """Return the settings of clusters and tasks, and the names of strategies."""
    lines = [
        "settings, given as --cluster.name value or --task.name value; in CLUSTER.toml at the top, in [task]:"
    ]
    for setting in settings_of(SimulationConfig):
        path = setting.path if "." in setting.path else f"cluster.{setting.path}"
        if path != "cluster.events":
            lines.append(f"  --{path} ({setting.allowed}; default {as_words(setting.default)})")
            lines += [f"      {line}" for line in setting.doc.splitlines()]
    lines += ["", "what happens to single workers, each a table [[events]] in CLUSTER.toml:"]
    for setting in settings_of(EventConfig):
        lines.append(f"  {setting.path} ({setting.allowed})")
        lines += [f"      {line}" for line in setting.doc.splitlines()]
    lines += [
        "",
        f"strategies: {', '.join(STRATEGIES)}",
        "Settings such as --strategy.every_steps 16 go to every strategy that has them; `hardy train --help`",
        "lists them. Tables [[strategies]] in CLUSTER.toml give each its own, and a label.",
    ]
    return "\n".join(lines)


def simulate_verb(arguments: argparse.Namespace) -> int:
    """Run `hardy simulate`."""
    names = None if arguments.strategies is None else arguments.strategies.split(",")
    simulation = read_simulation(arguments.cluster, names=names, settings=arguments.settings)
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out {arguments.out} is a file; give a folder")
    _share_one_heap()
    started_s = time.perf_counter()
    entropy, simulate_one = _simulator(simulation, arguments)
    results: list[StrategyResult] = []
    for entry in simulation.entries:
        print(f"hardy: simulating {entry.label}", file=sys.stderr)
        results.append(simulate_one(entry))
    took_s = time.perf_counter() - started_s
    told = _as_json(simulation, results, took_s=took_s, entropy=entropy)
    written = _write(arguments.out, told, results)
    if arguments.json:
        print_json(told | {"files": written})
    else:
        print("\n".join(_as_text(simulation, results, took_s=took_s, entropy=entropy)))
        print("".join(f"wrote {path}\n" for path in written), end="")
    return SUCCESS


def _share_one_heap() -> None:
    """Let all threads allocate from one heap, where the C library is glibc.

    Simulated workers are threads that take turns. With a heap for each, what one frees is cold and idle while
    the next one works: a fifth more time.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _simulator(
    simulation: Simulation, arguments: argparse.Namespace
) -> tuple[float | None, Callable[[Entry], "StrategyResult"]]:
    """Return the loss of token frequencies alone, where text is read, and what simulates a strategy."""
    config = simulation.config
    if arguments.no_train:
        from hardy.train.simulate_costs import count_costs

        return None, lambda entry: count_costs(config, entry)
    from hardy.train.simulate import prepare_task, train_strategy

    task = prepare_task(config, cache_dir=cache_dir(arguments.cache_dir, os.environ))
    return task.unigram_entropy, lambda entry: train_strategy(config, entry, task)


def _as_json(
    simulation: Simulation, results: Sequence["StrategyResult"], *, took_s: float, entropy: float | None
) -> dict[str, Any]:
    config = to_dict(simulation.config)
    config["events"] = [dataclasses.asdict(event) for event in simulation.config.events]
    return {
        "cluster": config,
        "trained": entropy is not None,
        "unigram_entropy": entropy,
        "took_s": took_s,
        "strategies": [result.plain() for result in results],
    }


def _write(folder: Path | None, told: dict[str, Any], results: Sequence["StrategyResult"]) -> list[Path]:
    """Write what --out asks for and return the files."""
    if folder is None:
        return []
    import json

    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "results.json"
        path.write_text(json.dumps(plain(told), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror}") from None
    if not told["trained"]:
        return [path]
    from hardy.cli.simulate_plot import draw_curves

    return [path, draw_curves(results, folder / "curves.png")]


def _as_text(
    simulation: Simulation, results: Sequence["StrategyResult"], *, took_s: float, entropy: float | None
) -> Iterator[str]:
    """Yield the lines of the table and what stands around it."""
    config, task = simulation.config, simulation.config.task
    speed = "infinitely fast links" if config.bandwidth is None else f"{config.bandwidth * 8 / 1e6:g} Mbit/s"
    yield (
        f"cluster: {config.workers:,} workers, {config.step_s:g} s a step, {speed}, "
        f"latency {config.latency_s:g} s, {len(config.events)} events"
    )
    from hardy.model.presets import count_parameters

    size = f"{task.model} ({count_parameters(task.shape()):,} parameters)"
    work = f"{task.steps:,} steps of {task.tokens} tokens a worker, seed {task.seed}"
    yield f"task: {size}, {work}" + ("" if entropy is not None else "; nothing is trained")
    yield ""
    trained = entropy is not None
    yield aligned([_heading(trained), *(_cells(result, trained) for result in results)], words=1)
    yield ""
    for result in results:
        if result.stopped is not None:
            yield f"{result.label}: stopped at {result.virtual_s:,.1f} s: {result.stopped}"
        if result.flagged_workers:
            counts = ", ".join(f"worker {w} {n}x" for w, n in result.flagged_workers.items())
            yield f"{result.label}: left out of rounds: {counts}"
    if trained:
        from hardy.cli.simulate_plot import chart

        yield from chart(results)
        yield f"loss of token frequencies alone: {entropy:.3f}; loss and accuracy on held-out text"
    yield (
        "all simulated: time is virtual, exchanges do not overlap with work; steps/s, idle, exchange are of "
        f"all workers, MB of the busiest; took {took_s:.1f} s here"
    )


def _heading(trained: bool) -> tuple[str, ...]:
    learned = ("loss", "accuracy") if trained else ()
    noticed = ("flagged", "drift cos") if trained else ()
    return ("strategy", "virtual s", "steps/s", *learned, "MB sent", "idle", "exchange", "rounds", *noticed)


def _cells(result: "StrategyResult", trained: bool) -> tuple[str, ...]:
    learned = (f"{result.validation_loss:.3f}", f"{result.accuracy:.1%}") if trained else ()
    drift = "-" if result.drift_cosine is None else f"{result.drift_cosine:.2f}"
    noticed = (f"{result.flagged:,}", drift) if trained else ()
    return (
        result.label + (" (stopped)" if result.stopped else ""),
        f"{result.virtual_s:,.1f}",
        f"{result.steps_per_s:,.2f}",
        *learned,
        f"{result.bytes_sent / 1e6:,.1f}",
        f"{result.idle_share:.1%}",
        f"{result.exchange_share:.1%}",
        f"{result.rounds:,}",
        *noticed,
    )
