"""Robust aggregation where gradients are reduced: inside one FSDP2 group, or by DDP. A worker here is a rank.

By public hooks: DDP's communication hook, FSDP2's custom reduce-scatter. Ranks exchange slices (`slices`), so
the bytes are those of a ring all-reduce. A rule that looks at each coordinate alone works bucket by bucket; a
row that is not finite is then left out of the buckets where it is not. Other rules need whole gradients: all
slices are kept until the backward pass has ended, one gradient more in memory per rank.

Letters: N ranks, d values of a slice.
"""

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

# Documented, but torch does not mark it as exported.
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.fsdp import FSDPModule
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from hardy.config import ConfigError
from hardy.distributed.comm import Communicator
from hardy.distributed.robust.combine import NOTHING_LEFT, Combiner, middle_loss
from hardy.distributed.robust.slices import first_columns
from hardy.distributed.sharded import local_part
from hardy.distributed.strategy import Strategy

logger = logging.getLogger(__name__)


class RobustRanks(Strategy):
    """Combine the ranks' gradients by a rule where DDP or FSDP2 would add them up.

    Args:
        model: wrapped by DDP, or by FSDP2 over one line of shards.
        comm: all ranks.
        combiner: the rule at work on `comm.size` rows.

    Raises:
        ConfigError: the model is not wrapped, or this torch has no custom reduce-scatter.
    """

    def __init__(self, model: nn.Module, comm: Communicator, combiner: Combiner) -> None:
        self._comm, self._combine = comm, combiner
        self._model, self._step = model, 0
        self._is_found = True
        if isinstance(model, DistributedDataParallel):
            self._reducer: _DDPBuckets | _Scatters = _DDPBuckets(self)
            model.register_comm_hook(self._reducer, _ddp_hook)
        elif isinstance(model, FSDPModule):
            self._reducer = _Scatters(self)
            _set_reduce_scatter(model, self._reducer)
        else:
            raise ConfigError(
                "strategy.worker='rank' needs real workers that share a model by DDP or FSDP2; set it to "
                "'replica'"
            )

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._comm.size

    @property
    def is_coordinate(self) -> bool:
        """Whether the rule can be asked bucket by bucket."""
        return self._combine.aggregator.is_coordinate

    @property
    def refusal(self) -> str:
        """Why this step must not be applied; empty where it may."""
        return "" if self._is_found else NOTHING_LEFT

    def before_forward(self) -> None:
        """Begin a step."""
        self._is_found = True

    def reduce_gradients(self) -> None:
        """Finish what waited for the whole gradient."""
        self._reducer.finish(self._model)
        self._step += 1

    def joint_totals(self, totals: Tensor, comm: Communicator) -> Tensor:
        """Return [loss, votes to stop] of the step; the loss of those in the middle stands for all."""
        rows_N2 = comm.all_gather(totals)
        loss = middle_loss(rows_N2[:, 0], num_faulty=self._combine.aggregator.num_faulty)
        return torch.stack([loss * comm.size, rows_N2[:, 1].sum()])

    def take_report(self) -> dict[str, Any]:
        """Return who was believed at this step."""
        return self._combine.take_report() | {
            "combined_steps": self._step,
            "bytes_sent": self._comm.bytes_sent,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the steps done and, as far as it holds no gradients, what the rule remembers.

        Columns of gradients are not saved: DDP puts parameters into another order after its first step.
        """
        state = self._combine.aggregator.state_dict()
        forgets = any(isinstance(value, Tensor) for value in state.values())
        return {"about": {"step": self._step, "rule": {} if forgets else state, "forgets": forgets}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self._step = state_dict["about"]["step"]
        if state_dict["about"].get("forgets"):
            logger.warning(
                "strategy.rule=%r begins anew with the gradients that it remembers, for strategy.worker="
                "'rank' saves none: the run goes on, but not bit for bit; take strategy.worker='replica' "
                "where it must",
                self._combine.aggregator.rule.name,
            )
        if state_dict["about"]["rule"]:
            self._combine.aggregator.load_state_dict(state_dict["about"]["rule"])

    def forget_columns(self) -> None:
        """Let the rule begin anew with what it remembers column by column."""
        self._combine.aggregator.forget_columns()

    def trade(self, flat: Tensor) -> Tensor:
        """Return this rank's slice of everyone's values, [N, d]; `flat` has a multiple of N."""
        return self._comm.all_to_all(flat.view(self.size, -1))

    def gather(self, slice_d: Tensor) -> Tensor:
        """Return everyone's slices as one flat tensor."""
        return self._comm.all_gather(slice_d).reshape(-1)

    def combine(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return what the rule makes of blocks; zeros where it finds nothing, and the step is left out."""
        found = self._combine(
            blocks,
            step=self._step,
            total=self._comm.sum,
            first_columns=first_columns([block.shape[1] for block in blocks], self._comm),
        )
        if found is None:
            self._is_found = False
            return [torch.zeros_like(block[0]) for block in blocks]
        return found


class _DDPBuckets:
    """Buckets of DDP, answered one by one, or all when the last has come."""

    def __init__(self, ranks: RobustRanks) -> None:
        self._ranks = ranks
        self._waiting: list[tuple[Tensor, Tensor, Future[Tensor]]] = []
        self._order: list[int] = []
        self._known_order: list[int] = []

    def take(self, bucket: GradBucket) -> Future[Tensor]:
        """Return what will hold the combined bucket."""
        ranks, buffer = self._ranks, bucket.buffer()
        padded = nn.functional.pad(buffer, (0, -buffer.numel() % ranks.size))
        future: Future[Tensor] = Future()
        self._waiting.append((buffer, ranks.trade(padded), future))
        if not ranks.is_coordinate:
            self._order += [id(param) for param in bucket.parameters()]
        if ranks.is_coordinate or bucket.is_last():
            if bucket.is_last():
                self._watch_order()
            slices = ranks.combine([block for _, block, _ in self._waiting])
            for (held, _, answer), slice_d in zip(self._waiting, slices, strict=True):
                held.copy_(ranks.gather(slice_d)[: held.numel()])
                answer.set_result(held)
            self._waiting = []
        return future

    def _watch_order(self) -> None:
        """Let the rule forget what it knows by columns where DDP has put parameters into another order."""
        if self._known_order and self._order != self._known_order:
            self._ranks.forget_columns()
        self._known_order, self._order = self._order, []

    def finish(self, model: nn.Module) -> None:
        """Nothing is left when the backward pass has ended."""


def _ddp_hook(state: _DDPBuckets, bucket: GradBucket) -> Future[Tensor]:
    return state.take(bucket)


class _Scatters:
    """FSDP2's reduce-scatter: one call for each unit of a backward pass."""

    def __init__(self, ranks: RobustRanks) -> None:
        self._ranks = ranks
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return memory for a call."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: object,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Give this rank its shard of what the rule makes of everyone's unit; or keep it for `finish`."""
        block = self._ranks.trade(input_tensor)
        if self._ranks.is_coordinate:
            output_tensor.copy_(self._ranks.combine([block])[0])
            return
        # Until then no number: whoever uses it as it is gets a NaN and not a poisoned mean.
        output_tensor.fill_(torch.nan)
        self._waiting.append((block, output_tensor))

    def finish(self, model: nn.Module) -> None:
        """Combine all units of a backward pass, and write into the gradients that FSDP2 has made."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        _check_views(model, [output for _, output in waiting])
        for (_, output), shard in zip(waiting, self._ranks.combine([b for b, _ in waiting]), strict=True):
            output.copy_(shard)


def _set_reduce_scatter(model: nn.Module, reduce: _Scatters) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if not hasattr(module, "set_custom_reduce_scatter"):
                raise ConfigError(
                    f"strategy.worker='rank' with strategy.mesh.shards above 1 needs a torch whose FSDP2 "
                    f"takes a reduce-scatter from outside, and torch {torch.__version__} does not; set "
                    f"strategy.worker to 'replica'"
                )
            # Its abstract class is private; what has the two methods will do.
            module.set_custom_reduce_scatter(cast("Any", reduce))
            # Every rank's gradient counts as it is; the rule makes the average.
            module.set_gradient_divide_factor(1.0)


def _check_views(model: nn.Module, outputs: Sequence[Tensor]) -> None:
    """Refuse gradients that are copies of what the reduce-scatter gave: they could not be written later."""
    ours = {output.untyped_storage().data_ptr() for output in outputs}
    for name, param in model.named_parameters():
        grad = None if param.grad is None else local_part(param.grad)
        if grad is not None and grad.numel() and grad.untyped_storage().data_ptr() not in ours:
            raise ConfigError(
                f"the gradient of {name} is a copy of what was reduced, so a rule that needs whole gradients "
                f"cannot set it: gradients are reduced in another dtype than the parameters have, are "
                f"offloaded, or were not cleared; use strategy.worker='replica', or a rule such as "
                f"strategy.rule=trimmed_mean without strategy.pre"
            )
