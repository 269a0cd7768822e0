"""Rows in use where they are: what rules need of them beyond their numbers, a chunk of columns at a time.

Letters: R rows in use, n mixtures of them, c columns of a chunk, d columns of a block.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hardy.distributed.aggregation.stack import (
    LARGEST_SQUARE,
    SMALLEST_SQUARE,
    Loader,
    Total,
    chunks,
    square_rows,
    working_dtype,
)
from hardy.rng import numpy_generator_for

Reduce = Callable[[Tensor], Tensor]
"""[n, c] -> [c]; may overwrite what it is given."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows of a stack. Mixtures are float64 [n, R]; none means the rows themselves."""

    blocks: Sequence[Tensor]
    """[N, d] each."""
    places: Sequence[int]
    """The R rows that are in use."""
    total: Total
    references: Sequence[Tensor] | None = None
    """The trusted gradient, [d] per block."""
    first_columns: Sequence[int] | None = None
    """Where each block begins among the columns of all workers; none counts from 0 over the blocks."""

    def reduced(self, mix_nR: Tensor | None, reduce: Reduce) -> list[Tensor]:
        """Return for each block the vector that `reduce` makes of mixtures."""
        vectors: list[Tensor] = []
        for block in self.blocks:
            vector = torch.empty(block.shape[1], dtype=block.dtype, device=block.device)
            for where, x_nc in self._chunks(block, mix_nR):
                vector[where] = reduce(x_nc)
            vectors.append(vector)
        return vectors

    def distances_to(self, mix_nR: Tensor, reduce: Reduce) -> Tensor:
        """Return the squared distances of mixtures to what `reduce` makes of them: fp64 [n], on the CPU."""
        return self._summed(len(mix_nR), mix_nR, lambda _, __, x_nc: x_nc.sub_(reduce(x_nc.clone())))

    def residual_squares(self, mix_nR: Tensor) -> Tensor:
        """Return the squared distances of mixtures to the trusted gradient: float64 [n], on the CPU."""
        assert self.references is not None, "rules that need it are given the trusted gradient"
        references = self.references
        return self._summed(
            len(mix_nR),
            mix_nR,
            lambda number, where, x_nc: x_nc.sub_(references[number][where].to(x_nc.device, x_nc.dtype)),
        )

    def changes(self, last: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the squared distances of the rows to others, by block [R, d]: float64 [R], on the CPU."""

        def difference(number: int, where: slice, x_Rc: Tensor) -> Tensor:
            for x_c, old in zip(x_Rc, last, strict=True):
                x_c.sub_(old[number][where])
            return x_Rc

        return self._summed(len(self.places), None, difference)

    def drawn(self, count: int, *, seed: int, purpose: Sequence[str | int]) -> "Rows":
        """Return copies of the rows with `count` columns drawn from those of all workers, or with all.

        Which depends on the seed, the purpose and the number of columns, not on who holds them.

        Raises:
            ValueError: other workers hold columns, and nobody said where these begin.
        """
        widths = [block.shape[1] for block in self.blocks]
        own = torch.tensor(float(sum(widths)), dtype=torch.float64, device=self.blocks[0].device)
        num_columns = int(self.total(own))
        firsts = self.first_columns
        if firsts is None:
            if num_columns != sum(widths):
                raise ValueError(
                    f"{sum(widths)} of {num_columns} columns are here; to draw some give first_columns: "
                    f"where each block begins among those of all workers"
                )
            firsts = [sum(widths[:number]) for number in range(len(widths))]
        drawn = drawn_columns(num_columns, count, seed=seed, purpose=purpose)
        rows = torch.tensor(list(self.places))
        blocks: list[Tensor] = []
        for block, first in zip(self.blocks, firsts, strict=True):
            here = drawn[(drawn >= first) & (drawn < first + block.shape[1])] - first
            blocks.append(block[rows.to(block.device)[:, None], here.to(block.device)])
        return Rows(blocks=blocks, places=range(len(self.places)), total=self.total)

    def _summed(
        self, size: int, mix_nR: Tensor | None, measure: Callable[[int, slice, Tensor], Tensor]
    ) -> Tensor:
        """Return the squared norms of what `measure` makes of each chunk, added up over all columns.

        Where float32 squares overflow or vanish all are formed again in float64, by all workers alike.
        """
        sums_n = self._summed_in(torch.float32, size, mix_nR, measure)
        if bool(((sums_n > SMALLEST_SQUARE) & (sums_n < LARGEST_SQUARE)).all()):
            return sums_n
        return self._summed_in(torch.float64, size, mix_nR, measure)

    def _summed_in(
        self,
        least: torch.dtype,
        size: int,
        mix_nR: Tensor | None,
        measure: Callable[[int, slice, Tensor], Tensor],
    ) -> Tensor:
        sums_n = torch.zeros(size, dtype=torch.float64, device=self.blocks[0].device)
        for number, block in enumerate(self.blocks):
            here_n = torch.zeros_like(sums_n, device=block.device)
            for where, x_nc in self._chunks(block, mix_nR, least):
                here_n += square_rows(measure(number, where, x_nc))
            sums_n += here_n.to(sums_n.device)
        return self.total(sums_n).cpu()

    def _chunks(
        self, block: Tensor, mix_nR: Tensor | None, least: torch.dtype = torch.float32
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield columns and the mixtures there, which may be overwritten: [n, c], at least in this dtype."""
        picked = range(len(self.places)) if mix_nR is None else _picked(mix_nR)
        places = self.places if picked is None else [self.places[i] for i in picked]
        loader = Loader(block, places, dtype=torch.promote_types(least, working_dtype(block)))
        weights, mixed = None if mix_nR is None or picked is not None else mix_nR.tolist(), None
        for where in chunks(block):
            x_Rc = loader.copy(where)
            if weights is None:
                yield where, x_Rc
                continue
            if mixed is None:  # the first chunk is the widest
                mixed = x_Rc.new_empty(len(weights) * x_Rc.shape[1])
            mixed_nc = mixed[: len(weights) * x_Rc.shape[1]].view(len(weights), -1).zero_()
            for target_c, row in zip(mixed_nc, weights, strict=True):
                for x_c, weight in zip(x_Rc, row, strict=True):
                    if weight != 0:
                        target_c.add_(x_c, alpha=weight)
            yield where, mixed_nc


def drawn_columns(num_columns: int, count: int, *, seed: int, purpose: Sequence[str | int]) -> Tensor:
    """Return the numbers of `count` different columns, or of all where there are no more, in order.

    Example:
        >>> drawn_columns(10**12, 3, seed=0, purpose=["docs"]).shape
        torch.Size([3])
        >>> drawn_columns(2, 3, seed=0, purpose=["docs"])
        tensor([0, 1])
    """
    if count >= num_columns:
        return torch.arange(num_columns)
    generator = numpy_generator_for(seed, *purpose)
    return torch.from_numpy(generator.choice(num_columns, count, replace=False, shuffle=False)).sort().values


def _picked(mix_nR: Tensor) -> list[int] | None:
    """Return which row each mixture is, where each is one row as it stands."""
    is_one = (mix_nR == 1).sum(1).eq(1) & (mix_nR != 0).sum(1).eq(1)
    return mix_nR.argmax(1).tolist() if bool(is_one.all()) else None
