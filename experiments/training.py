"""Short trainings of a small model with any optimizer: what the experiments on optimizers share.

All contenders of one seed have the same initial weights, batches and number of steps; each has its learning
rate chosen on the first seed from a grid of the same size, then frozen for the other seeds.
"""

import json
import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import torch

from hardy.config import from_dict, override, to_dict
from hardy.data.corpus import prepare
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


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training."""

    optimizer: str
    """Name in the table of contenders."""
    lr: float
    seed: int
    steps: int
    changes: tuple[tuple[str, object], ...] = ()
    """Settings laid over `SMALL`."""


Make = Callable[[torch.nn.Module, float], torch.optim.Optimizer]


def validation_loss(trial: Trial, make: Make) -> float:
    """Train and return the loss on held-out packs, in nats per token; infinite when the run failed."""
    torch.set_num_threads(1)
    settings = SMALL | {"train.steps": trial.steps, "train.seed": trial.seed} | dict(trial.changes)
    config = from_dict(TrainConfig, override(to_dict(TrainConfig()), settings | {"optim.lr": trial.lr}))
    corpus = prepare(config.data, cache_dir=Path(tempfile.gettempdir()) / "hardy-experiments")
    assembly = assemble(config, Alone(), corpus=corpus, hardware=choose_hardware("cpu", "fp32"))
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


_MAKERS: dict[str, Make] = {}
"""The makers of the trials that run; forked processes inherit what cannot be sent."""


def _run(trial: Trial) -> tuple[Trial, float]:
    return trial, validation_loss(trial, _MAKERS[trial.optimizer])


class Trials:
    """Runs trials on several processes and keeps what came out in a file, so that a second call is free."""

    def __init__(self, table: dict[str, Make], *, folder: Path, num_processes: int = 2) -> None:
        self.table, self.folder, self.num_processes = table, folder, num_processes

    def losses(self, trials: list[Trial]) -> dict[Trial, float]:
        """Return the validation loss of each trial."""
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [trial for trial in dict.fromkeys(trials) if not self._path(trial).exists()]
        if self.num_processes == 1:
            for trial in missing:
                self._keep(trial, validation_loss(trial, self.table[trial.optimizer]))
        elif missing:
            _MAKERS.update(self.table)
            with multiprocessing.get_context("fork").Pool(self.num_processes) as pool:
                for trial, loss in pool.imap_unordered(_run, missing):
                    self._keep(trial, loss)
                    print(f"{trial.optimizer} lr {trial.lr:g} seed {trial.seed}: {loss:.4f}", flush=True)
        return {trial: json.loads(self._path(trial).read_text())["loss"] for trial in trials}

    def _keep(self, trial: Trial, loss: float) -> None:
        self._path(trial).write_text(json.dumps({"trial": asdict(trial), "loss": loss}) + "\n")

    def _path(self, trial: Trial) -> Path:
        digest = blake2b(repr((trial, sorted(SMALL.items()))).encode(), digest_size=8).hexdigest()
        return self.folder / f"{digest}.json"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one optimizer reached."""

    optimizer: str
    lr: float
    at_edge: bool
    """Whether the best rate was an end of the grid, so that a wider one might do better."""
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float:
        """Half the range over the seeds."""
        return (max(self.losses) - min(self.losses)) / 2


def compare(
    trials: Trials,
    grids: dict[str, tuple[float, ...]],
    *,
    seeds: tuple[int, ...],
    steps: int,
    **changes: object,
) -> list[Row]:
    """Tune each optimizer on the first seed, train it on all, and return the rows in the given order."""
    fixed = tuple(sorted(changes.items()))

    def trial(name: str, lr: float, seed: int) -> Trial:
        return Trial(optimizer=name, lr=lr, seed=seed, steps=steps, changes=fixed)

    tuning = trials.losses([trial(name, lr, seeds[0]) for name, grid in grids.items() for lr in grid])
    best = {
        name: min(grid, key=lambda lr, name=name: tuning[trial(name, lr, seeds[0])])
        for name, grid in grids.items()
    }
    final = trials.losses([trial(name, best[name], seed) for name in grids for seed in seeds])
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
