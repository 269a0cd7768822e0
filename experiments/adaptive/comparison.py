"""The plan of the comparison: which trainings choose rates, which are reported, what is kept of them."""

import math

from report import SCORES, mean
from rows import ROWS, grid_of
from tasks import TASKS
from trial_cache import Trials
from trials import Result, Trial, floor, train

TUNING_SEED, SEEDS, CURVE_POINTS = 0, (1, 2, 3), 20
STRESSES = ("spikes", "nan", "label noise")
SMOKE_STEPS, SMOKE_EXAMPLES, SMOKE_SEEDS = 1, 32, (1,)
PER_SEED = ("loss", "wall_s", "clips", "skips", "final_lr_ratio")

Pair = tuple[str, str]
"""Task and row."""


class Comparison:
    """Plans the trainings, has them run, and gathers what came out.

    Args:
        trials: what runs them.
        smoke: whether runs are a few steps long, with one rate and one seed.
    """

    def __init__(self, trials: Trials, *, smoke: bool) -> None:
        self.trials, self.smoke = trials, smoke
        self.seeds = SMOKE_SEEDS if smoke else SEEDS

    def steps(self, task: str) -> int:
        """Return how long a training is."""
        return SMOKE_STEPS if self.smoke else TASKS[task].steps

    def num_examples(self, task: str) -> int:
        """Return how many examples a loss is taken on."""
        return SMOKE_EXAMPLES if self.smoke else TASKS[task].num_held_out

    def grid(self, pair: Pair) -> tuple[float, ...]:
        """Return the rates that are tried."""
        task, row = pair
        return grid_of(row, task)[: 1 if self.smoke else None]

    def tuning(self, pair: Pair, lr: float) -> Trial:
        """Return the training that says how good a rate is."""
        return self._trial(pair, lr, seed=TUNING_SEED, examples="validation")

    def final(self, pair: Pair, lr: float, *, stress: str = "none") -> list[Trial]:
        """Return the trainings that are reported, one for each seed."""
        points = CURVE_POINTS if stress == "none" else 0
        return [
            self._trial(pair, lr, seed=seed, examples="test", stress=stress, curve_points=points)
            for seed in self.seeds
        ]

    def run(self) -> dict[str, object]:
        """Tune every row on every task, then train it on the other seeds, on `teacher` under stress too."""
        pairs = [(task, row) for task in TASKS for row in ROWS]
        tuned = self._results([self.tuning(pair, lr) for pair in pairs for lr in self.grid(pair)])
        tried = {pair: {lr: tuned[self.tuning(pair, lr)]["loss"] for lr in self.grid(pair)} for pair in pairs}
        best = {
            pair: min(losses, key=lambda lr, losses=losses: _or_infinite(losses[lr]))
            for pair, losses in tried.items()
        }
        plan = {(pair, "none"): self.final(pair, best[pair]) for pair in pairs}
        for stress in STRESSES:
            for pair in (("teacher", row) for row in ROWS):
                plan[pair, stress] = self.final(pair, best[pair], stress=stress)
        done = self._results([trial for trials in plan.values() for trial in trials])
        came_out = {key: [done[trial] for trial in trials] for key, trials in plan.items()}
        return {
            "seeds": self.seeds,
            "tuning_seed": TUNING_SEED,
            "tasks": {
                task: {
                    "steps": self.steps(task),
                    "floor": floor(task, self.num_examples(task)),
                    "rows": self._rows(task, tried, {row: came_out[(task, row), "none"] for row in ROWS}),
                }
                for task in TASKS
            },
            "stress": [
                {"stress": stress, "row": row, **_per_seed(came_out[("teacher", row), stress], PER_SEED)}
                for stress in STRESSES
                for row in ROWS
            ],
        }

    def _results(self, trials: list[Trial]) -> dict[Trial, Result]:
        return self.trials.run(train, trials, label=lambda trial: trial.label)

    def _trial(self, pair: Pair, lr: float, **more) -> Trial:
        task, row = pair
        steps, num_examples = self.steps(task), self.num_examples(task)
        return Trial(task=task, row=row, lr=lr, steps=steps, num_examples=num_examples, **more)

    def _rows(
        self, task: str, tried: dict[Pair, dict[float, float | None]], came_out: dict[str, list[Result]]
    ) -> list[dict[str, object]]:
        """Return what the result file holds of one task's rows."""
        ends = [result["curve"][-1][1] if result["curve"] else None for result in came_out["adam"]]
        target = -math.inf if None in ends else mean(ends)
        scores = [key for key in SCORES if any(key in r for results in came_out.values() for r in results)]
        rows = []
        for row, results in came_out.items():
            losses = {lr: _or_infinite(loss) for lr, loss in tried[task, row].items()}
            lr = min(losses, key=losses.get)
            rows.append(
                {
                    "row": row,
                    "lr": lr,
                    "at_edge": lr in (min(losses), max(losses)),
                    "validation_loss_by_lr": {f"{lr:g}": loss for lr, loss in tried[task, row].items()},
                    "width_decades": width_decades(list(losses.values())),
                    "steps_to_target": [steps_to(target, result["curve"]) for result in results],
                    "state_bytes": results[0]["state_bytes"],
                    **_per_seed(results, [*PER_SEED, *scores]),
                }
            )
        return rows


def width_decades(losses: list[float]) -> float:
    """Return how far the rates within 1 % of the best loss lie apart; neighbours are half a decade apart."""
    near = [place for place, loss in enumerate(losses) if loss <= 1.01 * min(losses)]
    return (near[-1] - near[0]) / 2


def steps_to(target: float, curve: list[tuple[int, float | None]]) -> int | None:
    """Return the first step at which the curve is at or below the target; None if it never is."""
    return next((step for step, loss in curve if loss is not None and loss <= target), None)


def _per_seed(results: list[Result], keys: list[str] | tuple[str, ...]) -> dict[str, list[object]]:
    return {key: [result.get(key) for result in results] for key in keys}


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None else loss
