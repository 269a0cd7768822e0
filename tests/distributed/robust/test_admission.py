"""Who is let in."""

import pytest

from hardy.distributed.robust.admission import NO_STATE, Admission, Seat
from hardy.distributed.robust.records import Kind, Reason, Record

DIGEST = b"d" * 16


def join(rank, *, nonce=b"n" * 16, digest=DIGEST):
    return Record(kind=Kind.JOIN, rank=rank, nonce=nonce, digest=digest)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (join(0), Reason.NONE),
        (join(3), Reason.NONE),
        (join(4), Reason.NUMBER),
        (join(0, digest=b"e" * 16), Reason.SETTINGS),
        (join(1), Reason.FLOOD),
    ],
)
def test_who_is_refused(record, reason):
    door = Admission(replicas=4, digest=DIGEST)
    door.bar(1)
    assert door.objection(record) is reason


def test_a_replayed_request_is_known_by_its_nonce():
    door = Admission(replicas=4, digest=DIGEST)
    assert not door.is_replayed(join(0)) and not door.is_replayed(join(0, nonce=b"m" * 16))
    assert door.is_replayed(join(0)) and door.is_replayed(join(2))


def test_generations_count_by_rank():
    door = Admission(replicas=4, digest=DIGEST)
    assert [door.next_generation(rank) for rank in (0, 1, 0, 0)] == [1, 1, 2, 3]


def test_a_seat_has_an_address():
    assert Seat(rank=2, generation=5, at=NO_STATE).address == (2, 5)
