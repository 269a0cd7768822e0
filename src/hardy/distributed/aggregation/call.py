"""What one call of an aggregator is given, checked, and what it returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hardy.distributed.aggregation.columns import Rows
from hardy.distributed.aggregation.stack import RowNumbers, Total, identity


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a stack."""

    vectors: list[Tensor] | None
    """One per block, in its dtype and on its device. None: the step is left out, or only weights were
    asked for."""
    weights: Tensor | None
    """float64 [N] on the CPU, 0 for rows that were removed. None for rules of columns, and where `taken` is
    not "rows". Of a rule with memory they lack the weight of its last vector."""
    taken: Literal["rows", "reference", "nothing"]
    """Whether the vectors come from the rows, or are the trusted gradient, or there are none."""
    removed: tuple[int, ...] = ()
    """Rows that held NaN or infinity."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Numbers and lists. `accepted` names rows of the stack; other lists have a number per row left."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one call is given."""

    numbers: RowNumbers
    sample_weights_N: Tensor
    workers: tuple[int, ...]
    step: int
    blocks: list[Tensor] | None = None
    """None where only what the workers report is known."""
    references: list[Tensor] | None = None
    own_row: int | None = None
    total: Total = identity
    first_columns: Sequence[int] | None = None

    def good_rows(self) -> Tensor:
        """Return which rows are finite, by their numbers alone: bool [N]."""
        numbers = self.numbers
        good_N = numbers.squares_N.isfinite() & (numbers.squares_N >= 0)
        if numbers.dots_N is not None and 0 < numbers.reference_square < torch.inf:
            good_N &= numbers.dots_N.isfinite()
        return good_N

    def rows(self, places: Sequence[int]) -> Rows | None:
        """Return some rows, where they are here."""
        if self.blocks is None:
            return None
        return Rows(
            blocks=self.blocks,
            places=places,
            total=self.total,
            references=self.references,
            first_columns=self.first_columns,
        )

    def trusted_vectors(self) -> list[Tensor] | None:
        """Return copies of the trusted gradient as vectors of the blocks, where they are here."""
        if self.blocks is None or self.references is None:
            return None
        pairs = zip(self.references, self.blocks, strict=True)
        return [g.to(block.device, block.dtype, copy=True) for g, block in pairs]


def stack_of(rows: Tensor | Sequence[Tensor]) -> Tensor:
    """Return a stack [N, d] of vectors, or the stack that was given; refuse rows that make none.

    Example:
        >>> stack_of([torch.ones(3), torch.ones(2)])
        Traceback (most recent call last):
        ...
        ValueError: rows must be vectors of one length on one device; row 0 is [3] on cpu, row 1 is [2] on cpu
    """
    if isinstance(rows, Tensor):
        if rows.ndim != 2:
            raise ValueError(
                f"rows must be a stack [N, d] or a list of vectors, got shape {list(rows.shape)}"
            )
        return rows
    if not rows:
        raise ValueError("there are no rows to aggregate")
    kinds = [_kind(row) for row in rows]
    odd = next((place for place, kind in enumerate(kinds) if kind != kinds[0]), 0)
    if odd or not isinstance(rows[0], Tensor) or rows[0].ndim != 1:
        told = ", ".join(f"row {place} is {kinds[place]}" for place in sorted({0, odd}))
        raise ValueError(f"rows must be vectors of one length on one device; {told}")
    return torch.stack(list(rows))


def _kind(row: object) -> str:
    if not isinstance(row, Tensor):
        return f"no tensor but a {type(row).__name__}"
    return f"{list(row.shape)} on {row.device}"


def checked_blocks(blocks: Sequence[Tensor]) -> list[Tensor]:
    """Return the blocks outside the autograd graph; refuse what is no stack."""
    if not blocks:
        raise ValueError("there are no blocks; give a worker without columns one of shape [N, 0]")
    if not all(isinstance(block, Tensor) for block in blocks):
        raise ValueError(f"blocks must be a list of tensors [N, d], got {[_kind(block) for block in blocks]}")
    shapes = [list(block.shape) for block in blocks]
    if any(block.ndim != 2 or block.shape[0] != blocks[0].shape[0] for block in blocks):
        raise ValueError(f"blocks must be [N, d] with one N, got shapes {shapes}")
    if not all(block.is_floating_point() for block in blocks):
        raise ValueError(f"blocks must be of floating dtypes, got {[str(block.dtype) for block in blocks]}")
    if blocks[0].shape[0] == 0:
        raise ValueError(f"blocks have no rows, got shapes {shapes}; leave the step out")
    return [block.detach() for block in blocks]


def checked_first_columns(
    blocks: Sequence[Tensor], first_columns: Sequence[int] | None
) -> tuple[int, ...] | None:
    """Return where each block begins; refuse another number of places than blocks."""
    if first_columns is not None and len(first_columns) != len(blocks):
        raise ValueError(f"first_columns={first_columns} must be one number for each of {len(blocks)} blocks")
    return None if first_columns is None else tuple(first_columns)


def checked_references(
    blocks: Sequence[Tensor], references: Sequence[Tensor] | None, rule: str
) -> list[Tensor]:
    """Return the trusted gradient outside the autograd graph; refuse one that does not fit."""
    if references is None:
        raise ValueError(f"the rule {rule!r} needs references, the gradient of a trusted batch")
    wanted, got = [[block.shape[1]] for block in blocks], [list(g.shape) for g in references]
    if wanted != got:
        raise ValueError(f"references must have the shapes {wanted} of the blocks' rows, got {got}")
    return [g.detach() for g in references]


def checked_sample_weights(sample_weights: Tensor | None, num_rows: int) -> Tensor:
    """Return float64 [N] on the CPU; none is 1 for each."""
    if sample_weights is None:
        return torch.ones(num_rows, dtype=torch.float64)
    weights_N = sample_weights.detach().double().cpu()
    if weights_N.shape != (num_rows,) or not bool((weights_N.isfinite() & (weights_N > 0)).all()):
        raise ValueError(
            f"sample_weights must be {num_rows} finite numbers above 0, got {weights_N.tolist()}; leave out "
            f"rows that are not to count"
        )
    return weights_N


def checked_workers(workers: Sequence[int] | None, num_rows: int) -> tuple[int, ...]:
    """Return who sent the rows; none is 0 to N - 1."""
    workers = tuple(range(num_rows)) if workers is None else tuple(workers)
    if len(set(workers)) != num_rows or len(workers) != num_rows:
        raise ValueError(f"workers must be {num_rows} different numbers, one per row, got {list(workers)}")
    return workers


def checked_own_row(own_row: int | None, num_rows: int, *, required: bool) -> int | None:
    """Return the worker's own row; refuse one that there is not."""
    if own_row is None and not required:
        return None
    if own_row is None or not 0 <= own_row < num_rows:
        raise ValueError(f"own_row must be a row from 0 to {num_rows - 1}, got {own_row}")
    return own_row
