"""Rows averaged over the steps: what a rule judges workers by, instead of by their rows of one step.

Papers: Z. Allen-Zhu et al., "Byzantine-Resilient Non-Convex Stochastic Gradient Descent", ICLR 2021, adds up
a window of steps; S. P. Karimireddy et al., "Learning from History for Byzantine Robust Optimization", ICML
2021, averages at the worker. Letters: g_i(t) row of worker i, c its factor from what comes before the rule,
beta decay, N workers, d columns of a block.

    a_i = beta a_i + (1 - beta) c_i g_i(t)
    the rule weighs a_i / (1 - beta^t_i); what is added up by these weights are the c_i g_i(t)

The noise of a step is gone from the averages and what a worker does again and again is not, so attacks that
hide in the noise stand out. Nothing but the step's own rows is added up: training sees no stale gradient.

Differs from the papers: averages that fade instead of windows that begin anew, any rule of distances judges
them, and nobody is left out for good. A worker whose data are unlike the others' stands out as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hardy.distributed.aggregation.stack import working_dtype


@dataclass(frozen=True, kw_only=True)
class History:
    """Averages of what each worker sent. Replaced as a whole, never changed."""

    decay: float
    """beta."""
    blocks: list[Tensor]
    """[N, d] each, in the dtype of the sums."""
    ages: tuple[int, ...]
    """t_i: rows of worker i that are in its average."""

    @classmethod
    def start(cls, blocks: Sequence[Tensor], decay: float) -> "History":
        """Return that of workers that have sent nothing."""
        empty = [torch.zeros_like(block, dtype=working_dtype(block)) for block in blocks]
        return cls(decay=decay, blocks=empty, ages=(0,) * blocks[0].shape[0])

    def with_rows(self, blocks: Sequence[Tensor], places: Sequence[int], factors: Tensor) -> "History":
        """Return the history with some more rows.

        Args:
            blocks: [N, d] each; only the rows at `places` are read.
            places: whose rows are to be added.
            factors: by what each of these is multiplied, as many as places.

        Raises:
            ValueError: other shapes than before.
        """
        shapes, known = [list(block.shape) for block in blocks], [list(block.shape) for block in self.blocks]
        if shapes != known:
            raise ValueError(f"rows averaged over steps must keep their shapes {known}, got {shapes}")
        averages: list[Tensor] = []
        for old_Nd, block in zip(self.blocks, blocks, strict=True):
            new_Nd = old_Nd.to(block.device, copy=True)
            for place, factor in zip(places, factors.tolist(), strict=True):
                new_Nd[place].mul_(self.decay).add_(block[place], alpha=(1 - self.decay) * factor)
            averages.append(new_Nd)
        ages = tuple(age + (place in places) for place, age in enumerate(self.ages))
        return History(decay=self.decay, blocks=averages, ages=ages)

    def corrections(self, places: Sequence[int]) -> Tensor:
        """Return 1 / (1 - beta^t) of some workers, who have sent something: fp64, on the CPU."""
        return torch.tensor([1 / (1 - self.decay ** self.ages[i]) for i in places], dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Return averages as `row/WORKER/BLOCK`, ages as `age/WORKER`."""
        rows = {
            f"row/{worker}/{i}": block[worker].clone()
            for i, block in enumerate(self.blocks)
            for worker in range(len(self.ages))
        }
        return {**rows, **{f"age/{worker}": age for worker, age in enumerate(self.ages)}}

    @classmethod
    def of(cls, rows: Mapping[int, Sequence[Tensor]], ages: Sequence[int], decay: float) -> "History":
        """Return what was saved."""
        blocks = [torch.stack(pieces) for pieces in zip(*(rows[i] for i in range(len(ages))), strict=True)]
        return cls(decay=decay, blocks=blocks, ages=tuple(ages))
