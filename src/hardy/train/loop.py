"""The loop: read, step, evaluate, record, save, until the last step, a signal, or a run that cannot be saved.

Every decision follows from values that all workers share, so all of them take it at the same step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from hardy.data.stream import PackStream
from hardy.distributed.strategy import Strategy
from hardy.ops.packed import PackedBatch
from hardy.optim.schedules import Schedule
from hardy.train.config import LoopConfig
from hardy.train.evaluate import evaluate
from hardy.train.metrics import SmoothedLoss
from hardy.train.step import StepResult, Worker, train_step


class RunFailedError(RuntimeError):
    """The run cannot go on; the text says what happened and what can be done. Nothing saved is lost."""


@dataclass(kw_only=True)
class Progress:
    """Where a run stands: all that changes beside the model, the optimizer and the strategy."""

    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Tokens seen by all workers."""
    skipped: int = 0
    """Steps left out because a loss or gradient was not finite, or a spike."""
    skipped_in_a_row: int = 0
    clipped: int = 0
    """Steps whose gradients were made smaller."""
    evaluated_at: int = 0
    """Step of the last evaluation."""
    saved_at: int = 0
    """Step of the last checkpoint."""
    first_loss: float = math.nan
    last_loss: float = math.nan
    validation_loss: float | None = None
    smoothed: SmoothedLoss = field(default_factory=lambda: SmoothedLoss(decay=0.95))

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        numbers = {key: value for key, value in vars(self).items() if key != "smoothed"}
        losses = {key: _plain(numbers[key]) for key in ("first_loss", "last_loss")}
        return numbers | losses | {"smoothed": self.smoothed.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        for key, value in state.items():
            if key == "smoothed":
                self.smoothed.load_state_dict(value)
            else:
                setattr(self, key, math.nan if value is None and key != "validation_loss" else value)


def _plain(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


class BatchSource(Protocol):
    """Gives each worker its micro-batches of a step."""

    @property
    def micro_packs(self) -> int:
        """Packs that a worker runs at once in validation."""
        ...

    def at(self, step: int, worker: Worker) -> list[PackedBatch]:
        """Return this worker's micro-batches of step `step` (from 0), on its device."""
        ...

    def num_targets(self, step: int) -> int:
        """Return the labels of the global batch of step `step`."""
        ...

    def take_report(self) -> dict[str, Any]:
        """Return what there is to say of the last step's micro-batches, for the metrics, once."""
        ...

    def closing_note(self) -> str | None:
        """Return what to know of the whole run's micro-batches, one line for its summary, if anything."""
        ...


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Which packs a worker reads at a step: every W-th of the step's B packs, cut into micro-batches."""

    stream: PackStream
    batch_packs: int
    micro_packs: int

    def at(self, step: int, worker: Worker) -> list[PackedBatch]:
        """Return this worker's micro-batches of step `step` (from 0), on its device."""
        first = step * self.batch_packs
        place, number = worker.share or (worker.world.rank, worker.world.size)
        mine = range(first, first + self.batch_packs)[place::number]
        starts = range(0, len(mine), self.micro_packs)
        return [self.stream.batch(mine[i : i + self.micro_packs]).to(worker.device) for i in starts]

    def num_targets(self, step: int) -> int:
        """Return the labels of the global batch of step `step`."""
        first = step * self.batch_packs
        return self.stream.num_targets(range(first, first + self.batch_packs))

    def take_report(self) -> dict[str, Any]:
        """Return nothing: every worker has as many packs."""
        return {}

    def closing_note(self) -> str | None:
        """Return none."""
        return None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings of the loop, resolved."""

    loop: LoopConfig
    schedule: Schedule
    """Gives the learning rate; told each loss, and the only thing here that may change."""
    batches: BatchSource
    validation: PackStream | None
    validation_packs: int
    checkpoint_every_steps: int


def run_loop(
    worker: Worker,
    plan: Plan,
    progress: Progress,
    *,
    save: Callable[[Progress], None],
    record: Callable[[dict[str, Any]], None],
    stop: Callable[[], bool],
) -> bool:
    """Train from `progress.step` to the last step and keep `progress` up to date.

    Args:
        worker: what trains.
        plan: how long, on what.
        progress: where the run stands; changed in place.
        save: writes a checkpoint; called at the cadence and when the run is stopped, on every worker.
        record: takes the record of each step, on every worker.
        stop: whether this worker was asked to stop.

    Returns:
        True when the last step was reached, False when a worker asked to stop.

    Raises:
        RunFailedError: too many non-finite steps in a row, or the loss diverged.
    """
    strategy = worker.strategy
    while progress.step < plan.loop.steps or not strategy.is_together:
        line, result = _step_and_evaluate(worker, plan, progress, wants_stop=stop())
        record(line)
        _check_health(progress, plan.loop, left_out_for=result.left_out_for)
        is_last = progress.step >= plan.loop.steps and strategy.is_together
        stops = strategy.agreed_stop(result.stop_votes)
        if stops or is_last or _is_time(strategy, progress, plan.checkpoint_every_steps, progress.saved_at):
            progress.saved_at = progress.step
            save(progress)
        if stops and not is_last:
            return False
    return True


def _is_time(strategy: Strategy, progress: Progress, every_steps: int, last: int) -> bool:
    """Whether a multiple of `every_steps` was passed since step `last`, where all workers are together."""
    return strategy.is_together and progress.step // every_steps > last // every_steps


def _step_and_evaluate(
    worker: Worker, plan: Plan, progress: Progress, *, wants_stop: bool
) -> tuple[dict[str, Any], StepResult]:
    """Make a step, and evaluate when it is time; return the record and what the step did."""
    clock, strategy = worker.comm.clock, worker.strategy
    started_s = clock.now()
    lr = plan.schedule.rate(min(progress.step, plan.loop.steps - 1))
    own_step = strategy.own_steps(progress.step)
    micro_batches = plan.batches.at(own_step, worker)
    num_targets = plan.batches.num_targets(own_step)
    result = train_step(worker, micro_batches, num_targets=num_targets, lr=lr, wants_stop=wants_stop)
    plan.schedule.record(result.loss)
    _advance(progress, result, num_tokens=num_targets, step=strategy.standing(progress.step + 1))
    is_last = progress.step >= plan.loop.steps and strategy.is_together
    if is_last:
        strategy.finish()
    stepped_s = clock.now()
    line: dict[str, Any] = {
        "step": progress.step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "tokens": progress.tokens,
        "step_time_s": stepped_s - started_s,
        "busy_time_s": result.busy_s,
        "skipped": progress.skipped,
        "clipped": progress.clipped,
    }
    line |= plan.batches.take_report() | strategy.take_report()
    every_steps = plan.loop.evaluate_every_steps
    if plan.validation and (is_last or _is_time(strategy, progress, every_steps, progress.evaluated_at)):
        progress.evaluated_at = progress.step
        evaluation = evaluate(
            worker, plan.validation, num_packs=plan.validation_packs, micro_packs=plan.batches.micro_packs
        )
        progress.validation_loss = evaluation.loss
        plan.schedule.observe(progress.validation_loss)
        line |= {
            "validation_loss": progress.validation_loss,
            "validation_accuracy": evaluation.accuracy,
            "validation_time_s": clock.now() - stepped_s,
        }
    return line, result


def _advance(progress: Progress, result: StepResult, *, num_tokens: int, step: int) -> None:
    """Take one step's result into `progress`, which stands at `step` now."""
    progress.step = step
    progress.tokens += num_tokens
    progress.clipped += result.clipped
    progress.last_loss = result.loss
    if math.isnan(progress.first_loss):
        progress.first_loss = result.loss
    if result.applied:
        progress.skipped_in_a_row = 0
        progress.smoothed.update(result.loss)
    else:
        progress.skipped += 1
        progress.skipped_in_a_row += 1


def _check_health(progress: Progress, loop: LoopConfig, *, left_out_for: str) -> None:
    """Stop a run that only wastes time."""
    if progress.skipped_in_a_row > loop.max_nonfinite_steps:
        raise RunFailedError(
            f"{progress.skipped_in_a_row} steps in a row were left out, up to step {progress.step} "
            f"(train.max_nonfinite_steps={loop.max_nonfinite_steps}), the last for {left_out_for}; lower "
            f"optim.lr, raise optim.schedule.warmup_steps, or look at the data"
        )
    rise = progress.smoothed.value - progress.smoothed.best
    if loop.max_loss_rise is not None and rise > loop.max_loss_rise:
        raise RunFailedError(
            f"the run diverged: at step {progress.step} the smoothed loss is {progress.smoothed.value:.3f}, "
            f"{rise:.3f} above its best (train.max_loss_rise={loop.max_loss_rise:g}); lower optim.lr or "
            f"resume with --train.max_loss_rise none"
        )
