"""What the rounds of local-update training tell: a line of numbers for each, a warning now and then.

Letters as in `updates`.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hardy.distributed.comm import Communicator
from hardy.distributed.groups import OuterGroup
from hardy.distributed.local.drift import Watch, effective_contributors
from hardy.distributed.local.round import Pending

logger = logging.getLogger(__name__)


class Report:
    """Describes rounds as they end.

    Args:
        num_units: of each fragment.
    """

    def __init__(self, num_units: Sequence[int]) -> None:
        self.cosine = math.nan
        """Of this replica's D to S in its last round; the others learn it in the next."""
        self.joined: list[int] = []
        """Replicas that took the anchor over since the last round."""
        self.redone = 0
        """Times that the present round was begun again."""
        self._watches = [Watch(num_units=count) for count in num_units]
        self._met: list[int] = []
        self._line: dict[str, Any] = {}

    def note(
        self,
        pending: Pending,
        *,
        fragment: int,
        shards: Communicator,
        outer: OuterGroup,
        counters: Mapping[str, Any],
    ) -> None:
        """Describe a round that has ended; all workers of a replica call it.

        Args:
            pending: the round.
            fragment: whose units it exchanged.
            shards: the workers that hold parts of this replica.
            outer: the replicas.
            counters: what else belongs into the line.
        """
        numbers = describe(pending, shards, me=outer.rank)
        cosine = numbers["drift_cosine"]
        self.cosine = math.nan if cosine is None else cosine
        self._line = {**counters, **self._membership(outer), **numbers, "bytes_sent": outer.bytes_sent}
        table = pending.table
        clipped_U = torch.tensor([_is_clipped(pending, place) for place in range(len(table.units))])
        warning = self._watches[fragment].record(table.weights_NU, ~table.flags_NU, clipped_U)
        if warning is not None:
            self._line["warning"] = warning
            if outer.rank == shards.rank == 0:
                logger.warning("round %d: %s", counters["round"], warning)

    def take(self) -> dict[str, Any]:
        """Return the line of the round that has ended, if one did since the last call."""
        line, self._line = self._line, {}
        return line

    def _membership(self, outer: OuterGroup) -> dict[str, Any]:
        """Return who took part in a round, where that may change."""
        if not outer.is_elastic:
            return {}
        members = list(outer.members)
        joined = {*members} & {*self.joined} | {*members} - {*(self._met or members)}
        told = {"generation": outer.generation, "members": members, "joined": sorted(joined)}
        told |= {"redone": self.redone}
        self.joined, self.redone, self._met = [], 0, members
        return told

    def state_dict(self) -> dict[str, Any]:
        """Return what the next lines depend on: the cosine, and what is watched, by fragment."""
        state: dict[str, Any] = {"cosine": self.cosine if math.isfinite(self.cosine) else None}
        for fragment, watch in enumerate(self._watches):
            state |= {f"watch{fragment}_{key}": value for key, value in watch.state_dict().items()}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take it back."""
        self.cosine = math.nan if state_dict["cosine"] is None else state_dict["cosine"]
        for fragment, watch in enumerate(self._watches):
            watch.load_state_dict({key: state_dict[f"watch{fragment}_{key}"] for key in watch.state_dict()})


def describe(pending: Pending, shards: Communicator, *, me: int) -> dict[str, Any]:
    """Return the numbers of a finished round, for the metrics file; lists are by place of the replica.

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
    clipped = [_is_clipped(pending, place) for place in pending.factors]
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
        "replica_rates": table.rates_N.tolist(),
        "replica_norms": _finite(table.norms_NU.square().sum(1).sqrt()),
        "replica_weights": table.weights_NU.mean(1).tolist(),
        "replica_cosines_before": _finite(table.cosines_N),
    }


def _is_clipped(pending: Pending, place: int) -> bool:
    factor = pending.factors.get(place)
    return factor is not None and float(factor) < 1


def _finite(values_N: Tensor) -> list[float | None]:
    """Return the values, None where JSON has no word for one."""
    return [value if math.isfinite(value) else None for value in values_N.tolist()]
