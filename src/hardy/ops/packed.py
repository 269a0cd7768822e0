"""Packed documents: variable-length pieces laid end to end in one row, with their borders.

Shape suffixes: T packed tokens, S = number of documents + 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

IGNORED_LABEL = -100
"""Label of a token whose successor is not predicted."""


@dataclass(kw_only=True)
class DocumentLayout:
    """Where documents begin and end among T packed tokens; attention never crosses a border.

    Never changed, but not declared frozen: torch.compile of torch 2.11 takes frozen dataclasses apart and
    compiles a block again for every number of documents (2.13 does not).
    """

    lengths: tuple[int, ...]
    """Tokens of each document, in order, all positive; on the host, so that no step waits for the device."""
    cumulative_S: Tensor
    """Start of each document and the end of the last, int32."""
    positions_T: Tensor
    """Position of each token within its document, int64."""

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], *, device: torch.device | str = "cpu") -> "DocumentLayout":
        """Build the layout of documents of `lengths` tokens.

        Example:
            >>> DocumentLayout.from_lengths([2, 3]).positions_T.tolist()
            [0, 1, 0, 1, 2]
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"a layout needs documents of at least one token, got lengths {list(lengths)}")
        cumulative = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        starts_T = torch.repeat_interleave(cumulative[:-1].long(), torch.tensor(lengths))
        positions_T = torch.arange(int(cumulative[-1])) - starts_T
        return cls(
            lengths=tuple(lengths), cumulative_S=cumulative.to(device), positions_T=positions_T.to(device)
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    def to(self, device: torch.device | str) -> "DocumentLayout":
        """Return the layout with its tensors on `device`."""
        return DocumentLayout(
            lengths=self.lengths,
            cumulative_S=self.cumulative_S.to(device, non_blocking=True),
            positions_T=self.positions_T.to(device, non_blocking=True),
        )


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
