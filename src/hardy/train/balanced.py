"""Global batches spread over the workers by a plan: the same pieces of documents, other hands.

Paper: Hydraulis (arXiv 2412.07894). What a global batch holds does not change, nor what its gradient is; only
who computes which piece of a document, alone or in a group that shares it.
"""

from pathlib import Path
from typing import Any

from hardy.balance.config import BalanceConfig
from hardy.balance.cost import DecoderSizes, LengthCostModel, analytic_cost, load_cost, shape_hash
from hardy.balance.plan import Objective, Plan
from hardy.balance.planner import Mode, plan
from hardy.config import ConfigError
from hardy.data.stream import PackStream
from hardy.distributed.balance.scheme import Sharer
from hardy.distributed.balance.step import PlannedBatches
from hardy.distributed.comm import Communicator
from hardy.model.presets import DecoderShape
from hardy.ops.packed import PackedBatch
from hardy.train.config import TrainConfig
from hardy.train.plan import RunPlan
from hardy.train.step import Worker


class BalancedBatches:
    """Which pieces of documents a worker computes at a step, by a plan of the step's whole batch.

    Args:
        stream: the packs whose pieces make a batch.
        batch_packs: packs of a batch.
        micro_packs: packs that a worker runs at once in validation.
        planned: turns plans into micro-batches.
        cost: what sequences cost.
        mode: see `plan`.
        objective: see `plan`.
    """

    def __init__(
        self,
        stream: PackStream,
        *,
        batch_packs: int,
        micro_packs: int,
        planned: PlannedBatches,
        cost: LengthCostModel,
        mode: Mode,
        objective: Objective,
    ) -> None:
        self.micro_packs = micro_packs
        self._stream, self._batch_packs, self._planned = stream, batch_packs, planned
        self._cost = cost
        self._mode: Mode = mode
        self._objective: Objective = objective
        self._report: dict[str, Any] = {}

    def at(self, step: int, worker: Worker) -> list[PackedBatch]:
        """Return this worker's micro-batches of step `step` (from 0), on its device; all call it together."""
        pieces = self._stream.pieces(self._packs(step))
        made = plan(
            [piece.stop - piece.start for piece in pieces],
            world_size=self._planned.comm.size,
            cost=self._cost,
            mode=self._mode,
            objective=self._objective,
        )
        self._report = _told(made, self._cost)
        batches = self._planned.of(made, lambda own: self._stream.pack([pieces[i] for i in own]))
        return [batch.to(worker.device) for batch in batches]

    def num_targets(self, step: int) -> int:
        """Return the labels of the global batch of step `step`."""
        return self._stream.num_targets(self._packs(step))

    def take_report(self) -> dict[str, Any]:
        """Return what the last plan predicted, in the unit of the costs."""
        report, self._report = self._report, {}
        return report

    def _packs(self, step: int) -> range:
        return range(step * self._batch_packs, (step + 1) * self._batch_packs)


def balanced_batches(
    config: TrainConfig, stream: PackStream, comm: Communicator, *, sizes: RunPlan, shape: DecoderShape
) -> BalancedBatches:
    """Return the batches that `balance.mode` describes; all workers call it together.

    Raises:
        ConfigError: settings that a plan cannot be made with.
        UserError: the file of costs cannot be read, or is of another model.
    """
    balance = config.balance
    assert balance.mode != "none", "asked for where there is a plan"
    planned = PlannedBatches(
        comm,
        Sharer(
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            scheme=balance.scheme,
            split_tokens=balance.split_tokens,
        ),
    )
    return BalancedBatches(
        stream,
        batch_packs=config.train.batch_packs,
        micro_packs=sizes.micro.packs,
        planned=planned,
        cost=cost_of(
            balance,
            shape,
            cap_tokens=balance.cap_tokens or sizes.micro.packs * config.data.pack_tokens,
            recompute=config.model.recompute != "nothing",
        ),
        mode=balance.mode,
        objective="lock_step" if sizes.shards > 1 else "free_running",
    )


def check_balance(config: TrainConfig) -> None:
    """Refuse what no plan can be carried out with.

    Raises:
        ConfigError: the strategy, the model or the optimizer, and the way out.
    """
    if config.balance.mode == "none":
        return
    if config.strategy.name != "synchronous":
        raise ConfigError(
            f"balance.mode={config.balance.mode!r} spreads the batch over all workers, and strategy.name="
            f"{config.strategy.name!r} lets each have its own; set strategy.name to synchronous, or "
            f"balance.mode to none"
        )
    if config.model.name.startswith("hf:"):
        raise ConfigError(
            f"balance.mode={config.balance.mode!r} needs a model whose attention can be shared, and model."
            f"name={config.model.name!r} brings its own; set balance.mode to none"
        )
    if getattr(config.optim, "release", False):
        raise ConfigError(
            f"balance.mode={config.balance.mode!r} gives steps different numbers of micro-batches, which "
            f"optim.release=true must know; set one of them to its default"
        )


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


def _told(made: Plan, cost: LengthCostModel) -> dict[str, Any]:
    return {
        "plan_cost": made.cost,
        "plan_unit": cost.unit,
        "plan_gap": made.gap,
        "plan_idle_share": made.idle_share,
        "plan_groups": sorted((group.scheme.ranks for group in made.groups), reverse=True),
    }
