"""Batches of about equal work: some documents come a few steps later, or sooner, than they were drawn.

WLB-LLM (arXiv 2503.17924) delays outlier documents to later batches. Here consecutive batches form a *window*
and its documents are dealt out among them anew, largest first, each to the batch with least work. So no
document moves by more than the length of a window less one, windows end with their epoch, and what a batch
holds follows from its window alone: there is no queue to save. *Work* is predicted time, *size* what a batch
has room for (documents, or tokens).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from hardy.balance.assign import equal_takers, longest_first
from hardy.balance.cost import Floats, Integers
from hardy.balance.packing import Piece

LEEWAYS = tuple(2.0**-k for k in range(12, 5, -1))
"""Shares of a batch's tokens by which others may go over it, where nothing says how many they may have; the
first that does."""


def level(work: Floats, sizes: Integers, drawn: Integers, *, rooms: Sequence[int]) -> Integers:
    """Return the batch of each document, so that batches have about equal work; never less equal than drawn.

    Where largest first leaves a document without a place, all stay as drawn.

    Args:
        work: predicted time of each document.
        sizes: what each takes of the room.
        drawn: the batch that each was drawn for, from 0 on.
        rooms: most that a batch holds, the first of these that will do; one drawn larger may stay so.

    Example:
        >>> level(np.array([9.0, 1, 8, 2]), np.ones(4, np.int64), np.array([0, 1, 0, 1]), rooms=[2]).tolist()
        [0, 0, 1, 1]
    """
    count = int(drawn.max()) + 1
    if count == 1:
        return drawn
    order = np.argsort(-work, kind="stable")
    used = np.bincount(drawn, weights=sizes, minlength=count).astype(np.int64)
    problem = equal_takers(work[order], sizes[order], num_takers=count, room=0)
    tried = (longest_first(replace(problem, room=np.maximum(used, room))) for room in rooms)
    found = next((each for each in tried if each is not None), None)
    if found is None:
        return drawn
    taken_by = np.empty_like(drawn)
    taken_by[order] = found
    if _spread(work, taken_by) >= _spread(work, drawn):
        return drawn
    # Batches stand in the order in which their documents were drawn, on average.
    places = np.bincount(taken_by, weights=drawn, minlength=count) / np.bincount(taken_by, minlength=count)
    return np.argsort(np.argsort(places, kind="stable"))[taken_by]


def level_batches(
    batches: Sequence[Integers], work: Floats, sizes: Integers, *, room: int, delay_steps: int
) -> list[Integers]:
    """Return the batches of an epoch after levelling each window of `delay_steps` + 1 of them.

    Args:
        batches: documents of each, as indices into `work` and `sizes`.
        work: predicted time of each document.
        sizes: what each takes of the room.
        room: of a batch.
        delay_steps: most steps by which a document may come later or sooner.

    Example:
        >>> work, sizes = np.array([9.0, 8, 2, 1]), np.ones(4, np.int64)
        >>> found = level_batches([np.array([0, 1]), np.array([2, 3])], work, sizes, room=2, delay_steps=1)
        >>> [batch.tolist() for batch in found]
        [[0, 3], [1, 2]]
    """
    found: list[Integers] = []
    for first in range(0, len(batches), delay_steps + 1):
        window = batches[first : first + delay_steps + 1]
        members = np.concatenate(window)
        drawn = np.repeat(np.arange(len(window)), [batch.size for batch in window])
        taken_by = level(work[members], sizes[members], drawn, rooms=[room])
        found += [members[taken_by == place] for place in range(len(window))]
    return found


class Levelled(NamedTuple):
    """A global batch of pieces."""

    pieces: list[Piece]
    delay_steps: int
    """Most steps by which one of them comes later than it was drawn."""


class LevelledPieces:
    """The pieces of each global batch of a run, dealt out within windows that keep to their epoch.

    A batch that takes packs of two epochs stays as it was drawn. No batch has more tokens than the fullest
    one drawn and a share of `LEEWAYS`. Only the last window is kept: steps are asked for in order, or cost a
    window each.

    Args:
        pieces_of: the pieces of some packs.
        packs_per_epoch: packs of one pass.
        batch_packs: packs of a global batch.
        delay_steps: most steps by which a piece may come later or sooner.
        times: predicted time of lengths.
    """

    def __init__(
        self,
        pieces_of: Callable[[range], list[Piece]],
        *,
        packs_per_epoch: int,
        batch_packs: int,
        delay_steps: int,
        times: Callable[[Integers], Floats],
    ) -> None:
        self._pieces_of, self._times = pieces_of, times
        self._packs_per_epoch, self._batch_packs = packs_per_epoch, batch_packs
        self._delay_steps = delay_steps
        self._window: tuple[range, list[Levelled]] = range(0), []

    def at(self, step: int) -> Levelled:
        """Return the global batch of a step."""
        steps, batches = self._window
        if step not in steps:
            steps = self.window(step)
            self._window = steps, batches = steps, self._levelled(steps)
        return batches[step - steps.start]

    def window(self, step: int) -> range:
        """Return the steps among which the pieces of `step` are dealt out."""
        packs, per_epoch = self._batch_packs, self._packs_per_epoch
        epoch = step * packs // per_epoch
        first, stop = -(-epoch * per_epoch // packs), (epoch + 1) * per_epoch // packs
        if step >= stop:
            return range(step, step + 1)
        first += (step - first) // (self._delay_steps + 1) * (self._delay_steps + 1)
        return range(first, min(first + self._delay_steps + 1, stop))

    def _levelled(self, steps: range) -> list[Levelled]:
        packs = self._batch_packs
        batches = [self._pieces_of(range(step * packs, (step + 1) * packs)) for step in steps]
        pieces = [piece for batch in batches for piece in batch]
        drawn = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
        lengths = np.array([piece.stop - piece.start for piece in pieces], dtype=np.int64)
        most = int(np.bincount(drawn, weights=lengths).max())
        taken_by = level(
            self._times(lengths), lengths, drawn, rooms=[int(most * (1 + share)) for share in LEEWAYS]
        )
        found: list[Levelled] = []
        for place in range(len(batches)):
            own = np.flatnonzero(taken_by == place)
            found.append(Levelled([pieces[i] for i in own.tolist()], place - int(drawn[own].min())))
        return found


def _spread(work: Floats, taken_by: Integers) -> float:
    return float(np.bincount(taken_by, weights=work).var())
