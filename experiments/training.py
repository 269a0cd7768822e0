"""Short trainings of a small model with any optimizer: what the experiments on optimizers share.

All contenders of one seed have the same initial weights, batches and number of steps; each has its learning
rate chosen on the first seed from a grid of the same size, then frozen for the other seeds.
"""

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import markov
import torch
from trial_cache import Trials

from hardy.config import from_dict, override, to_dict
from hardy.data.config import DataConfig
from hardy.data.corpus import Corpus, prepare
from hardy.distributed.comm import Alone
from hardy.train.config import TrainConfig
from hardy.train.device import choose_hardware
from hardy.train.evaluate import evaluate
from hardy.train.loop import Progress, RunFailedError, run_loop
from hardy.train.setup import assemble

SMALL = {
    "model.name": "1m",
    "model.shape.hidden_size": 64,
    "model.shape.intermediate_size": 192,
    "model.shape.num_layers": 2,
    "model.shape.tied": False,
    "data.source": "pydocs",
    "data.limit_mb": 8,
    "data.pack_tokens": 128,
    "train.batch_packs": 16,
    "train.evaluate_packs": 64,
    "train.evaluate_every_steps": 10**9,
    "checkpoint.every_steps": 10**9,
    "optim.schedule.warmup_steps": 40,
    "train.device": "cpu",
}
"""A decoder of 0.2 M parameters on the Python sources of this machine, read as bytes."""
TASKS: dict[str, Callable[[], Mapping[str, object]]] = {"text": dict, "markov": markov.settings}
"""What each task lays over `SMALL`: nothing, or another text and tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training."""

    optimizer: str
    """Name in the table of contenders."""
    lr: float
    seed: int
    steps: int
    task: str = "text"
    """Name in `TASKS`."""
    changes: tuple[tuple[str, object], ...] = ()
    """Settings laid over those of the task."""


Make = Callable[[torch.nn.Module, float], torch.optim.Optimizer]


@cache
def corpus_of(config: DataConfig) -> Corpus:
    """Return the corpus, looked for once in a process."""
    return prepare(config, cache_dir=Path(tempfile.gettempdir()) / "hardy-experiments")


def validation_loss(trial: Trial, make: Make) -> float:
    """Train and return the loss on held-out packs, in nats per token; infinite when the run failed."""
    torch.set_num_threads(1)
    run = {"train.steps": trial.steps, "train.seed": trial.seed}
    settings = {**SMALL, **TASKS[trial.task](), **run, **dict(trial.changes)}
    config = from_dict(TrainConfig, override(to_dict(TrainConfig()), settings | {"optim.lr": trial.lr}))
    assembly = assemble(
        config, Alone(), corpus=corpus_of(config.data), hardware=choose_hardware("cpu", "fp32")
    )
    assembly.worker.optimizer = make(assembly.worker.model, trial.lr)
    try:
        run_loop(
            assembly.worker,
            assembly.plan,
            Progress(),
            save=lambda progress: None,
            record=lambda line: None,
            stop=lambda: False,
        )
    except RunFailedError:
        return math.inf
    plan = assembly.plan
    return evaluate(assembly.worker, plan.validation, num_packs=plan.validation_packs, micro_packs=8).loss


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one optimizer reached."""

    optimizer: str
    lr: float
    at_edge: bool
    """Whether the best rate was an end of the grid, so that a wider one might do better."""
    losses: tuple[float | None, ...]
    """By seed; None or infinite where the run was lost."""

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return math.inf if None in self.losses else statistics.fmean(self.losses)

    @property
    def spread(self) -> float:
        """Half the range over the seeds."""
        if None in self.losses:
            return math.inf
        return (max(self.losses) - min(self.losses)) / 2


def compare(
    trials: Trials,
    table: Mapping[str, Make],
    grids: Mapping[str, tuple[float, ...]],
    *,
    seeds: tuple[int, ...],
    steps: int,
    task: str = "text",
    **changes: object,
) -> list[Row]:
    """Tune each optimizer on the first seed, train it on all, and return the rows in the given order."""
    fixed = tuple(sorted(changes.items()))

    def trial(name: str, lr: float, seed: int) -> Trial:
        return Trial(optimizer=name, lr=lr, seed=seed, steps=steps, task=task, changes=fixed)

    def losses(wanted: list[Trial]) -> dict[Trial, float]:
        return trials.run(
            lambda given: validation_loss(given, table[given.optimizer]),
            wanted,
            label=lambda given: f"{given.task}, {given.optimizer}, lr {given.lr:g}, seed {given.seed}",
        )

    tuning = losses([trial(name, lr, seeds[0]) for name, grid in grids.items() for lr in grid])
    best = {
        name: min(grid, key=lambda lr, name=name: tuning[trial(name, lr, seeds[0])])
        for name, grid in grids.items()
    }
    final = losses([trial(name, best[name], seed) for name in grids for seed in seeds])
    return [
        Row(
            optimizer=name,
            lr=best[name],
            at_edge=len(grid) > 1 and best[name] in (grid[0], grid[-1]),
            losses=tuple(final[trial(name, best[name], seed)] for seed in seeds),
        )
        for name, grid in grids.items()
    ]


def as_table(rows: list[Row], *, baseline: str) -> str:
    """Return the rows in Markdown, with the difference to the baseline in percent."""
    base = next(row.mean for row in rows if row.optimizer == baseline)
    lines = ["| optimizer | lr | validation loss | against " + baseline + " |", "|---|---|---|---|"]
    for row in rows:
        edge = " (edge of the grid)" if row.at_edge else ""
        change = 100 * (row.mean / base - 1)
        lines.append(
            f"| {row.optimizer} | {row.lr:g}{edge} | {row.mean:.4f} ± {row.spread:.4f} | {change:+.2f} % |"
        )
    return "\n".join(lines)
