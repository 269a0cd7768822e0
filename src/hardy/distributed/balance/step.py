"""One step by a plan: every worker's micro-batches, and the gradient of the global mean.

Paper: Hydraulis (arXiv 2412.07894). The model's weights lie in one way on all workers for the whole run
(FSDP2 or DDP over all); a plan only decides who computes what, so changing groups moves no weight. Losses
are sums and are divided once, by the targets of the whole batch: any plan gives the same gradient.

Differs from the paper's code: that takes the mean of means over micro-batches, which counts short ones more.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hardy.balance.plan import MicroBatch, Objective, Plan
from hardy.config import UserError
from hardy.distributed.balance.agreement import check_same_plan
from hardy.distributed.balance.layouts import idle_batch, shard_batch
from hardy.distributed.balance.pool import GroupPool
from hardy.distributed.balance.scheme import Sharer
from hardy.distributed.comm import Communicator
from hardy.distributed.sharded import accumulating, run_freely
from hardy.ops.packed import PackedBatch

PackOf = Callable[[tuple[int, ...]], PackedBatch]
"""Packs sequences, given by their indices in the plan, on the host: one document each, in order."""


class PlannedBatches:
    """Turns plans into micro-batches of one worker; keeps the groups that plans asked for.

    Args:
        comm: all workers; CPU tensors go through it too.
        sharer: how a group shares a micro-batch.
        check_plans: whether to compare each plan's hash over the workers first.
    """

    def __init__(self, comm: Communicator, sharer: Sharer, *, check_plans: bool = True) -> None:
        self.comm, self.sharer, self.check_plans = comm, sharer, check_plans
        self.pool = GroupPool(comm)

    def of(self, plan: Plan, pack_of: PackOf) -> list[PackedBatch]:
        """Return what this worker computes, in order; collective over all workers.

        Where workers meet in every slot all get one micro-batch for each slot, of zero weight where the plan
        has nothing for them. Where they run freely, each has its own number of them, at least one.

        Args:
            plan: the step's plan, the same on all workers.
            pack_of: what to pack; called with this worker's groups' sequences only.

        Raises:
            PlanMismatchError: workers have different plans.
            UserError: the plan is for another number of workers, or has tensor or pipeline parallel groups.
        """
        if self.check_plans:
            check_same_plan(self.comm, plan.hash())
        self._check_runs(plan)
        self.pool.prepare([group.ranks for group in plan.groups])
        planned = [plan.mine(slot, self.comm.rank) for slot in range(len(plan.slots))]
        batches = [self._batch(part, pack_of) for part in planned]
        if plan.objective == "lock_step":
            return [batch or idle_batch() for batch in batches]
        return [batch for batch in batches if batch] or [idle_batch()]

    def shared_widely(self, pack: PackedBatch) -> PackedBatch:
        """Return this worker's rows of a pack that its largest group shares, all documents cut: a probe."""
        group = self.pool.largest
        if group.size == 1:
            return pack
        sharer = replace(self.sharer, split_tokens=0)
        return shard_batch(pack, sharer.layout(pack.layout.lengths, group))

    def _batch(self, part: MicroBatch | None, pack_of: PackOf) -> PackedBatch | None:
        """Return this worker's rows of one micro-batch; none where it has nothing to do."""
        if part is None or not part.sequences:
            return None
        pack = planned_pack(part, pack_of)
        group = self.pool.group(part.group.ranks)
        return pack if group.size == 1 else shard_batch(pack, self.sharer.layout(pack.layout.lengths, group))

    def _check_runs(self, plan: Plan) -> None:
        if plan.world_size != self.comm.size:
            raise UserError(
                f"the plan is for {plan.world_size} workers and {self.comm.size} run; plan for "
                f"world_size={self.comm.size}"
            )
        for group in plan.groups:
            if group.scheme.tensor > 1 or group.scheme.pipeline > 1:
                raise UserError(
                    f"a group of the plan is {group.scheme}: only context parallel groups (cp) are executed "
                    f"here, tensor parallel ones (tp) by ReplicaTrainer, and pipelines (pp) are planned and "
                    f"simulated only; offer the planner schemes of context degree alone"
                )


def planned_pack(part: MicroBatch, pack_of: PackOf) -> PackedBatch:
    """Return the pack of a micro-batch.

    Raises:
        ValueError: it does not hold what the plan says.
    """
    pack = pack_of(part.sequences)
    if len(pack.layout.lengths) != len(part.sequences) or pack.layout.num_tokens != part.tokens:
        raise ValueError(
            f"the plan has {len(part.sequences)} sequences of {part.tokens} tokens here, their pack "
            f"{len(pack.layout.lengths)} documents of {pack.layout.num_tokens} tokens"
        )
    return pack


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """Of a whole step, the same on every worker."""

    nll_sum: float
    """Negative log-likelihood of all targets together, in nats."""
    num_targets: int
    """How many there were."""

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per target."""
        return self.nll_sum / self.num_targets


def balanced_step(
    model: nn.Module,
    batches: list[PackedBatch],
    comm: Communicator,
    *,
    objective: Objective,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> StepTotals:
    """Run forward and backward; leave in `grad` what averages over the workers to the global mean's gradient.

    A model of `parallelize` has averaged it when this returns, a plain one is averaged by
    `Synchronous.reduce_gradients`. Clip and update afterwards, as ever.

    Args:
        model: called as `model(tokens_T, layout, labels_T)`, returns the summed negative log-likelihood; its
            attention is `context_parallel_attention`.
        batches: this worker's micro-batches, of `PlannedBatches.of`.
        comm: all workers.
        objective: the plan's. Freely running workers keep FSDP2's weights and gradients whole meanwhile.
        device: where the model lives.
        autocast: makes the context of each forward pass.

    Raises:
        UserError: no token of the whole batch has a label.
    """
    own = torch.tensor(sum(batch.num_targets for batch in batches))
    num_targets = int(comm.sum(own))
    if num_targets == 0:
        raise UserError(
            "no token of this step's batch has a label, so there is no loss; leave such steps out"
        )
    nll_sum = torch.zeros((), dtype=torch.float64, device=device)
    for index, batch in enumerate(batches):
        batch, last = batch.to(device), index == len(batches) - 1
        with accumulating(model, last=last):
            if objective == "free_running":
                run_freely(model, last=last)
            with autocast():
                nll: Tensor = model(batch.tokens_T, batch.layout, batch.labels_T)
            (nll * (comm.size / num_targets)).backward()
        nll_sum += nll.detach()
    return StepTotals(nll_sum=comm.sum(nll_sum).item(), num_targets=num_targets)
