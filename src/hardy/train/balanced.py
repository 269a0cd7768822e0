"""Global batches spread over the workers by a plan: the same pieces of documents, other hands.

Paper: Hydraulis (arXiv 2412.07894). What a global batch holds does not change, nor what its gradient is; only
who computes which piece of a document, alone or in a group that shares it. With `balance.delay_steps` batches
are levelled before, in the same way whatever the number of workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from hardy.balance.config import BalanceConfig
from hardy.balance.cost import DecoderSizes, LengthCostModel, SchemeCost, analytic_cost, load_cost, shape_hash
from hardy.balance.level import LevelledPieces
from hardy.balance.long_documents import Batch, LongDocuments, fit_pieces, too_long
from hardy.balance.plan import Objective, Plan, Scheme
from hardy.balance.planner import Mode, plan
from hardy.data.stream import PackStream
from hardy.distributed.balance.layouts import row_counts
from hardy.distributed.balance.probe import check_isolation
from hardy.distributed.balance.scheme import Sharer
from hardy.distributed.balance.step import PlannedBatches
from hardy.distributed.comm import Communicator
from hardy.distributed.sharded import bare
from hardy.model.presets import DecoderShape
from hardy.ops.packed import PackedBatch
from hardy.train.balance_report import CostCheck, GroupsFormed, OwnTime
from hardy.train.config import TrainConfig
from hardy.train.plan import RunPlan
from hardy.train.step import Worker


@dataclass(frozen=True, kw_only=True)
class Planning:
    """How each global batch is planned."""

    mode: Mode
    objective: Objective
    cost: LengthCostModel
    long_documents: LongDocuments = "error"
    """See `BalanceConfig.long_documents`."""
    isolation: Literal["check", "skip"] = "check"
    model_error: Literal["warn", "refit"] = "warn"
    delay_steps: int = 0
    """See `BalanceConfig.delay_steps`."""

    def cap_tokens(self, world_size: int) -> int:
        """Return the most tokens of one document that a group of workers holds."""
        return max(own.cap_tokens for own in self._schemes(world_size))

    def largest_group(self, world_size: int) -> int:
        """Return the most workers that may share a document."""
        return max(own.scheme.ranks for own in self._schemes(world_size))

    def _schemes(self, world_size: int) -> Sequence[SchemeCost]:
        free = self.mode == "dynamic_cp"
        return self.cost.context_schemes(world_size) if free else (self.cost.of(Scheme()),)


class BalancedBatches:
    """Which pieces of documents a worker computes at a step, by a plan of the step's whole batch.

    Before the first step all groups that a plan may ask for are made, and the model is tried: no document may
    see another.

    Args:
        stream: the packs whose pieces make a batch.
        batch_packs: packs of a batch.
        micro_packs: packs that a worker runs at once in validation.
        planned: turns plans into micro-batches.
        planning: how batches are planned.
        vocab_size: the model's, for trying it.
    """

    def __init__(
        self,
        stream: PackStream,
        *,
        batch_packs: int,
        micro_packs: int,
        planned: PlannedBatches,
        planning: Planning,
        vocab_size: int,
    ) -> None:
        self.micro_packs, self.planning, self._vocab_size = micro_packs, planning, vocab_size
        self._stream, self._planned = stream, planned
        self._levelled = LevelledPieces(
            stream.pieces,
            packs_per_epoch=stream.packs_per_epoch,
            batch_packs=batch_packs,
            delay_steps=planning.delay_steps,
            times=planning.cost.times,
        )
        self._cap_tokens = planning.cap_tokens(planned.comm.size)
        self._groups = GroupsFormed() if planning.mode == "dynamic_cp" and planned.comm.size > 1 else None
        self._check = CostCheck(planning.cost, refit=planning.model_error == "refit")
        self._batch: tuple[int, Batch] | None = None
        self._time: OwnTime | None = None
        self._now: Step | None = None

    def at(self, step: int, worker: Worker) -> list[PackedBatch]:
        """Return this worker's micro-batches of step `step` (from 0), on its device; all call it together.

        Raises:
            LeakError: before the first step: documents see each other.
            UserError: a document is longer than any group holds, and `long_documents` is error.
        """
        time, comm = self._time or self._begin(worker), self._planned.comm
        batch = self._pieces_of(step)
        began_s = comm.clock.now()
        made = plan(
            batch.lengths,
            world_size=comm.size,
            cost=self._check.cost,
            mode=self.planning.mode,
            objective=self.planning.objective,
        )
        planned_s = comm.clock.now()
        batches = self._planned.of(made, lambda own: self._stream.pack([batch.pieces[i] for i in own]))
        self._now = Step(
            batch=batch,
            delay_steps=self._levelled.at(step).delay_steps,
            made=made,
            plan_s=planned_s - began_s,
            rows=Rows.of(batches),
        )
        on_device = [each.to(worker.device) for each in batches]
        time.start()
        return on_device

    def num_targets(self, step: int) -> int:
        """Return the labels of the global batch of step `step`: of every token of its pieces."""
        return sum(self.lengths(step))

    def lengths(self, step: int) -> tuple[int, ...]:
        """Return the tokens of the pieces of the global batch of step `step`."""
        return self._pieces_of(step).lengths

    def take_report(self) -> dict[str, Any]:
        """Return what the last plan predicted and what its step took; all call it together, once a step."""
        now, self._now = self._now, None
        if now is None or self._time is None:
            return {}
        comm, made, lengths = self._planned.comm, now.made, now.batch.lengths
        own = torch.tensor([self._time.seconds(), *now.rows], dtype=torch.float64)
        seconds, rows, tokens, shared = comm.all_gather(own).T.tolist()
        check, before_s = self._check, self._check.seconds_per_unit
        report = _told(made, check.cost, now.batch) | {
            "plan_delay_steps": now.delay_steps,
            "plan_time_s": now.plan_s,
            "plan_predicted_s": None if before_s is None else before_s * made.cost,
            "plan_own_s": seconds[comm.rank],
            "plan_slowest_s": max(seconds),
            "plan_measured_idle_share": 1 - sum(seconds) / len(seconds) / max(seconds)
            if max(seconds)
            else 0.0,
            "plan_padding_share": 1 - sum(tokens) / sum(rows),
            "plan_shared_share": sum(shared) / sum(tokens),
        }
        if self._groups is not None:
            self._groups.add(made, lengths)
        fitted = check.add(made, lengths, seconds)
        if fitted is not None:
            check.use(of_first(fitted, comm))
        return report | {"plan_model_error": check.error}

    def closing_note(self) -> str | None:
        """Return why no group was formed, where groups were asked for and none was; else none."""
        return None if self._groups is None else self._groups.note(self._check.cost, self._planned.comm.size)

    def _pieces_of(self, step: int) -> "Batch":
        """Return the pieces of a global batch, none longer than a group holds."""
        if self._batch is None or self._batch[0] != step:
            how, most = self.planning.long_documents, self._cap_tokens
            self._batch = step, fit_pieces(self._levelled.at(step).pieces, most_tokens=most, how=how)
        return self._batch[1]

    def _begin(self, worker: Worker) -> OwnTime:
        """Make groups and try the model, before the first step."""
        planned = self._planned
        if self.planning.mode == "dynamic_cp":
            planned.pool.warm_up(self.planning.largest_group(planned.comm.size))
        if self.planning.isolation == "check":
            with worker.autocast.context():
                check_isolation(
                    bare(worker.model),
                    planned.comm,
                    vocab_size=self._vocab_size,
                    shard=planned.shared_widely,
                    device=worker.device,
                )
        self._time = OwnTime(worker.model.parameters(), planned.comm.clock, worker.device)
        return self._time


class Rows(NamedTuple):
    """What a worker computes in a step."""

    rows: int
    """Rows of all its micro-batches."""
    tokens: int
    """Those that are tokens of a document, and no filling."""
    shared: int
    """Those whose keys the worker's group gets, or that it exchanges heads of."""

    @classmethod
    def of(cls, batches: Sequence[PackedBatch]) -> "Rows":
        """Return the sums over micro-batches."""
        parts = [row_counts(batch) for batch in batches]
        return cls(*map(sum, zip(*parts, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step that was planned and is not reported yet."""

    batch: Batch
    delay_steps: int
    """Most steps by which a piece of it comes later than it was drawn."""
    made: Plan
    plan_s: float
    rows: Rows


def of_first(cost: LengthCostModel, comm: Communicator) -> LengthCostModel:
    """Return worker 0's coefficients on all workers, so that not a bit of their plans differs."""
    own = torch.tensor([[each.a, each.b, each.c] for each in cost.schemes], dtype=torch.float64)
    rows = comm.broadcast(own, source=0).tolist()
    schemes = [replace(each, a=a, b=b, c=c) for each, (a, b, c) in zip(cost.schemes, rows, strict=True)]
    return replace(cost, schemes=tuple(schemes))


def balanced_batches(
    config: TrainConfig, stream: PackStream, comm: Communicator, *, sizes: RunPlan, shape: DecoderShape
) -> BalancedBatches:
    """Return the batches that `balance.mode` describes; all workers call it together.

    Raises:
        ConfigError: settings that a plan cannot be made with.
        UserError: the file of costs cannot be read, is of another model, or has none of groups, which
            dynamic_cp forms; a document is too long.
    """
    balance = config.balance
    assert balance.mode != "none", "asked for where there is a plan"
    sharer = Sharer(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        scheme=balance.scheme,
        split_tokens=balance.split_tokens,
    )
    cost = cost_of(
        balance,
        shape,
        cap_tokens=balance.cap_tokens or sizes.micro.packs * config.data.pack_tokens,
        recompute=config.model.recompute != "nothing",
    )
    if balance.mode == "dynamic_cp":
        way_out = "set balance.mode to dispatch, which balances without groups"
        cost.check_groups(comm.size, source=f"balance.cost={balance.cost}", way_out=way_out)
    planning = Planning(
        mode=balance.mode,
        # FSDP2 gathers weights in every micro-batch, so workers meet there; under DDP only once a step.
        objective="lock_step" if sizes.shards > 1 else "free_running",
        cost=cost,
        long_documents=balance.long_documents,
        isolation=balance.isolation,
        model_error=balance.model_error,
        delay_steps=balance.delay_steps,
    )
    most_tokens, (document, longest) = planning.cap_tokens(comm.size), stream.longest_document
    if balance.long_documents == "error" and longest > most_tokens:
        raise too_long(longest, most_tokens=most_tokens, document=document)
    return BalancedBatches(
        stream,
        batch_packs=config.train.batch_packs,
        micro_packs=sizes.micro.packs,
        planned=PlannedBatches(comm, sharer),
        planning=planning,
        vocab_size=shape.vocab_size,
    )


def levelled_by(config: TrainConfig, shape: DecoderShape | None) -> dict[str, Any]:
    """Return the settings that decide how batches are levelled: a run that goes on must share them.

    Nothing where they stay as drawn.
    """
    balance = config.balance
    if not balance.delay_steps or shape is None:
        return {}
    cost = cost_of(balance, shape, cap_tokens=1, recompute=config.model.recompute != "nothing")
    short, long = cost.times([1024, 2048]).tolist()
    said = f"2,048 tokens take {long / short!r} times 1,024"
    return {"balance.delay_steps": balance.delay_steps, "balance.cost": said}


def cost_of(
    balance: BalanceConfig, shape: DecoderShape, *, cap_tokens: int, recompute: bool
) -> LengthCostModel:
    """Return what sequences cost: measured, or counted.

    Raises:
        UserError: the file cannot be read, or is of another model.
    """
    sizes = DecoderSizes(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        vocab_size=shape.vocab_size,
    )
    if balance.cost is None:
        return analytic_cost(sizes, cap_tokens=cap_tokens, recompute=recompute)
    found = load_cost(Path(balance.cost), model_hash=shape_hash(sizes))
    return found if balance.cap_tokens is None else found.with_cap(cap_tokens)


def _told(made: Plan, cost: LengthCostModel, batch: Batch) -> dict[str, Any]:
    """Return what is known of a step before it is made."""
    uses = [
        own.tokens / cost.of(own.group.scheme).cap_tokens for slot in made.slots for own in slot if own.tokens
    ]
    bound = made.bound_by
    return {
        "plan_cost": made.cost,
        "plan_unit": cost.unit,
        "plan_gap": made.gap,
        "plan_bound_document": None if bound is None else batch.pieces[bound].document,
        "plan_bound_tokens": None if bound is None else batch.lengths[bound],
        "plan_idle_share": made.idle_share,
        "plan_cap_use": sum(uses) / len(uses),
        "plan_cap_use_most": max(uses),
        "plan_groups": sorted((group.scheme.ranks for group in made.groups), reverse=True),
        "plan_long_documents": batch.num_long,
        "plan_tokens_left_out": batch.num_left_out,
    }
