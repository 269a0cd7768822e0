"""Replicas of different tensor-parallel degree train one model; which replicas may change at every step.

Paper: Hydraulis (arXiv 2412.07894), its separation of optimizer and compute. Master weights and optimizer
states lie for ever in one layout over all ranks (`masters`). A step fills the layout of its replicas from
there, computes, and adds the gradients up there: changing replicas moves no optimizer state.

Executed here: tensor-parallel replicas. Pipelines are planned and simulated only (`hardy.balance`).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from hardy.balance.plan import Group, Plan, Scheme
from hardy.config import UserError
from hardy.distributed.balance.agreement import check_same_plan
from hardy.distributed.balance.bridge import Replicas, replica_of
from hardy.distributed.balance.masters import MasterWeights
from hardy.distributed.balance.pool import GroupPool
from hardy.distributed.balance.step import PackOf, StepTotals, planned_pack
from hardy.distributed.balance.tensor_parallel import TensorGroup, TensorSplits
from hardy.distributed.comm import Alone, MailCommunicator


class ReplicaTrainer:
    """One model, trained by replicas that are formed anew for every step; one of these on every rank.

    Give `masters.parameters()` to an optimizer. `step` leaves the gradient in them; then update as ever.

    Args:
        model: complete, with the same weights on every rank. Its parameters are exchanged for what this
            rank computes with, at every step.
        comm: all workers.
        splits: how ranks share the model, such as `decoder_splits(model.shape)`.
        compute_dtype: of the weights in the model and of what is sent; none takes that of the masters.
        check_plans: whether to compare each plan's hash over the workers first.

    Raises:
        UserError: the model's parameters cannot be cut (see `MasterWeights`).
    """

    def __init__(
        self,
        model: nn.Module,
        comm: MailCommunicator,
        splits: TensorSplits,
        *,
        compute_dtype: torch.dtype | None = None,
        check_plans: bool = True,
    ) -> None:
        self.model, self.comm, self.splits, self.check_plans = model, comm, splits, check_plans
        self.masters = MasterWeights(model, comm, splits, compute_dtype=compute_dtype)
        self.pool = GroupPool(comm)
        self.tensor_group = TensorGroup(model, splits)

    def step(
        self,
        plan: Plan,
        pack_of: PackOf,
        *,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> StepTotals:
        """Compute the gradient of the global mean by the replicas of `plan`, and leave it in the masters.

        Collective over all workers. Replicas may have different numbers of micro-batches, or none.

        Args:
            plan: the step's, the same on all workers; its groups are tensor parallel.
            pack_of: what to pack; called with the sequences of this worker's replica, on each of its ranks.
            autocast: makes the context of each forward pass.

        Raises:
            PlanMismatchError: workers have different plans.
            UserError: the plan cannot be run here, or no token of the whole batch has a label.
        """
        if self.check_plans:
            check_same_plan(self.comm, plan.hash())
        replicas = replicas_of(plan, num_workers=self.comm.size)
        parts = [part for part in plan.of_rank(self.comm.rank) if part.sequences]
        batches = [planned_pack(part, pack_of).to(self.masters.device) for part in parts]
        # All ranks of a replica compute the same loss; the first one tells it.
        mine = replica_of(self.comm.rank, replicas)
        share = 1 if mine is not None and mine.first_rank == self.comm.rank else 0
        own_targets = torch.tensor(share * sum(batch.num_targets for batch in batches))
        num_targets = int(self.comm.sum(own_targets))
        if num_targets == 0:
            raise UserError(
                "no token of this step's batch has a label, so there is no loss; leave such steps out"
            )
        self.fill(replicas)
        nll_sum = torch.zeros((), dtype=torch.float64, device=self.masters.device)
        for batch in batches:
            with autocast():
                nll: Tensor = self.model(batch.tokens_T, batch.layout, batch.labels_T)
            (nll / num_targets).backward()
            nll_sum += share * nll.detach()
        self.masters.give_back(replicas)
        return StepTotals(nll_sum=self.comm.sum(nll_sum).item(), num_targets=num_targets)

    def fill(self, replicas: Replicas, *, precision: Literal["compute", "master"] = "compute") -> None:
        """Make the model this rank's share of a replica; collective.

        Args:
            replicas: of the step, the same on all workers.
            precision: of the weights, as in `MasterWeights.fill`.

        Raises:
            UserError: the ranks of a replica cannot share the model equally.
        """
        for degree in {group.scheme.tensor for group in replicas}:
            self.splits.check(degree)
        self.pool.prepare([group.ranks for group in replicas])
        mine = replica_of(self.comm.rank, replicas)
        self.tensor_group.group = Alone() if mine is None else self.pool.group(mine.ranks)
        self.masters.fill(replicas, precision=precision)

    def gather_whole(self) -> None:
        """Give every rank the complete model in the masters' dtype, to evaluate or save it; collective."""
        alone = tuple(Group(first_rank=rank, scheme=Scheme()) for rank in range(self.comm.size))
        self.fill(alone, precision="master")


def replicas_of(plan: Plan, *, num_workers: int) -> Replicas:
    """Return the replicas of a plan, by first rank.

    Args:
        plan: of one step.
        num_workers: that run it.

    Raises:
        UserError: the plan is for another number of workers, its groups change within the step, or one of
            them is not tensor parallel alone.
    """
    if plan.world_size != num_workers:
        raise UserError(
            f"the plan is for {plan.world_size} workers and {num_workers} run; plan for "
            f"world_size={num_workers}"
        )
    replicas = tuple(sorted(plan.groups, key=lambda group: group.first_rank))
    for group in replicas:
        if group.scheme.pipeline > 1 or group.scheme.context > 1:
            raise UserError(
                f"a replica of the plan is {group.scheme}: replicas of tensor degree alone (tp) are executed "
                f"here; pipelines (pp) are planned and simulated only, context-parallel groups (cp) are run "
                f"by PlannedBatches"
            )
    for group, following in pairwise(replicas):
        if following.first_rank <= group.ranks[-1]:
            raise UserError(
                f"rank {following.first_rank} is in two groups of the plan, but replicas stay for the whole "
                f"step; plan with plan_strategies, or with objective='free_running'"
            )
    return replicas
