"""What a round of local-update training is made of: its parts, its table, its exchanges, its report.

Letters as in `updates`.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hardy.distributed.comm import Communicator
from hardy.distributed.local.anomaly import AnomalyGuard
from hardy.distributed.local.averaging import Aggregation
from hardy.distributed.local.compression import Compression
from hardy.distributed.local.drift import effective_contributors
from hardy.distributed.local.outer import OuterOptimizer
from hardy.distributed.local.triggers import Trigger


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a local-update strategy is composed of."""

    trigger: Trigger
    aggregation: Aggregation
    anomaly: Callable[[int], AnomalyGuard]
    """Makes the guard for a number of units; each fragment has its own."""
    compression: Compression
    outer_optimizer: OuterOptimizer


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How rounds are carried out; the settings of `LocalUpdateConfig` that no part takes."""

    warmup_steps: int = 0
    clip_norm: float | None = None
    inner_state: str = "keep"
    fragments: int = 1
    delay_steps: int = 0
    delay_rounds: int = 0
    mix: float = 0.0
    layerwise: bool = False
    offload: bool = False


@dataclass(kw_only=True)
class Table:
    """What all replicas know of a round; columns are places in `units`."""

    units: list[int]
    norms_NU: Tensor
    """fp64, G as it was; NaN and infinite too."""
    flags_NU: Tensor
    """bool: left out."""
    steps_N: Tensor
    """fp64, inner steps of each replica since the last round."""
    weights_NU: Tensor
    """fp64; 0 where left out."""

    @property
    def is_empty(self) -> list[bool]:
        """Of which units all replicas are left out, so that their anchors stay."""
        return self.flags_NU.all(0).tolist()

    def tensors(self) -> dict[str, Tensor]:
        """Return all but `units`."""
        names = ("norms_NU", "flags_NU", "steps_N", "weights_NU")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def of(cls, units: list[int], tensors: Mapping[str, Tensor]) -> "Table":
        """Return the table that `tensors` was taken from."""
        return cls(units=units, **tensors)


Exchanged = tuple[Tensor, Tensor]
"""S before clipping, and [<S, S>, <D, S>, <D, D>] of this worker's part, fp64."""


@dataclass(kw_only=True)
class Pending:
    """A round between its beginning and its end."""

    table: Table
    due_step: int
    """The step after which the result is applied."""
    exchanged: list["Future[Exchanged] | None"]
    """By place in `table.units`; None where not begun."""
    done: list[bool]
    products: list[Tensor] = field(default_factory=list)
    """[<S, S>, <D, S>, <D, D>] of the units done."""
    has_leftovers_kept: bool = False
    factors: list[Tensor] = field(default_factory=list)
    """Of the clip, by unit done."""


def check_alike(vectors: Sequence[Tensor], outer: Communicator, *, names: Sequence[str]) -> None:
    """Refuse replicas whose weights differ.

    Args:
        vectors: of each unit, this replica's.
        outer: the replicas.
        names: of the units.

    Raises:
        RuntimeError: they do; the text names the units.
    """
    sums_U = torch.stack([torch.stack([x.double().sum(), x.double().abs().sum()]) for x in vectors]).cpu()
    apart = (outer.all_gather(sums_U) != sums_U).any(-1).any(0)
    if apart.any():
        differing = [name or "the root" for name, is_apart in zip(names, apart, strict=True) if is_apart]
        raise RuntimeError(
            f"the replicas' weights differ in {', '.join(differing[:3])} before they train alone; start all "
            f"from the same checkpoint or seed"
        )


def describe(pending: Pending, shards: Communicator, *, me: int) -> dict[str, Any]:
    """Return the numbers of a finished round, for the metrics file.

    Args:
        pending: the round.
        shards: the workers that hold parts of this replica.
        me: this replica's place.
    """
    table = pending.table
    sum_square, dot, own_square = shards.sum(torch.stack(pending.products).sum(0)).tolist()
    length = (sum_square * own_square) ** 0.5
    healthy_U = ~table.flags_NU.all(0)
    contributors_U = effective_contributors(table.weights_NU)[healthy_U]
    clipped = [float(factor) < 1 for factor in pending.factors]
    flagged_N = table.flags_NU.any(1)
    return {
        "replicas": len(flagged_N),
        "pseudo_grad_norm": own_square**0.5,
        "outer_grad_norm": sum_square**0.5,
        "drift_cosine": dot / length if length > 0 else None,
        "effective_replicas": contributors_U.mean().item() if len(contributors_U) else 0.0,
        "weight": table.weights_NU[me].mean().item(),
        "flagged_replicas": flagged_N.nonzero().flatten().tolist(),
        "nonfinite_units": int((~table.norms_NU.isfinite()).sum()),
        "clip_share": sum(clipped) / len(clipped) if clipped else 0.0,
        "replica_steps": table.steps_N.tolist(),
    }
