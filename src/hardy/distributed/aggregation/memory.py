"""What an aggregator carries from step to step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hardy.distributed.aggregation.columns import Rows
from hardy.distributed.aggregation.history import History
from hardy.distributed.aggregation.stack import working_dtype


@dataclass(frozen=True, kw_only=True)
class Memory:
    """State of the rule, and vectors: this worker's columns of them. Replaced as a whole, never changed."""

    state: Mapping[str, Any]
    """Tensors and plain values, equal on all workers."""
    vector: list[Tensor] | None = None
    """The last vector, one piece per block, in the dtype of the sums: what bf16 rounds away may add up."""
    last_rows: Mapping[int, list[Tensor]] = field(default_factory=dict)
    """What each worker sent the last time, one piece per block."""
    history: History | None = None
    """What each worker sent on average."""

    @classmethod
    def of(cls, state_dict: Mapping[str, Any], *, decay: float = 0.0) -> "Memory":
        """Return what was saved; with a decay, its rows are averages over steps."""
        pieces = {key: value.clone() for key, value in state_dict.items() if key.startswith("vector/")}
        last_rows: dict[int, list[Tensor]] = {}
        rows = {key: value for key, value in state_dict.items() if key.startswith("row/")}
        for key in sorted(rows, key=lambda key: int(key.rpartition("/")[2])):
            last_rows.setdefault(int(key.split("/")[1]), []).append(rows[key].clone())
        ages = {key: state_dict[key] for key in state_dict if key.startswith("age/")}
        history = None
        if decay and ages:
            in_order = [ages[f"age/{worker}"] for worker in range(len(ages))]
            history, last_rows = History.of(last_rows, in_order, decay), {}
        return cls(
            state={key: _copied(state_dict[key]) for key in state_dict if key not in pieces | rows | ages},
            vector=[pieces[f"vector/{i}"] for i in range(len(pieces))] or None,
            last_rows=last_rows,
            history=history,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state, the pieces of the vector as `vector/BLOCK`, of rows, the last ones or averages,
        as `row/WORKER/BLOCK`."""
        return {
            **{key: _copied(value) for key, value in self.state.items()},
            **{f"vector/{i}": piece.clone() for i, piece in enumerate(self.vector or [])},
            **{
                f"row/{worker}/{i}": piece.clone()
                for worker, pieces in self.last_rows.items()
                for i, piece in enumerate(pieces)
            },
            **({} if self.history is None else self.history.state_dict()),
        }

    def vector_for(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return the last vector, zeros before the first, on the devices of the blocks."""
        if self.vector is None:
            return [block.new_zeros(block.shape[1], dtype=working_dtype(block)) for block in blocks]
        return [piece.to(block.device) for piece, block in zip(self.vector, blocks, strict=True)]

    def changes(self, rows: Rows, workers: Sequence[int]) -> Tensor:
        """Return the squared distance of each row to what its worker sent last; NaN the first time."""
        known = [i for i, worker in enumerate(workers) if worker in self.last_rows]
        changes_R = torch.full((len(workers),), torch.nan, dtype=torch.float64)
        if known:
            seen = Rows(blocks=rows.blocks, places=[rows.places[i] for i in known], total=rows.total)
            last = [
                [piece.to(b.device) for piece, b in zip(self.last_rows[workers[i]], rows.blocks, strict=True)]
                for i in known
            ]
            changes_R[known] = seen.changes(last)
        return changes_R

    def with_rows(self, blocks: Sequence[Tensor], places: Sequence[int], workers: Sequence[int]) -> "Memory":
        """Return the memory with some rows in place of what their workers sent before."""
        rows = {workers[i]: [block[i].clone() for block in blocks] for i in places}
        return Memory(state=self.state, vector=self.vector, last_rows={**self.last_rows, **rows})


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
