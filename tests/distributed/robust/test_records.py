"""What the seal refuses: damage, strangers, other sessions, and lengths that no record has."""

import inspect
import math
import random

import pytest

from hardy.distributed.robust import (
    admission,
    control,
    coordinator,
    elected,
    election,
    election_log,
    fastest,
    links,
    messages,
    records,
)
from hardy.distributed.robust.records import (
    MAX_RECORDS,
    ONE_RECORD_BYTES,
    REASONS,
    Kind,
    Reason,
    Record,
    RecordError,
    Seal,
    digest_of,
)

SESSION = bytes(range(16))
SEAL = Seal(SESSION, secret=b"ours")
FULL = Record(
    kind=Kind.ANNOUNCE,
    reason=Reason.SILENT,
    rank=7,
    generation=3,
    number=1 << 40,
    step=1 << 33,
    attempt=12,
    made_at=-1,
    peer=5,
    peer_generation=2,
    finite=False,
    loss=1.25,
    square=math.inf,
    dot=-0.5,
    nonce=bytes(range(16, 32)),
    digest=bytes(range(32, 48)),
)


def test_records_come_back_as_they_were():
    assert SEAL.unpack(SEAL.pack([FULL])) == [FULL]
    many = [Record(kind=kind, rank=kind.value, loss=0.0, square=0.0, dot=0.0) for kind in Kind]
    assert SEAL.unpack(SEAL.pack(many)) == many
    assert len(SEAL.pack([FULL])) == ONE_RECORD_BYTES
    assert math.isnan(SEAL.unpack(SEAL.pack([Record(kind=Kind.DONE)]))[0].loss)


def test_every_flipped_bit_is_refused():
    for seal in (SEAL, Seal(SESSION)):  # without a secret too
        data = seal.pack([FULL])
        for bit in range(8 * len(data)):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            with pytest.raises(RecordError, match="a seal that was not made with the secret"):
                seal.unpack(bytes(changed))


def test_every_truncation_and_every_growth_is_refused():
    data = SEAL.pack([FULL, FULL])
    for length in range(len(data)):
        with pytest.raises(RecordError):
            SEAL.unpack(data[:length])
    for more in (b"x", b"x" * 75, data):
        with pytest.raises(RecordError):
            SEAL.unpack(data + more)
    with pytest.raises(RecordError, match="8388608 bytes, more than 1 records have"):
        SEAL.unpack(bytes(8 << 20), max_records=1)
    with pytest.raises(RecordError, match="more than 1 records have"):
        SEAL.unpack(data, max_records=1)


def test_chance_bytes_are_refused():
    chance = random.Random(0)
    for _ in range(300):
        with pytest.raises(RecordError):
            SEAL.unpack(chance.randbytes(chance.randrange(2 * ONE_RECORD_BYTES)))


def test_another_secret_and_another_session_are_refused():
    data = SEAL.pack([FULL])
    for other in (Seal(SESSION, secret=b"theirs"), Seal(SESSION), Seal(bytes(16), secret=b"ours")):
        with pytest.raises(RecordError, match="not made with the secret of this run"):
            other.unpack(data)
        assert other.proof() != SEAL.proof()
        assert other.lane(1, 1, way="up") != SEAL.lane(1, 1, way="up")
    assert len({SEAL.lane(rank, generation, way="up") for rank in (1, 2) for generation in (1, 2)}) == 4
    assert SEAL.lane(1, 1, way="up") != SEAL.lane(1, 1, way="down")


@pytest.mark.parametrize("kind", [0, 9, 200])
def test_kinds_and_reasons_that_do_not_exist_are_refused_though_sealed(kind):
    data = bytearray(SEAL.pack([FULL]))[:-32]
    data[records._HEAD.size] = kind
    sealed = bytes(data) + records.hmac.digest(SEAL._secret, bytes(data), "sha256")
    with pytest.raises(RecordError, match="is not a valid Kind"):
        SEAL.unpack(sealed)


def test_what_does_not_fit_is_not_packed():
    for values in ({"rank": 1 << 40}, {"step": 1 << 70}, {"peer": "x"}):
        with pytest.raises(RecordError, match="does not fit a record"):
            SEAL.pack([Record(kind=Kind.DONE, **values)])
    for number in (0, MAX_RECORDS + 1):
        with pytest.raises(RecordError, match=f"a message has 1 to {MAX_RECORDS} records, got {number}"):
            SEAL.pack([FULL] * number)
    with pytest.raises(RecordError, match="a session has 16 bytes, got 3"):
        Seal(b"abc")


def test_every_reason_has_words():
    assert set(REASONS) == set(Reason)


def test_digests_tell_words_apart():
    assert len({digest_of("a", "b"), digest_of("ab"), digest_of("a", "bc"), digest_of("b", "a")}) == 4


def test_nothing_of_the_wire_unpickles():
    for module in (
        admission, control, coordinator, elected, election, election_log, fastest, links, messages, records,
    ):  # fmt: skip
        source = inspect.getsource(module)
        for word in ("import pickle", "pickle.loads", "torch.load", "object_list", "gather_object", "eval("):
            assert word not in source, f"{module.__name__} has {word}"
