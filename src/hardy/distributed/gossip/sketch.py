"""A linear sketch of a long vector: squared distances of vectors that lie on different machines, from 16 KiB.

Paper: after M. Charikar et al., "Finding frequent items in data streams", 2002; rows and shifts are our own.
Letters: m slots, p place in a row, c row, s1 and s2 signs.

The vector is cut into rows of m. Element p of row c gets the sign s1[p] * s2[c] and is added to slot
(p + shift[c]) mod m. Signs and shifts come from counters, and rows are counted over the whole model, so the
sketches of a model's parts add up to that of the whole, however it is sharded.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from hardy.ops import philox

_NAME = "gossip.sketch"
_SLOT_SIGNS, _ROW_SIGNS, _ROW_SHIFTS = 0, 1, 2
_CHUNK_ROWS = 64
"""Rows summed at once: 1 MiB of fp32, so that temporaries stay in cache."""


class Sketcher:
    """Makes sketches that can be subtracted from each other.

    Args:
        num_slots: m; a squared norm is off by about sqrt(2 / m).
        seed: the same on all that compare sketches.
        device: where the vectors are.

    Example:
        >>> sketcher = Sketcher(64, seed=0, device=torch.device("cpu"))
        >>> sketch_m = sketcher.sketch([(0, torch.ones(8))])
        >>> float(sketch_m.square().sum())
        8.0
    """

    def __init__(self, num_slots: int, *, seed: int, device: torch.device) -> None:
        self.num_slots, self.device = num_slots, device
        self._by_slices = device.type == "cpu"  # several times faster there, and slower on a GPU
        self._key = philox.key_for(seed, _NAME, purpose="hardy.proj.v1")
        self._rows: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._signs_m = philox.signs(self._key, start=0, count=num_slots, third=_SLOT_SIGNS, device=device)

    def sketch(self, parts: Iterable[tuple[int, Tensor]]) -> Tensor:
        """Return the sketch of a vector, fp32 [m].

        Args:
            parts: disjoint pieces of the vector, each a flat tensor and the place of its first element.
        """
        sketch_m = torch.zeros(self.num_slots, dtype=torch.float32, device=self.device)
        for start, values_n in parts:
            self._add(sketch_m, start, values_n)
        return sketch_m

    def _add(self, sketch_m: Tensor, start: int, values_n: Tensor) -> None:
        """Add a piece: whole rows in chunks, and before and after them a row that may be broken."""
        m = self.num_slots
        row, place = divmod(start, m)
        while len(values_n) > 0:
            if place or len(values_n) < m:
                piece_n, values_n = values_n[: m - place], values_n[m - place :]
                rows_cm = torch.zeros(1, m, dtype=torch.float32, device=self.device)
                rows_cm[0, place : place + len(piece_n)].copy_(piece_n)
                place = 0
            else:
                count = min(len(values_n) // m, _CHUNK_ROWS)
                rows_cm, values_n = values_n[: count * m].view(count, m).float(), values_n[count * m :]
            self._add_rows(sketch_m, rows_cm, row)
            row += len(rows_cm)

    def _add_rows(self, sketch_m: Tensor, rows_cm: Tensor, first: int) -> None:
        """Add rows, each with its signs and shifted by its own number of slots."""
        count, m = rows_cm.shape
        rows_cm = rows_cm * self._signs_m
        signs_c, shifts_c = self._drawn(first, count)
        if self._by_slices:
            for row_m, sign, shift in zip(rows_cm, signs_c.tolist(), shifts_c.tolist(), strict=True):
                sketch_m[shift:].add_(row_m[: m - shift], alpha=sign)
                sketch_m[:shift].add_(row_m[m - shift :], alpha=sign)
        else:
            slots_m = torch.arange(m, device=self.device)
            sketch_m += signs_c @ rows_cm.gather(1, (slots_m - shifts_c[:, None]) % m)

    def _drawn(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return signs and shifts of rows; kept, as the same rows come at every round."""
        if (first, count) not in self._rows:
            signs_c = philox.signs(self._key, start=first, count=count, third=_ROW_SIGNS, device=self.device)
            words_c = philox.words(self._key, start=first, count=count, third=_ROW_SHIFTS, device=self.device)
            self._rows[first, count] = signs_c, words_c % self.num_slots
        return self._rows[first, count]
