"""One optimizer step: forward and backward over the micro-batches, agree, clip, update.

Read this file first to see where a strategy acts; everything else in `train` is bookkeeping around it.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from hardy.distributed.comm import Communicator
from hardy.distributed.sharded import accumulating, clip_gradients, grad_norm
from hardy.distributed.strategy import Strategy
from hardy.ops.packed import PackedBatch
from hardy.optim.build import set_learning_rate


@dataclass(kw_only=True)
class Worker:
    """What one worker trains with; all workers hold the same things about the same model."""

    model: nn.Module
    """Called as `model(tokens_T, layout, labels_T)`, returns the summed negative log-likelihood."""
    optimizer: torch.optim.Optimizer
    strategy: Strategy
    comm: Communicator
    device: torch.device
    autocast: "AutocastSetting" = field(default_factory=lambda: AutocastSetting())
    clip_norm: float | None = None
    """Largest global gradient norm."""


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
    """Mean negative log-likelihood per target of the global batch, in nats."""
    grad_norm: float
    """Global gradient norm before clipping."""
    applied: bool
    """False when the loss or a gradient was not finite, so that the update was left out."""
    stop_votes: int
    """Workers that ask to stop after this step."""
    busy_s: float
    """Seconds this worker spent in forward, backward, reduction and optimizer."""


def train_step(
    worker: Worker, micro_batches: Sequence[PackedBatch], *, num_targets: int, lr: float, wants_stop: bool
) -> StepResult:
    """Make one optimizer step on this worker's share of the global batch.

    Every wrapper averages gradients over the workers, so each micro-batch's sum is scaled by workers /
    targets: any split of the batch over workers and micro-batches gives the gradient of the global mean.

    Args:
        worker: the model and what trains it.
        micro_batches: this worker's share; every worker has the same number.
        num_targets: labels of the global batch, over all workers.
        lr: learning rate of this step.
        wants_stop: whether this worker was asked to stop.
    """
    started_s = worker.comm.clock.now()
    worker.strategy.before_forward()
    nll_sum = torch.zeros((), dtype=torch.float64, device=worker.device)
    for i, batch in enumerate(micro_batches):
        with accumulating(worker.model, last=i == len(micro_batches) - 1):
            with worker.autocast.context():
                nll = worker.model(batch.tokens_T, batch.layout, batch.labels_T)
            (nll * (worker.comm.size / num_targets)).backward()
        nll_sum += nll.detach()
    worker.strategy.reduce_gradients()
    parameters = [p for group in worker.optimizer.param_groups for p in group["params"]]
    norm = grad_norm(parameters)
    totals = worker.comm.sum(torch.stack([nll_sum, nll_sum.new_tensor(float(wants_stop))]))
    # The step's only wait for the device: an update that holds a NaN must not happen.
    nll_total, votes, norm_value = torch.cat([totals, norm.double().reshape(1)]).tolist()
    applied = math.isfinite(nll_total) and math.isfinite(norm_value)
    if applied:
        if worker.clip_norm is not None and norm_value > worker.clip_norm:
            clip_gradients(parameters, norm=norm, clip_norm=worker.clip_norm)
        set_learning_rate(worker.optimizer, lr)
        worker.optimizer.step()
    worker.strategy.after_step()
    worker.optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=nll_total / num_targets,
        grad_norm=norm_value,
        applied=applied,
        stop_votes=int(votes),
        busy_s=worker.comm.clock.now() - started_s,
    )
