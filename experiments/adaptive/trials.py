"""One training of one row on one task.

Trials of one task and seed have the same initial weights, batches and number of steps, whatever the row.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from rows import ROWS, Contender, guard_config
from tasks import TASKS, Task
from torch import Tensor

from hardy.optim.gradients import scale_gradients, takes_grad_scale
from hardy.optim.guard import GradGuard, NonFiniteGradientError
from hardy.optim.schedules import build_schedule
from hardy.rng import generator_for, seed_for

Stress = Literal["none", "spikes", "nan", "label noise"]
SPIKE_SHARE, SPIKE, NAN_STEPS, NOISE_SHARE = 0.02, 1000.0, 3, 0.1
CHECK_EVERY_STEPS = 10
CURVE_EXAMPLES = 256

Result = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training."""

    task: str
    row: str
    lr: float
    seed: int
    steps: int
    stress: Stress = "none"
    curve_points: int = 0
    """How often the loss is taken on the way."""
    examples: Literal["validation", "test"]
    """What the loss is taken on: validation chooses a rate, test is for the report."""
    num_examples: int

    @property
    def label(self) -> str:
        """What it is called where progress is shown."""
        stress = "" if self.stress == "none" else f", {self.stress}"
        return f"{self.task}, {self.row}, lr {self.lr:g}, seed {self.seed}{stress}"


def train(trial: Trial) -> Result:
    """Train and return what is reported; losses are None when the run was lost."""
    torch.set_num_threads(1)
    task, contender = TASKS[trial.task], ROWS[trial.row]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(trial.seed, trial.task, "weights"))
        model = task.build()
    run = Run(model, contender, lr=trial.lr, total_steps=trial.steps)
    batches = task.draw(trial.steps * task.batch, generator_for(trial.seed, trial.task, "batches"))
    few = tuple(part[:CURVE_EXAMPLES] for part in held_out(trial.task, "validation", trial.num_examples))
    spoil = Spoiler(trial)
    curve: list[tuple[int, float | None]] = []
    ends = [round(trial.steps * (i + 1) / trial.curve_points) for i in range(trial.curve_points)]
    wall_s = 0.0
    try:
        for step, (inputs, labels) in enumerate(_cut(batches, task.batch)):
            began = time.perf_counter()
            run.step(task, inputs, spoil.labels(labels, step), lambda step=step: spoil.gradients(model, step))
            wall_s += time.perf_counter() - began
            if step + 1 in ends:
                curve.append((step + 1, _finite(evaluate(task, model, few)["loss"])))
    except NonFiniteGradientError:
        return {"loss": None, "curve": curve, "wall_s": wall_s} | run.counters()
    measured = evaluate(task, model, held_out(trial.task, trial.examples, trial.num_examples))
    if not math.isfinite(measured["loss"]):
        measured = {"loss": None}
    return {**measured, "curve": curve, "wall_s": wall_s} | run.counters()


class Run:
    """A model with a row's optimizer, schedule and guard.

    Args:
        model: trained in place.
        contender: the row.
        lr: peak learning rate.
        total_steps: planned steps.
    """

    def __init__(self, model: torch.nn.Module, contender: Contender, *, lr: float, total_steps: int) -> None:
        self.model, self.contender, self.lr = model, contender, lr
        self.parameters = list(model.parameters())
        self.optimizer = contender.make(model, lr)
        config = contender.schedule_config(total_steps)
        self.schedule = build_schedule(config, peak=lr, total_steps=total_steps)
        settings = contender.guard
        self.guard = settings and GradGuard(guard_config(settings), max_norm=settings.max_norm)
        self.steps_done, self.last_rate, self.torch_clips = 0, lr, 0

    def step(self, task: Task, inputs: Tensor, labels: Tensor, spoil: Callable[[], None]) -> None:
        """Take one optimizer step; `spoil` may change the gradients before anything looks at them.

        Raises:
            NonFiniteGradientError: the guard skipped too many steps in a row.
        """
        loss = task.loss(self.model(inputs), labels)
        loss.backward()
        spoil()
        self.last_rate = self.schedule.rate(self.steps_done)
        for group in self.optimizer.param_groups:
            group["lr"] = self.last_rate
        self._apply()
        self.optimizer.zero_grad()
        self.schedule.record(loss.item())
        self.steps_done += 1
        if self.guard is not None and self.steps_done % CHECK_EVERY_STEPS == 0:
            self.guard.check()

    def counters(self) -> Result:
        """Return clips, skips, bytes of state and where the schedule ended."""
        state = [x for held in self.optimizer.state.values() for x in held.values() if torch.is_tensor(x)]
        counts = {"n_clipped": self.torch_clips, "n_skipped": 0}
        if self.guard is not None:
            counts = self.guard.state_dict()  # `check` would raise once more after a lost run
        return {
            "clips": int(counts["n_clipped"]),
            "skips": int(counts["n_skipped"]),
            "state_bytes": sum(x.numel() * x.element_size() for x in state),
            "final_lr_ratio": self.last_rate / self.lr,
        }

    def _apply(self) -> None:
        if self.guard is None:
            if self.contender.clip_norm is not None:
                norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.contender.clip_norm)
                self.torch_clips += int(norm > self.contender.clip_norm)
            self.optimizer.step()
            return
        verdict = self.guard.update(torch.nn.utils.get_total_norm([p.grad for p in self.parameters]))
        if takes_grad_scale(self.optimizer):
            self.optimizer.step(grad_scale=verdict.grad_scale, found_inf=verdict.found_inf)
        elif not verdict.found_inf:
            scale_gradients(self.parameters, verdict.multiplier)
            self.optimizer.step()


class Spoiler:
    """What goes wrong in a trial under stress; the same for every row."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        chosen = torch.randperm(trial.steps, generator=generator_for(trial.seed, "spikes"))
        self.spikes = set(chosen[: max(1, round(SPIKE_SHARE * trial.steps))].tolist())
        self.nans = {trial.steps * (i + 1) // (NAN_STEPS + 1) for i in range(NAN_STEPS)}

    def gradients(self, model: torch.nn.Module, step: int) -> None:
        """Multiply all gradients by 1000, or set one to NaN, at the chosen steps."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if self.trial.stress == "spikes" and step in self.spikes:
            for gradient in gradients:
                gradient.mul_(SPIKE)
        if self.trial.stress == "nan" and step in self.nans:
            gradients[0].fill_(torch.nan)

    def labels(self, labels: Tensor, step: int) -> Tensor:
        """Return labels of which 10 % are drawn anew in the second third of the run."""
        if self.trial.stress != "label noise" or step * 3 // self.trial.steps != 1:
            return labels
        generator = generator_for(self.trial.seed, "label noise", step)
        is_wrong = torch.rand(labels.shape, generator=generator) < NOISE_SHARE
        return torch.where(is_wrong, labels[torch.randperm(len(labels), generator=generator)], labels)


@functools.cache
def held_out(task: str, purpose: str, num_examples: int) -> tuple[Tensor, Tensor]:
    """Return a task's examples for one purpose, the same for all seeds."""
    return TASKS[task].draw(num_examples, generator_for(0, task, purpose))


def floor(task: str, num_examples: int) -> float:
    """Return the test loss of a model that knows the law; 0 where answers are certain."""
    inputs, labels = held_out(task, "test", num_examples)
    found = TASKS[task]
    return found.loss(found.ideal(inputs), labels).item() if found.ideal else 0.0


@torch.no_grad()
def evaluate(task: Task, model: torch.nn.Module, examples: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return loss and scores over all examples."""
    inputs, labels = examples
    logits = torch.cat([model(part) for part in inputs.split(512)])
    return {"loss": task.loss(logits, labels).item()} | task.scores(logits, labels)


def _cut(batches: tuple[Tensor, Tensor], size: int) -> zip:
    return zip(*(part.split(size) for part in batches), strict=True)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
