"""One optimizer step: forward and backward over the micro-batches, agree, clip, update.

Read this file first to see where a strategy acts; everything else in `train` is bookkeeping around it.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hardy.distributed.comm import Communicator
from hardy.distributed.sharded import accumulating, bare, clip_gradients, grad_norm
from hardy.distributed.strategy import Strategy
from hardy.ops.packed import PackedBatch
from hardy.optim.build import set_learning_rate
from hardy.optim.gradients import nonfinite_flags, scale_gradients, takes_grad_scale, tensor_norms
from hardy.optim.guard import NAMED_OFFENDERS, GradGuard, Verdict


@dataclass(kw_only=True)
class Worker:
    """What one worker trains with; all workers hold the same things about the same model."""

    model: nn.Module
    """Called as `model(tokens_T, layout, labels_T)`, returns the summed negative log-likelihood."""
    optimizer: torch.optim.Optimizer
    strategy: Strategy
    comm: Communicator
    """Those who step together: all workers, or those of this replica where replicas train alone."""
    device: torch.device
    autocast: "AutocastSetting" = field(default_factory=lambda: AutocastSetting())
    clip_norm: float | None = None
    """Largest global gradient norm; a guard brings its own."""
    guard: GradGuard | None = None
    """Clips by the gradient's history and decides which steps are left out; None clips by `clip_norm` alone
    and leaves out what is not finite."""
    released: bool = False
    """Whether the optimizer updates inside the backward pass, so that no gradient is left to look at."""
    everyone: Communicator | None = None
    """All workers of the run; None where they are `comm`."""
    replicas: int = 1
    """Groups like `comm` that share a global batch; each divides its gradients by its part of the targets."""

    share: tuple[int, int] | None = None
    """(place, number) of those who share a global batch; None where they are `world`."""

    @property
    def world(self) -> Communicator:
        """All workers of the run."""
        return self.everyone or self.comm


@dataclass(frozen=True, kw_only=True)
class AutocastSetting:
    """Whether the forward pass runs matrix products in bf16."""

    device_type: str = "cpu"
    enabled: bool = False

    def context(self) -> AbstractContextManager[object]:
        """Return the context of one forward pass."""
        return torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.enabled)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did, the same on every worker."""

    loss: float
    """Mean negative log-likelihood per target in nats: of the global batch, or this replica's part of it."""
    grad_norm: float
    """Global gradient norm before clipping; 0 where gradients are released."""
    applied: bool
    """False when the loss or a gradient was not finite, or the guard said so: the update was left out."""
    clipped: bool
    """Whether the gradients were made smaller."""
    stop_votes: int
    """Workers that ask to stop after this step."""
    busy_s: float
    """Seconds this worker spent in forward, backward, reduction and optimizer."""
    left_out_for: str = ""
    """In words, why the update was left out."""


def train_step(
    worker: Worker, micro_batches: Sequence[PackedBatch], *, num_targets: int, lr: float, wants_stop: bool
) -> StepResult:
    """Make one optimizer step on this worker's share of the global batch.

    Every wrapper averages gradients over the workers, so each micro-batch's sum is scaled by workers /
    targets: any split of the batch over workers and micro-batches gives the gradient of the global mean.

    Args:
        worker: the model and what trains it.
        micro_batches: this worker's share; every worker has the same number.
        num_targets: labels of the global batch, over all workers and replicas.
        lr: learning rate of this step.
        wants_stop: whether this worker was asked to stop.
    """
    started_s = worker.comm.clock.now()
    share = num_targets / worker.replicas
    set_learning_rate(
        worker.optimizer, lr
    )  # before the backward pass, which updates where gradients are released
    worker.strategy.before_forward()
    nll_sum = torch.zeros((), dtype=torch.float64, device=worker.device)
    for i, batch in enumerate([] if worker.strategy.skips_forward else micro_batches):
        with accumulating(worker.model, last=i == len(micro_batches) - 1):
            with worker.autocast.context():
                nll = worker.model(batch.tokens_T, batch.layout, batch.labels_T)
            (nll * (worker.comm.size / share)).backward()
        nll_sum += nll.detach()
    worker.strategy.note_loss(nll_sum)
    worker.strategy.reduce_gradients()
    parameters = [p for group in worker.optimizer.param_groups for p in group["params"]]
    norm, verdict = (nll_sum.new_zeros(()), None) if worker.released else _judge(worker.guard, parameters)
    totals = torch.stack([nll_sum, nll_sum.new_tensor(float(wants_stop))])
    totals = worker.strategy.joint_totals(totals, worker.comm)
    verdicts = [verdict.found_inf, verdict.clipped] if verdict is not None else []
    # The step's only wait for the device: an update that holds a NaN must not happen.
    read = torch.cat([totals, *(number.double().reshape(1) for number in (norm, *verdicts))]).tolist()
    nll_total, votes, norm_value = read[:3]
    if verdict is not None:
        applied, clipped = read[3] == 0, read[4] != 0
    else:
        applied = math.isfinite(nll_total) and math.isfinite(norm_value)
        clipped = applied and worker.clip_norm is not None and norm_value > worker.clip_norm
    left_out_for = worker.strategy.refusal
    applied = applied and not left_out_for
    if worker.strategy.is_overtaken:
        applied, clipped = True, False
    elif applied:
        told = _clip(worker, parameters, norm=norm, verdict=verdict) if clipped else {}
        worker.optimizer.step(**told)
    else:
        if worker.released:  # each parameter decided for itself; this only closes the step
            worker.optimizer.step()
        left_out_for = left_out_for or _faults(worker, parameters, loss=nll_total / share, norm=norm_value)
    worker.strategy.after_step()
    worker.optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=nll_total / share,
        grad_norm=norm_value,
        applied=applied,
        clipped=clipped,
        stop_votes=int(votes),
        busy_s=worker.comm.clock.now() - started_s,
        left_out_for=left_out_for,
    )


def _judge(guard: GradGuard | None, parameters: Sequence[Tensor]) -> tuple[Tensor, Verdict | None]:
    """Return the norm of the whole gradient and what the guard makes of it; does not wait for the device."""
    if guard is None:
        return grad_norm(parameters), None
    if guard.history != "tensor":
        norm = grad_norm(parameters)
        return norm, guard.update(norm)
    norms = tensor_norms(parameters)
    return torch.linalg.vector_norm(norms), guard.update(norms)


def _clip(
    worker: Worker, parameters: Sequence[Tensor], *, norm: Tensor, verdict: Verdict | None
) -> dict[str, Any]:
    """Make the gradients smaller in place, as far as the optimizer does not; return what it is to be told."""
    if verdict is None:
        assert worker.clip_norm is not None, "nothing to clip by"
        clip_gradients(parameters, norm=norm, clip_norm=worker.clip_norm)
        return {}
    if not takes_grad_scale(worker.optimizer):
        scale_gradients(parameters, verdict.multiplier)
        return {}
    if verdict.factors is not None:
        scale_gradients(parameters, verdict.factors)
    return {"grad_scale": verdict.grad_scale}


def _faults(worker: Worker, parameters: Sequence[Tensor], *, loss: float, norm: float) -> str:
    """Say why a step is left out; all workers ask together, and only then do they wait for this."""
    names = {id(parameter): name for name, parameter in bare(worker.model).named_parameters()}
    nothing = torch.zeros((), device=worker.device)
    flags = nonfinite_flags([nothing if p.grad is None else p.grad for p in parameters])
    by_parameter = worker.comm.all_gather(flags.to(torch.uint8)).T.tolist()
    bad = [
        names.get(id(parameter), "a parameter outside the model")
        + ("" if all(at) else f" on worker {at.index(1)}")
        for parameter, at in zip(parameters, by_parameter, strict=True)
        if any(at)
    ]
    if bad:
        return f"NaN or Inf in the gradient of {', '.join(bad[:NAMED_OFFENDERS])}"
    if worker.guard is not None and math.isfinite(norm):
        return f"a gradient norm of {norm:g}, a spike by optim.guard.spike_skip={worker.guard.spike_skip}"
    return f"a loss of {loss:g} with a gradient norm of {norm:g}"
