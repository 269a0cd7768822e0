"""Packed documents: variable-length pieces laid end to end in one row, with their borders.

Shape suffixes: T packed tokens, S = number of documents + 1, R runs of numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED_LABEL = -100
"""Label of a token whose successor is not predicted."""
MOST_TOKENS = 2**31 - 1
"""Of a pack: kernels take its borders as int32."""


def runs(starts_R: Tensor, sizes_R: Tensor) -> Tensor:
    """Return the numbers from each start, so many as its size, end to end; int64.

    Args:
        starts_R: first number of each run, int64 on the host.
        sizes_R: how many numbers each has, at least 0, int64 on the host.

    Example:
        >>> runs(torch.tensor([5, 0, 2]), torch.tensor([2, 0, 1])).tolist()
        [5, 6, 2]
    """
    if sizes_R.numel() and int(sizes_R.min()) == 0:
        there_R = sizes_R > 0
        starts_R, sizes_R = starts_R[there_R], sizes_R[there_R]
    ends_R = sizes_R.cumsum(0)
    if not ends_R.numel():
        return ends_R
    # Steps of one, and at the start of a run the step from the end of the run before: one pass, in place.
    numbers = torch.ones(int(ends_R[-1]), dtype=torch.int64)
    numbers[0] = starts_R[0]
    numbers[ends_R[:-1]] = starts_R[1:] - (starts_R[:-1] + sizes_R[:-1] - 1)
    return numbers.cumsum_(0)


@dataclass(kw_only=True)
class Borders:
    """Where documents begin and end among T packed tokens: all that attention needs to know of its keys.

    Never changed, but not declared frozen: torch.compile of torch 2.11 takes frozen dataclasses apart and
    compiles a block again for every number of documents (2.13 does not).
    """

    lengths: tuple[int, ...]
    """Tokens of each document, in order, all positive; on the host, so that no step waits for the device."""
    cumulative_S: Tensor
    """Start of each document and the end of the last, int32."""

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Borders":
        """Return the borders of documents of `lengths` tokens, on the host.

        Example:
            >>> Borders.of([2, 3]).cumulative_S.tolist()
            [0, 2, 5]
        """
        return Borders(lengths=tuple(lengths), cumulative_S=_cumulative(torch.tensor(lengths), lengths))

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    def to(self, device: torch.device | str) -> "Borders":
        """Return the borders with their tensor on `device`."""
        return Borders(lengths=self.lengths, cumulative_S=self.cumulative_S.to(device, non_blocking=True))


@dataclass(kw_only=True)
class DocumentLayout(Borders):
    """Where documents begin and end among T packed tokens, and where each token stands in its document.

    Attention never crosses a border.
    """

    positions_T: Tensor
    """Position of each token within its document, int64."""

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], *, device: torch.device | str = "cpu") -> "DocumentLayout":
        """Build the layout of documents of `lengths` tokens.

        Example:
            >>> DocumentLayout.from_lengths([2, 3]).positions_T.tolist()
            [0, 1, 0, 1, 2]
        """
        sizes = torch.tensor(lengths)
        return cls(
            lengths=tuple(lengths),
            cumulative_S=_cumulative(sizes, lengths).to(device),
            positions_T=runs(torch.zeros_like(sizes), sizes).to(device),
        )

    def to(self, device: torch.device | str) -> "DocumentLayout":
        """Return the layout with its tensors on `device`."""
        return DocumentLayout(
            lengths=self.lengths,
            cumulative_S=self.cumulative_S.to(device, non_blocking=True),
            positions_T=self.positions_T.to(device, non_blocking=True),
        )


def _cumulative(sizes: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return where documents of these sizes begin and the last ends, int32.

    Raises:
        ValueError: there is none, one is empty, or int32 cannot count them all.
    """
    if not sizes.numel() or int(sizes.min()) < 1:
        raise ValueError(f"a layout needs documents of at least one token, got lengths {list(lengths)}")
    cumulative = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    if int(cumulative[-1]) > MOST_TOKENS:
        raise ValueError(f"a layout holds at most {MOST_TOKENS:,} tokens, got {int(cumulative[-1]):,}")
    return cumulative.int()


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Tokens of one micro-batch with what each must predict."""

    tokens_T: Tensor
    """Token ids, int64."""
    labels_T: Tensor
    """Next token of the same document, int64; `IGNORED_LABEL` where there is none."""
    layout: DocumentLayout
    """The borders of the documents."""
    num_targets: int
    """Labels that count; on the host."""

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return the batch with its tensors on `device`."""
        return PackedBatch(
            tokens_T=self.tokens_T.to(device, non_blocking=True),
            labels_T=self.labels_T.to(device, non_blocking=True),
            layout=self.layout.to(device),
            num_targets=self.num_targets,
        )
