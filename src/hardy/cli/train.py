"""The verbs `train` and `resume`: check all that needs no torch, then run here or in several workers."""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hardy.cli import failure
from hardy.cli.dry_run import show_plan
from hardy.cli.environment import MEETING, STORE, cache_dir, who_works
from hardy.cli.output import print_json
from hardy.cli.parser import Parser
from hardy.cli.settings import change, resolve, settings_text
from hardy.cli.stop import StopSignal
from hardy.cli.workers import run_replicas, run_workers
from hardy.config import UserError, parse_dotted
from hardy.distributed.config import LocalUpdateConfig
from hardy.distributed.gossip.config import PushSumConfig
from hardy.distributed.robust.config import CombinedConfig
from hardy.model.presets import check_folder
from hardy.train.config import TrainConfig
from hardy.train.folder import RunFolder
from hardy.train.plan import RunPlan, World, plan_run

if TYPE_CHECKING:
    from hardy.train.hooks import Hook, Summary
    from hardy.train.run import Surroundings

RUNS = Path("runs")
_ENDS = {
    None: failure.SUCCESS,
    "SIGHUP": failure.HUNG_UP,
    "SIGINT": failure.INTERRUPTED,
    "SIGPIPE": failure.READER_GONE,
    "SIGTERM": failure.TERMINATED,
}
"""Exit codes, by what stopped a run."""

logger = logging.getLogger(__name__)


def add_train(parser: Parser) -> None:
    """Add the options of `hardy train`."""
    parser.add_argument("target", metavar="RECIPE|FILE.toml", help="what to train")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="run folder (default: runs/RECIPE-N)")
    parser.add_argument("--dry-run", action="store_true", help="check and show what would run, then stop")
    _add_common(parser)


def add_resume(parser: Parser) -> None:
    """Add the options of `hardy resume`."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    _add_common(parser)


def _add_common(parser: Parser) -> None:
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes on this machine (default: 1, or as before)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def train_help() -> str:
    """Return the recipes and settings."""
    return settings_text()


def resume_help() -> str:
    """Return where the settings are listed."""
    return "Settings may change, such as --train.steps 400; `hardy train --help` lists them."


def train_verb(arguments: argparse.Namespace) -> int:
    """Run `hardy train`."""
    resolved = resolve(arguments.target, arguments.settings)
    me, num_workers = who_works(arguments.workers, os.environ)
    plan = plan_run(resolved.config, num_workers=num_workers)
    _check_rule(resolved.config, plan)
    if arguments.dry_run:
        show_plan(resolved, plan, as_json=arguments.json)
        return failure.SUCCESS
    run_dir = arguments.run_dir or _next_run_dir(resolved.name, me)
    if me.rank == 0 and not me.restarts:
        RunFolder(run_dir).check_new(resolved.config)
        check_folder(resolved.config.model.name)
        _check_source(resolved.config)
    if num_workers > me.size:
        words = ["train", arguments.target, "--run-dir", str(run_dir), *arguments.settings]
        return _launch(
            resolved.config, run_dir, num_workers, [*words, *(["--json"] if arguments.json else [])]
        )
    from hardy.train import run

    return _run(
        lambda around: run.start(resolved.config, run_dir, around), resolved.config, run_dir, me, arguments
    )


def resume_verb(arguments: argparse.Namespace) -> int:
    """Run `hardy resume`."""
    run_dir: Path = arguments.run_dir
    config = change(RunFolder(run_dir).read_config(), parse_dotted(arguments.settings))
    last = RunFolder(run_dir).last_num_workers()
    me, num_workers = who_works(arguments.workers, os.environ, default=last)
    _check_rule(config, plan_run(config, num_workers=num_workers))
    check_folder(config.model.name)
    if num_workers > me.size:
        with RunFolder(run_dir).locked():  # or one worker would be refused while the others wait for it
            pass
        words = ["resume", str(run_dir), *arguments.settings]
        return _launch(config, run_dir, num_workers, [*words, *(["--json"] if arguments.json else [])])
    from hardy.train import run

    return _run(lambda around: run.resume(run_dir, around, config=config), config, run_dir, me, arguments)


def _launch(config: TrainConfig, run_dir: Path, num_workers: int, words: list[str]) -> int:
    """Run the command in several processes and return the exit code of all."""
    strategy = config.strategy
    if isinstance(strategy, CombinedConfig) and strategy.fastest is not None:
        replicas, shards = strategy.mesh.sizes(num_workers)
        from hardy.train.elections import election_host  # imports torch

        host = election_host(config, run_dir, replicas=replicas)
        again, setting = strategy.fastest.max_restarts, "strategy.fastest.max_restarts"
        try:
            return run_replicas(
                replicas, words, host, max_restarts=again, setting=setting, replica_size=shards
            )
        finally:
            host.close()
    if isinstance(strategy, (LocalUpdateConfig, PushSumConfig)) and strategy.elastic:
        replicas, shards = strategy.mesh.sizes(num_workers)
        if replicas > 1:  # one alone has nobody who goes on without it
            from hardy.distributed.elastic import StoreHost  # imports torch

            host, again = StoreHost(), strategy.max_restarts
            return run_replicas(replicas, words, host, max_restarts=again, replica_size=shards)
    return run_workers(num_workers, words)


def _run(
    begin: "Callable[[Surroundings], Summary]",
    config: TrainConfig,
    run_dir: Path,
    me: World,
    arguments: argparse.Namespace,
) -> int:
    """Train in this process, show how it ended and return the exit code."""
    from hardy.distributed.comm import WorkerLostError
    from hardy.train.loop import RunFailedError

    is_launched = MEETING in os.environ or STORE in os.environ
    with StopSignal(launcher=os.getppid() if is_launched else None) as stop:
        hooks = _displays(config, run_dir, arguments, stop) if me.rank == 0 else []
        try:
            summary = begin(_surroundings(config, me, arguments, hooks, stop))
        except (RunFailedError, WorkerLostError) as error:
            raise failure.CommandFailedError(str(error)) from error
        finally:
            for hook in hooks:
                hook.close()
    if summary.stopped_by == "SIGPIPE":
        where = f"saved at step {summary.steps}; go on with: hardy resume {run_dir}"
        print(f"hardy: what reads our output went away; {where}", file=sys.stderr)
    elif me.rank == 0:
        _show_summary(summary, run_dir, as_json=arguments.json)
    return _ENDS[summary.stopped_by]


def _next_run_dir(name: str, me: World) -> Path:
    """Return runs/NAME-N with the first N above all that are there."""
    if me.size > 1:
        raise UserError("workers started by a launcher must agree on the run folder; give --run-dir")
    numbers = [path.name.removeprefix(f"{name}-") for path in RUNS.glob(f"{name}-*")]
    return RUNS / f"{name}-{max((int(number) for number in numbers if number.isdecimal()), default=0) + 1}"


def _check_rule(config: TrainConfig, plan: RunPlan) -> None:
    """Refuse a rule that so few workers cannot have, before any of them is started."""
    strategy = config.strategy
    if isinstance(strategy, CombinedConfig):
        from hardy.distributed.robust.build import build_combiner  # imports torch

        build_combiner(
            strategy, num_workers=plan.replicas if strategy.worker == "replica" else plan.num_workers
        )


def _check_source(config: TrainConfig) -> None:
    """Refuse a source that cannot be opened."""
    from hardy.data.sources import open_source

    open_source(config.data)


def _displays(
    config: TrainConfig, run_dir: Path, arguments: argparse.Namespace, stop: StopSignal
) -> "list[Hook]":
    """Return what shows and tracks the run."""
    from hardy.cli.progress import progress_hooks
    from hardy.cli.trackers import tracker_hooks

    stream = sys.stderr if arguments.json else sys.stdout
    log = config.log
    shown = progress_hooks(
        log.progress, run_dir, every_steps=log.every_steps, stream=stream, reader_gone=stop.reader_gone
    )
    return shown + tracker_hooks(log.trackers, run_dir, project=log.project)


def _surroundings(
    config: TrainConfig, me: World, arguments: argparse.Namespace, hooks: "list[Hook]", stop: StopSignal
) -> "Surroundings":
    """Return what the run is handed from outside."""
    from hardy.train.run import Surroundings

    return Surroundings(
        cache_dir=cache_dir(config.data.cache_dir, os.environ),
        world=me,
        command=["hardy", *arguments.words],
        hooks=hooks,
        stop_signal=stop,
    )


def _show_summary(summary: "Summary", run_dir: Path, *, as_json: bool) -> None:
    """Draw the losses and print how the run ended."""
    from hardy.cli.plots import plot_losses

    try:
        plot = plot_losses(run_dir)
    except (ImportError, OSError) as error:  # the run is done, whatever becomes of its picture
        logger.warning("the losses could not be drawn: %s", error)
        plot = None
    if as_json:
        print_json(dataclasses.asdict(summary) | {"plot": plot})
        return
    from rich.console import Console

    from hardy.cli.progress import summary_table

    Console().print(summary_table(summary, plot=plot))
    if summary.stopped_by:
        print(f"go on with: hardy resume {run_dir}")
