"""Who sends which rows of a parameter to whom, between the optimizer's layout and a step's replicas.

Paper: Hydraulis (arXiv 2412.07894). The optimizer's layout is one for the whole run: every parameter is cut
along one dimension into as many equal parts as there are ranks, and each rank *owns* one part. A step's
replicas compute with another layout: the ranks of a replica *hold* equal parts of what they share and all of
the rest. A map between the two follows from integers alone. Weights go from owner to holder (an all-gather
of exactly what each holder needs), gradients from holder to owner (a reduce-scatter over the replicas).

Parts are cut where owners and holders differ, not into one slice for each rank of the largest replica, so
that any degrees and any number of ranks work.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from hardy.balance.plan import Group

Replicas = tuple[Group, ...]
"""Groups with no rank in common, by first rank; ranks in none hold nothing."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a parameter along the dimension in which it is cut: columns where that is the second one."""

    start: int
    stop: int

    def __len__(self) -> int:
        """Return how many."""
        return self.stop - self.start

    def common(self, other: "Rows") -> "Rows":
        """Return those in both."""
        start = max(self.start, other.start)
        return Rows(start=start, stop=max(start, min(self.stop, other.stop)))


NOTHING = Rows(start=0, stop=0)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How one parameter lies on the ranks.

    Example:
        >>> weight = Cut(size=8, shared=True)
        >>> len(weight.owned(3, world_size=4)), len(weight.held(1, degree=2))
        (2, 4)
    """

    size: int
    """Rows in all."""
    shared: bool
    """Whether the ranks of a replica share the rows equally; if not, each of them holds all."""

    def owned(self, rank: int, *, world_size: int) -> Rows:
        """Return the rows whose master weights and optimizer states `rank` keeps."""
        return _part(self.size, rank, world_size)

    def held(self, place: int, *, degree: int) -> Rows:
        """Return the rows with which the rank at `place` of a replica computes."""
        return _part(self.size, place, degree) if self.shared else Rows(start=0, stop=self.size)

    def held_by(self, rank: int, replicas: Replicas) -> Rows:
        """Return the rows with which `rank` computes; none where no replica has it."""
        mine = replica_of(rank, replicas)
        return NOTHING if mine is None else self.held(rank - mine.first_rank, degree=mine.scheme.ranks)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows that an owner and a holder pass each other; nothing is sent where both are one rank."""

    owner: int
    holder: int
    rows: Rows


class Letter(NamedTuple):
    """Rows that one rank passes another, or keeps where both are one."""

    sender: int
    receiver: int
    rows: Rows


@dataclass(frozen=True, kw_only=True)
class BridgeBytes:
    """What each rank sends through the bridge in a step, by rank."""

    weights: tuple[int, ...]
    gradients: tuple[int, ...]


def replica_of(rank: int, replicas: Replicas) -> Group | None:
    """Return the replica that has `rank`, if one has."""
    return next((group for group in replicas if rank in group.ranks), None)


@lru_cache(maxsize=1024)
def weight_pieces(cut: Cut, replicas: Replicas, world_size: int) -> tuple[Piece, ...]:
    """Return what owners send to holders: every holder gets each of its rows from the one that owns it.

    Args:
        cut: of the parameter.
        replicas: of the step.
        world_size: ranks, those in no replica included; each owns a part.

    Example:
        >>> from hardy.balance.plan import Scheme
        >>> pair = Group(first_rank=0, scheme=Scheme(tensor=2))
        >>> pieces = weight_pieces(Cut(size=4, shared=True), (pair,), world_size=4)
        >>> [(piece.owner, piece.holder) for piece in pieces]
        [(0, 0), (1, 0), (2, 1), (3, 1)]
    """
    return tuple(
        piece
        for group in replicas
        for holder in group.ranks
        for piece in _of_holder(cut, holder, group, world_size)
    )


@lru_cache(maxsize=1024)
def gradient_pieces(cut: Cut, replicas: Replicas, world_size: int) -> tuple[Piece, ...]:
    """Return what holders send to owners: each row once from every replica, to be added up in this order.

    Rows of which all ranks of a replica hold the same gradient are sent by one of them: their owner, where
    it is among them, else they take turns.
    """
    return tuple(
        piece
        for group in replicas
        for holder in group.ranks
        for piece in _of_holder(cut, holder, group, world_size)
        if cut.shared or holder == _speaker(piece.owner, group)
    )


@lru_cache(maxsize=1024)
def weight_letters(cut: Cut, replicas: Replicas, world_size: int, rank: int) -> tuple[Letter, ...]:
    """Return what `rank` sends and gets so that the replicas have their weights."""
    pieces = weight_pieces(cut, replicas, world_size)
    return tuple(Letter(p.owner, p.holder, p.rows) for p in pieces if rank in (p.owner, p.holder))


@lru_cache(maxsize=1024)
def gradient_letters(cut: Cut, replicas: Replicas, world_size: int, rank: int) -> tuple[Letter, ...]:
    """Return what `rank` sends and gets so that the owners have their gradients."""
    pieces = gradient_pieces(cut, replicas, world_size)
    return tuple(Letter(p.holder, p.owner, p.rows) for p in pieces if rank in (p.owner, p.holder))


def bridge_bytes(parameters: Iterable[tuple[Cut, int]], replicas: Replicas, world_size: int) -> BridgeBytes:
    """Return what each rank sends in a step.

    Args:
        parameters: the cut of each, and the bytes of one of its rows as they are sent.
        replicas: of the step.
        world_size: ranks.
    """
    weights, gradients = [0] * world_size, [0] * world_size
    for cut, row_bytes in parameters:
        for piece in weight_pieces(cut, replicas, world_size):
            if piece.owner != piece.holder:
                weights[piece.owner] += len(piece.rows) * row_bytes
        for piece in gradient_pieces(cut, replicas, world_size):
            if piece.owner != piece.holder:
                gradients[piece.holder] += len(piece.rows) * row_bytes
    return BridgeBytes(weights=tuple(weights), gradients=tuple(gradients))


def _of_holder(cut: Cut, holder: int, group: Group, world_size: int) -> list[Piece]:
    held = cut.held(holder - group.first_rank, degree=group.scheme.ranks)
    if not held:
        return []
    owners = range(_owner(cut.size, held.start, world_size), _owner(cut.size, held.stop - 1, world_size) + 1)
    common = ((owner, cut.owned(owner, world_size=world_size).common(held)) for owner in owners)
    return [Piece(owner=owner, holder=holder, rows=rows) for owner, rows in common if rows]


def _speaker(owner: int, group: Group) -> int:
    return owner if owner in group.ranks else group.ranks[owner % len(group.ranks)]


def _owner(size: int, row: int, world_size: int) -> int:
    """Return the rank that owns a row: the first whose part ends behind it."""
    return ((row + 1) * world_size - 1) // size


def _part(size: int, place: int, parts: int) -> Rows:
    return Rows(start=place * size // parts, stop=(place + 1) * size // parts)
