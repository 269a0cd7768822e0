"""What a round of local-update training is made of: its parts, its table, its exchanges.

Letters as in `updates`.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hardy.distributed.local.anomaly import AnomalyGuard
from hardy.distributed.local.averaging import Aggregation
from hardy.distributed.local.compression import Compression
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
    judges_per_rate: bool = False
    inner_state: str = "keep"
    fragments: int = 1
    delay_steps: int = 0
    delay_rounds: int = 0
    mix: float = 0.0
    layerwise: bool = False
    offload: bool = False


CONTROL = 6
"""Numbers of a replica in a row of the table, before its norms."""


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
    rates_N: Tensor
    """fp64, sum of the learning rates of each replica since the last round of these units."""
    cosines_N: Tensor
    """fp64, cosine of each replica's D to S in its last round; NaN where it had none or a length was 0."""
    weights_NU: Tensor
    """fp64; 0 where left out."""

    @property
    def is_empty(self) -> list[bool]:
        """Of which units all replicas are left out, so that their anchors stay."""
        return self.flags_NU.all(0).tolist()

    def tensors(self) -> dict[str, Tensor]:
        """Return all but `units`."""
        names = ("norms_NU", "flags_NU", "steps_N", "rates_N", "cosines_N", "weights_NU")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def gathered(cls, units: list[int], rows_N: Tensor, aggregation: Aggregation) -> "Table":
        """Return the table that follows from the rows of all replicas.

        Args:
            units: U of them.
            rows_N: [N, CONTROL + 2 U]: steps, three numbers for the engine, rates, cosine, norms, flags.
            aggregation: gives the weights.
        """
        norms_NU, flags_NU = rows_N[:, CONTROL:].split(len(units), dim=1)
        flags_NU = flags_NU != 0
        seen_NU = torch.where(flags_NU, torch.inf, norms_NU)
        return cls(
            units=units,
            norms_NU=norms_NU,
            flags_NU=flags_NU,
            steps_N=rows_N[:, 0],
            rates_N=rows_N[:, 4],
            cosines_N=rows_N[:, 5],
            weights_NU=aggregation.weights(seen_NU, rows_N[:, 0]),
        )

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
    factors: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """Of the clip, by place of the units done; none where all replicas are left out."""
