"""From every worker's gradient to one, over a communicator: by slices of all, or by what each reports.

Paper: J. Yan et al., "dSTAR", 2024 (arXiv 2412.07151). Letters: N workers, g_v the trusted gradient.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hardy.distributed.comm import Communicator
from hardy.distributed.robust.combine import Combiner
from hardy.distributed.robust.slices import Slices
from hardy.distributed.robust.trusted import Trusted

_PIECE = 2**20
"""Elements that are held in fp64 at once."""
Form = Literal["slices", "scalars"]


class Exchange:
    """One way of meeting: who takes part, and in which form.

    Args:
        combine: the rule at work.
        like: a worker's part of a gradient: shapes, dtypes, devices.
        inner: the workers of this replica.
        outer: the replicas that take part.
        form: "slices": each worker combines a part of all gradients. "scalars": each reports three numbers,
            which are believed, and the gradients are added up; for rules that need no more.
        workers: the replicas by number, in the order of `outer`; none is all.
        sample_weights: how much each counts in averages of rules that heed it; none is all alike.
    """

    def __init__(
        self,
        combine: Combiner,
        *,
        like: Sequence[Tensor],
        inner: Communicator,
        outer: Communicator,
        form: Form = "slices",
        workers: Sequence[int] | None = None,
        sample_weights: Tensor | None = None,
    ) -> None:
        self.slices = Slices(like, outer)
        before = 0
        if inner.size > 1 and form == "slices":  # the other shards of a replica hold columns too
            own = torch.tensor(self.slices.num_columns, device=like[0].device if like else None)
            counts = inner.all_gather(own)
            before = int(counts[: inner.rank].sum())
        self._first_columns = [before + first for first in self.slices.first_columns]
        self._combine, self._inner, self._outer = combine, inner, outer
        self._sample_weights = sample_weights
        self._form, self._workers = form, tuple(range(outer.size)) if workers is None else tuple(workers)

    def __call__(
        self, sent: Sequence[Tensor], trusted: Trusted | None, *, into: Sequence[Tensor], step: int
    ) -> bool:
        """Fill `into` with what the rule makes of all; False where it makes nothing, and leave it then.

        Args:
            sent: this worker's part of its gradient.
            trusted: g_v, where the rule needs it.
            into: may be `sent`.
            step: from 0.
        """
        exchange = self._by_reports if self._form == "scalars" else self._by_slices
        return exchange(sent, trusted, into=into, step=step)

    def total(self, numbers: Tensor) -> Tensor:
        """Add up over all that hold a part of the columns."""
        return self._inner.sum(self._outer.sum(numbers))

    def _by_slices(
        self, sent: Sequence[Tensor], trusted: Trusted | None, *, into: Sequence[Tensor], step: int
    ) -> bool:
        references = None
        if trusted is not None:
            references = self.slices.own(trusted.parts)
            if trusted.agree == "median":
                references = [block.median(0).values for block in self.slices.trade(trusted.parts)]
        found = self._combine(
            self.slices.trade(sent),
            step=step,
            total=self.total,
            references=references,
            first_columns=self._first_columns,
            workers=self._workers,
            sample_weights=self._sample_weights,
        )
        if found is None:
            return False
        self.slices.put_together(found, into=into)
        return True

    def _by_reports(
        self, sent: Sequence[Tensor], trusted: Trusted | None, *, into: Sequence[Tensor], step: int
    ) -> bool:
        numbers = [dot(sent, sent)]
        if trusted is not None:
            numbers += [dot(sent, trusted.parts), dot(trusted.parts, trusted.parts)]
        rows_N3 = self._outer.all_gather(self._inner.sum(torch.stack(numbers))).cpu()
        dots_N = reference_square = None
        if trusted is not None:
            dots_N, reference_square = rows_N3[:, 1], rows_N3[:, 2].median()
        outcome = self._combine.weigh(
            rows_N3[:, 0],
            dots_N,
            reference_square,
            step=step,
            workers=self._workers,
            sample_weights=self._sample_weights,
        )
        if outcome.taken == "nothing":
            return False
        if outcome.taken == "reference":
            assert trusted is not None, "a rule that takes it was given it"
            share = 1.0 / self._outer.size
            shares = [part * share for part in trusted.parts]
        else:
            assert outcome.weights is not None, "a rule that goes by reports gives weights"
            weight = float(outcome.weights[self._outer.rank])
            # Zeros, not products with zero: a gradient that is left out may hold a NaN.
            shares = [part * weight if weight else torch.zeros_like(part) for part in sent]
        self.slices.add_up(shares, into=into)
        return True


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the inner product of all together, 0-d; every product and sum in fp64."""
    found = torch.zeros((), dtype=torch.float64, device=a[0].device if a else None)
    for x, y in zip(a, b, strict=True):
        pieces = zip(x.reshape(-1).split(_PIECE), y.reshape(-1).split(_PIECE), strict=True)
        for piece, other in pieces:
            found += torch.dot(piece.double(), other.double()).to(found.device)
    return found
