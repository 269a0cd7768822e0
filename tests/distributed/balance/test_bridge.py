"""The map between the optimizer's layout and replicas: every row exactly once, both ways, and its bytes."""

from itertools import combinations_with_replacement

import pytest

from hardy.balance.plan import Group, Scheme
from hardy.distributed.balance.bridge import (
    NOTHING,
    Cut,
    Rows,
    bridge_bytes,
    gradient_letters,
    gradient_pieces,
    replica_of,
    weight_letters,
    weight_pieces,
)


def replicas_of(degrees, *, first_rank=0):
    firsts = [first_rank + sum(degrees[:place]) for place in range(len(degrees))]
    schemes = [Scheme(tensor=degree) for degree in degrees]
    return tuple(Group(first_rank=first, scheme=s) for first, s in zip(firsts, schemes, strict=True))


# Of each: ranks of the world, replicas. Powers of two and others, with idle ranks and without, at any end.
LAYOUTS = [
    (size, replicas_of(degrees[::-1], first_rank=first))
    for size in (1, 2, 3, 4, 6)
    for count in range(1, 5)
    for degrees in combinations_with_replacement((1, 2, 3, 4), count)
    for first in (0, 1)
    if first + sum(degrees) <= size
]
CUTS = [Cut(size=size, shared=shared) for size in (24, 12, 2, 1) for shared in (True, False)]


def counted(pieces, size):
    """Return how often each row occurs."""
    counts = [0] * size
    for piece in pieces:
        for row in range(piece.rows.start, piece.rows.stop):
            counts[row] += 1
    return counts


def test_there_are_enough_layouts_to_speak_of_any():
    assert len(LAYOUTS) > 40 and (4, replicas_of((2, 1, 1))) in LAYOUTS


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_holder_gets_each_of_its_rows_once_from_the_rank_that_owns_it(cut):
    for world_size, replicas in LAYOUTS:
        pieces = weight_pieces(cut, replicas, world_size)
        for rank in range(world_size):
            held = cut.held_by(rank, replicas)
            want = [int(held.start <= row < held.stop) for row in range(cut.size)]
            assert counted([piece for piece in pieces if piece.holder == rank], cut.size) == want
        for piece in pieces:
            owned = cut.owned(piece.owner, world_size=world_size)
            assert len(piece.rows) > 0 and owned.common(piece.rows) == piece.rows


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_owner_gets_each_of_its_rows_once_from_every_replica(cut):
    for world_size, replicas in LAYOUTS:
        pieces = gradient_pieces(cut, replicas, world_size)
        for group in replicas:
            from_group = [piece for piece in pieces if piece.holder in group.ranks]
            assert counted(from_group, cut.size) == [1] * cut.size
        for piece in pieces:
            assert cut.owned(piece.owner, world_size=world_size).common(piece.rows) == piece.rows
            assert cut.held_by(piece.holder, replicas).common(piece.rows) == piece.rows


def test_a_ranks_letters_are_the_pieces_it_owns_or_holds():
    for cut in CUTS:
        for world_size, replicas in LAYOUTS:
            weights, gradients = (
                make(cut, replicas, world_size) for make in (weight_pieces, gradient_pieces)
            )
            for rank in range(world_size):
                told = weight_letters(cut, replicas, world_size, rank)
                assert list(told) == [
                    (p.owner, p.holder, p.rows) for p in weights if rank in (p.owner, p.holder)
                ]
                told = gradient_letters(cut, replicas, world_size, rank)
                assert list(told) == [
                    (p.holder, p.owner, p.rows) for p in gradients if rank in (p.owner, p.holder)
                ]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_two_ways_are_each_others_transpose(cut):
    """<weights(x), y> = <x, gradients(y)>, where ranks of a replica that hold the same count once."""
    for world_size, replicas in LAYOUTS:
        there = {(p.owner, p.holder, p.rows) for p in weight_pieces(cut, replicas, world_size)}
        back = {(p.owner, p.holder, p.rows) for p in gradient_pieces(cut, replicas, world_size)}
        if cut.shared:
            assert back == there
            continue
        assert back <= there
        first_of = {rank: group.first_rank for group in replicas for rank in group.ranks}
        one_of_each = {(owner, first_of[holder], rows) for owner, holder, rows in there}
        assert {(owner, first_of[holder], rows) for owner, holder, rows in back} == one_of_each
        assert len(back) == len(one_of_each)


@pytest.mark.parametrize("size", [24, 25, 3, 1, 0])
@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_the_optimizer_keeps_every_row_on_one_rank_and_equally_many_on_all(size, world_size):
    owned = [Cut(size=size, shared=True).owned(rank, world_size=world_size) for rank in range(world_size)]
    assert [owned[0].start, owned[-1].stop] == [0, size]
    assert all(one.stop == following.start for one, following in zip(owned, owned[1:], strict=False))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


def test_ranks_in_no_replica_own_but_hold_nothing():
    replicas = replicas_of((2,), first_rank=1)
    weight = Cut(size=8, shared=True)
    assert weight.held_by(0, replicas) == weight.held_by(3, replicas) == NOTHING
    assert [weight.held_by(rank, replicas) for rank in (1, 2)] == [
        Rows(start=0, stop=4),
        Rows(start=4, stop=8),
    ]
    assert replica_of(3, replicas) is None and replica_of(2, replicas) == replicas[0]
    assert {piece.owner for piece in weight_pieces(weight, replicas, 4)} == {0, 1, 2, 3}


def test_rows_that_do_not_meet_have_nothing_in_common():
    assert len(Rows(start=0, stop=2).common(Rows(start=5, stop=7))) == 0
    assert len(Rows(start=5, stop=7).common(Rows(start=0, stop=2))) == 0
    assert Rows(start=0, stop=6).common(Rows(start=4, stop=9)) == Rows(start=4, stop=6)


def test_the_order_of_gradients_is_that_of_the_replicas():
    """So that sums have the same bits on every run."""
    for world_size, replicas in LAYOUTS:
        holders = [piece.holder for piece in gradient_pieces(CUTS[0], replicas, world_size)]
        assert holders == sorted(holders)


def test_who_tells_a_gradient_that_all_of_a_replica_have():
    whole = Cut(size=8, shared=False)
    told = {p.owner: p.holder for p in gradient_pieces(whole, replicas_of((2,), first_rank=1), 4)}
    assert told == {0: 1, 1: 1, 2: 2, 3: 2}  # owners inside tell themselves, the others are shared out


# Of a parameter of 24 rows and 10 bytes a row on 4 ranks (6 rows each), by hand; weights and gradients sent.
SENT = {
    (4,): {True: ([0] * 4, [0] * 4), False: ([180] * 4, [0] * 4)},
    (1, 1, 1, 1): {True: ([180] * 4, [180] * 4), False: ([180] * 4, [180] * 4)},
    # Ranks 0 and 1 hold rows 0-11 and 12-23 of what is shared, and send what ranks 2 and 3 own.
    (2, 1, 1): {
        True: ([120, 180, 120, 120], [60, 120, 180, 180]),
        False: ([180] * 4, [60, 60, 180, 180]),
    },
}


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "whole"])
@pytest.mark.parametrize("degrees", SENT, ids=str)
def test_the_bytes_sent(degrees, shared):
    sent = bridge_bytes([(Cut(size=24, shared=shared), 10)], replicas_of(degrees), 4)
    assert (list(sent.weights), list(sent.gradients)) == SENT[degrees][shared]
    both = bridge_bytes([(Cut(size=24, shared=shared), 10)] * 2, replicas_of(degrees), 4)
    assert both.weights == tuple(2 * count for count in sent.weights)


def test_bytes_are_what_is_held_less_what_is_owned_too():
    for cut in CUTS:
        for world_size, replicas in LAYOUTS:
            received = 0
            for rank in range(world_size):
                held = cut.held_by(rank, replicas)
                own = held.common(cut.owned(rank, world_size=world_size)) if held != NOTHING else NOTHING
                received += 3 * (len(held) - len(own))
            assert sum(bridge_bytes([(cut, 3)], replicas, world_size).weights) == received


def test_only_owners_of_held_rows_are_looked_at_and_none_is_missed():
    for size in (1, 3, 24, 25):
        for world_size in (1, 2, 4, 7):
            cut = Cut(size=size, shared=False)
            for rank in range(world_size):
                replicas = replicas_of((1,), first_rank=rank)
                told = [
                    row
                    for p in weight_pieces(cut, replicas, world_size)
                    for row in range(p.rows.start, p.rows.stop)
                ]
                assert told == list(range(size))
