"""Packed tokens to rectangles and back: documents of nearly one length share a batch, padded by a few rows.

Many small calls cost more than a little padding. Padding rows are zeros behind the document's end, where
causal attention never looks, so the result is exact.

Shape suffixes: T packed tokens, R rows of all rectangles.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

ROUNDING_TOKENS = 32
"""Lengths are rounded up to multiples of this; at most 31 rows of padding for a document."""


@dataclass(frozen=True, kw_only=True)
class Rectangles:
    """Where each token stands when documents of like length are stacked."""

    shapes: tuple[tuple[int, int], ...]
    """Documents and rows per document of each rectangle; the rectangles follow each other."""
    rows_T: Tensor
    """Row of each token, int64."""

    @property
    def num_rows(self) -> int:
        """R."""
        return sum(documents * length for documents, length in self.shapes)


def plan_rectangles(lengths: Sequence[int], *, device: torch.device | str = "cpu") -> Rectangles:
    """Return which documents of `lengths` tokens share a rectangle; the index is on `device`.

    Example:
        >>> plan_rectangles([1, 40, 2]).shapes
        ((2, 32), (1, 64))
    """
    members: dict[int, list[int]] = defaultdict(list)
    for document, length in enumerate(lengths):
        members[-(-length // ROUNDING_TOKENS) * ROUNDING_TOKENS].append(document)
    shapes = tuple((len(documents), length) for length, documents in members.items())
    firsts = accumulate((documents * length for documents, length in shapes), initial=0)
    shifts = [-start for start in accumulate(lengths, initial=0)][:-1]
    for first, (length, documents) in zip(firsts, members.items(), strict=False):  # one `firsts` too many: R
        for index, document in enumerate(documents):
            shifts[document] += first + index * length
    shifts_T = torch.repeat_interleave(torch.tensor(shifts), torch.tensor(lengths))
    rows_T = shifts_T + torch.arange(len(shifts_T))
    return Rectangles(shapes=shapes, rows_T=rows_T.to(device, non_blocking=True))


def to_rows(x: Tensor, rectangles: Rectangles) -> Tensor:
    """Return (R, ...) with token t of `x` (T, ...) in row `rows_T[t]` and zeros elsewhere."""
    apply = cast("Callable[..., Tensor]", _ToRows.apply)  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
    return apply(x, rectangles.rows_T, rectangles.num_rows)


def from_rows(x: Tensor, rectangles: Rectangles) -> Tensor:
    """Return (T, ...): the tokens' rows of `x` (R, ...); undoes `to_rows`."""
    apply = cast("Callable[..., Tensor]", _FromRows.apply)  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
    return apply(x, rectangles.rows_T, rectangles.num_rows)


class _ToRows(torch.autograd.Function):
    """No row is used twice, so the gradient is a plain gather; torch's own would add row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows_T: Tensor, num_rows: int) -> Tensor:
        ctx.rows_T, ctx.num_rows = rows_T, num_rows
        return x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, rows_T, x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        apply = cast("Callable[..., Tensor]", _FromRows.apply)  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
        return apply(grad_outputs[0], ctx.rows_T, ctx.num_rows), None, None


class _FromRows(torch.autograd.Function):
    """The inverse; its gradient is the other's forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows_T: Tensor, num_rows: int) -> Tensor:
        ctx.rows_T, ctx.num_rows = rows_T, num_rows
        return x.index_select(0, rows_T)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        apply = cast("Callable[..., Tensor]", _ToRows.apply)  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
        return apply(grad_outputs[0], ctx.rows_T, ctx.num_rows), None, None
