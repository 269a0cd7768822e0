"""Packing: from document lengths to packs, by arithmetic on the index of a pack.

A *document* has a number of stored tokens. A *piece* is a run of consecutive tokens of one document that
attends only to itself, at most `document_tokens` long. A *pack* is pieces laid end to end within
`pack_tokens`. An *epoch* shows every token of every document exactly once. Pack k is a function of (lengths,
seed, k): nothing is consumed, so a run that resumes, or reads with more workers, sees the same packs.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from hardy.rng import numpy_generator_for

Integers = NDArray[np.int64]
Plan = TypeVar("Plan")

PLANS_KEPT = 2
"""Epoch plans kept in memory: a batch may straddle two epochs."""


class Piece(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of a document."""

    document: int
    start: int
    stop: int


class Packer(ABC):
    """A way of packing: every epoch has the same number of packs and shows every token once."""

    def __init__(self, *, packs_per_epoch: int, num_epochs: int | None) -> None:
        self.packs_per_epoch = packs_per_epoch
        """Packs that show every token once."""
        self.num_packs = None if num_epochs is None else num_epochs * packs_per_epoch
        """Packs there are; none means they never end."""

    def epoch_of(self, pack_index: int) -> int:
        """Return the epoch of a pack."""
        return pack_index // self.packs_per_epoch

    def pieces(self, pack_index: int) -> list[Piece]:
        """Return the pieces of a pack, in order; IndexError outside 0 ... num_packs - 1."""
        if pack_index < 0 or (self.num_packs is not None and pack_index >= self.num_packs):
            raise IndexError(f"there is no pack {pack_index}; there are {self.num_packs or 'endlessly many'}")
        epoch, place = divmod(pack_index, self.packs_per_epoch)
        return self._pieces_at(epoch, place)

    @abstractmethod
    def _pieces_at(self, epoch: int, place: int) -> list[Piece]:
        """Return the pieces of the pack at `place` in the order of an epoch."""


class StreamPacker(Packer):
    """Documents laid end to end as one stream of tokens, cut every `pack_tokens`; the packs then shuffled.

    Each epoch draws a new order of documents, hence new cuts, and a new order of packs: without the second, a
    batch of neighbouring packs would hold a few long documents and little else. Every pack of an epoch is
    full but one, which has the rest.

    Example:
        >>> packer = StreamPacker([5], pack_tokens=4, document_tokens=4, seed=0)
        >>> sorted(tuple(piece) for index in (0, 1) for piece in packer.pieces(index))
        [(0, 0, 4), (0, 4, 5)]
    """

    def __init__(
        self,
        lengths: Sequence[int] | Integers,
        *,
        pack_tokens: int,
        document_tokens: int,
        seed: int,
        num_epochs: int | None = None,
    ) -> None:
        """Take the tokens of each document, all positive."""
        self._lengths = _checked(lengths, pack_tokens=pack_tokens, document_tokens=document_tokens)
        self._pack_tokens = pack_tokens
        self._document_tokens = document_tokens
        self._epoch_tokens = int(self._lengths.sum())
        num_packs = -(-self._epoch_tokens // pack_tokens)
        super().__init__(packs_per_epoch=num_packs, num_epochs=num_epochs)
        self._plans = _RecentPlans(
            lambda epoch: _stream_plan(self._lengths, num_packs=num_packs, seed=seed, epoch=epoch)
        )

    def _pieces_at(self, epoch: int, place: int) -> list[Piece]:
        plan = self._plans(epoch)
        begin = int(plan.packs[place]) * self._pack_tokens
        end = min(begin + self._pack_tokens, self._epoch_tokens)
        nth = int(np.searchsorted(plan.ends, begin, side="right"))
        found: list[Piece] = []
        while begin < end:
            document, document_end = int(plan.documents[nth]), int(plan.ends[nth])
            document_begin = document_end - int(self._lengths[document])
            stop = min(end, document_end) - document_begin
            for start in range(begin - document_begin, stop, self._document_tokens):
                found.append(Piece(document, start, min(start + self._document_tokens, stop)))
            begin, nth = document_end, nth + 1
        return found


class WholePacker(Packer):
    """Packs in which no document is cut that fits; the same packs in every epoch, in another order.

    Documents longer than `document_tokens` are cut into pieces of that length and a rest; the pieces are
    packed once, by best fit decreasing. Packs may be partly empty.

    Example:
        >>> packer = WholePacker([3, 2, 5], pack_tokens=5, document_tokens=5, seed=0)
        >>> sorted([tuple(piece) for piece in packer.pieces(index)] for index in (0, 1))
        [[(0, 0, 3), (1, 0, 2)], [(2, 0, 5)]]
    """

    def __init__(
        self,
        lengths: Sequence[int] | Integers,
        *,
        pack_tokens: int,
        document_tokens: int,
        seed: int,
        num_epochs: int | None = None,
    ) -> None:
        """Take the tokens of each document, all positive."""
        checked = _checked(lengths, pack_tokens=pack_tokens, document_tokens=document_tokens)
        per_document = -(-checked // document_tokens)
        documents = np.repeat(np.arange(checked.size), per_document)
        first_piece = np.cumsum(per_document) - per_document
        starts = (np.arange(documents.size) - first_piece[documents]) * document_tokens
        stops = np.minimum(starts + document_tokens, checked[documents])
        packs = best_fit_decreasing(stops - starts, capacity_tokens=pack_tokens)
        by_pack = np.argsort(packs, kind="stable")
        self._documents, self._starts, self._stops = documents[by_pack], starts[by_pack], stops[by_pack]
        self._borders = np.concatenate(([0], np.cumsum(np.bincount(packs))))
        num_packs = self._borders.size - 1
        super().__init__(packs_per_epoch=num_packs, num_epochs=num_epochs)
        self._plans = _RecentPlans(
            lambda epoch: numpy_generator_for(seed, "epoch", epoch).permutation(num_packs)
        )

    def _pieces_at(self, epoch: int, place: int) -> list[Piece]:
        pack = int(self._plans(epoch)[place])
        here = slice(int(self._borders[pack]), int(self._borders[pack + 1]))
        columns = (self._documents[here], self._starts[here], self._stops[here])
        return [Piece(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


PACKERS: dict[Literal["stream", "whole"], type[StreamPacker] | type[WholePacker]] = {
    "stream": StreamPacker,
    "whole": WholePacker,
}


def best_fit_decreasing(lengths: Integers, *, capacity_tokens: int) -> Integers:
    """Return the pack of each piece: longest piece first, each into the fullest pack that still has room.

    Pieces of one length go in together, and so do all packs with equal room, so a million pieces take well
    under a second; the packs are as full as placing one piece at a time would make them.

    Args:
        lengths: tokens of each piece, from 1 to `capacity_tokens`.
        capacity_tokens: most tokens of one pack.

    Example:
        >>> best_fit_decreasing(np.array([2, 4, 3, 1]), capacity_tokens=5).tolist()
        [1, 0, 1, 0]
    """
    by_length = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    pack_of = np.empty(lengths.size, dtype=np.int64)
    unfilled = _UnfilledPacks()
    num_packs, placed = 0, 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            room, packs = unfilled.take(size)
            if not packs.size:
                room = capacity_tokens
                packs = np.arange(num_packs, num_packs - (-count // (room // size)), dtype=np.int64)
                num_packs += packs.size
            # A pack that has taken one piece is now the fullest with room, so it takes as many as fit.
            each = room // size
            takers = packs[: -(-count // each)]
            chosen = np.repeat(takers, each)[:count]
            pack_of[by_length[placed : placed + chosen.size]] = chosen
            placed, count = placed + chosen.size, count - chosen.size
            in_last = chosen.size - (takers.size - 1) * each
            unfilled.put(room - each * size, takers[:-1])
            unfilled.put(room - in_last * size, takers[-1:])
            unfilled.put(room, packs[takers.size :])
    return pack_of


class _UnfilledPacks:
    """Packs by the tokens they still have room for."""

    def __init__(self) -> None:
        self._rooms: list[int] = []  # the keys below, sorted
        self._packs: dict[int, list[Integers]] = {}

    def put(self, room: int, packs: Integers) -> None:
        """Add packs that have `room` tokens left."""
        if packs.size and room:
            if room not in self._packs:
                insort(self._rooms, room)
            self._packs.setdefault(room, []).append(packs)

    def take(self, least_room: int) -> tuple[int, Integers]:
        """Remove the fullest packs with `least_room` left; return their room and them, or no packs."""
        place = bisect_left(self._rooms, least_room)
        if place == len(self._rooms):
            return 0, np.empty(0, dtype=np.int64)
        room = self._rooms.pop(place)
        return room, np.concatenate(self._packs.pop(room))


class _RecentPlans(Generic[Plan]):
    """The plans of the epochs asked for last."""

    def __init__(self, make: Callable[[int], Plan]) -> None:
        self._make = make
        self._plans: dict[int, Plan] = {}

    def __call__(self, epoch: int) -> Plan:
        """Return the plan of an epoch, made when it is not at hand."""
        plan = self._plans.pop(epoch, None)
        if plan is None:
            plan = self._make(epoch)
        self._plans[epoch] = plan
        if len(self._plans) > PLANS_KEPT:
            del self._plans[next(iter(self._plans))]
        return plan


class _StreamPlan(NamedTuple):
    """One epoch of the stream."""

    documents: Integers
    """The documents in order."""
    ends: Integers
    """Where each of them ends in the stream."""
    packs: Integers
    """The packs in order."""


def _stream_plan(lengths: Integers, *, num_packs: int, seed: int, epoch: int) -> _StreamPlan:
    """Return the order of an epoch's documents and packs."""
    documents = numpy_generator_for(seed, "epoch", epoch).permutation(lengths.size)
    packs = numpy_generator_for(seed, "packs", epoch).permutation(num_packs)
    return _StreamPlan(documents=documents, ends=np.cumsum(lengths[documents]), packs=packs)


def _checked(lengths: Sequence[int] | Integers, *, pack_tokens: int, document_tokens: int) -> Integers:
    """Return the lengths as an array, or raise ValueError."""
    array = np.asarray(lengths, dtype=np.int64)
    if not array.size or array.min() < 1:
        raise ValueError("packing needs at least one document, and each of at least one token")
    if not 1 <= document_tokens <= pack_tokens:
        raise ValueError(f"document_tokens must be 1 to pack_tokens={pack_tokens}, got {document_tokens}")
    return array
