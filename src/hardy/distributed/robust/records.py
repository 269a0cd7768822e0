"""What goes over the wire of an election: fixed binary records, sealed; nothing is ever unpickled.

Message: magic, version, number of records, session | records of one fixed size | HMAC-SHA256 over all of it.
The session is drawn anew by each host, so nothing of another run or an earlier start can be replayed. Each
sender numbers its records; the receiver refuses a number it has seen (`coordinator`).

Covered by the seal, when a secret is given: strangers, changed and replayed messages. Not covered: a member
that has the secret and lies, whoever overloads the machine of the host, and reading along (nothing is
encrypted). Without a secret the seal only finds damage.
"""

import hashlib
import hmac
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

_HEAD = struct.Struct("<4sBH16s")
_BODY = struct.Struct("<BBiIQqIqiI?ddd16s16s")
_MAGIC, _VERSION = b"hrdy", 1
_SEAL_BYTES = 32
TOKEN_BYTES = 16
MAX_RECORDS = 4096
"""In one message; a longer one is refused unread."""
ONE_RECORD_BYTES = _HEAD.size + _BODY.size + _SEAL_BYTES
"""A member sends one record at a time, so all its messages have this length."""


class Kind(IntEnum):
    """What a record says."""

    JOIN = 1
    """Member: let me in."""
    ANNOUNCE = 2
    """Member: my gradient of this step is there."""
    DONE = 3
    """Member: I have the result of this attempt."""
    FAILED = 4
    """Member: I could not finish this attempt with `peer`."""
    ASK = 5
    """Member: I have no state, send me to one who has."""
    FINISH = 6
    """Member: I have done the last step, and can hand out its state until all have."""
    LEAVE = 7
    """Member: I go."""
    ADMIT = 16
    """Coordinator: you are in, under this generation."""
    REFUSE = 17
    """Coordinator: you are not let in."""
    GO = 18
    """Coordinator: you are elected; an ANNOUNCE of each of the elected follows."""
    COMMIT = 19
    """Coordinator: all elected have the result, so apply it; GIVEs and a COUNTS may follow."""
    RETRY = 20
    """Coordinator: an attempt failed; wait for the next GO with the same gradient."""
    TAKE = 21
    """Coordinator: take the state of this step from `peer`."""
    GIVE = 22
    """Coordinator: hand your state to `peer`."""
    COUNTS = 23
    """Coordinator: what was counted so far."""
    OUT = 24
    """Coordinator: the others go on without you."""
    END = 25
    """Coordinator: all have the last state, or the run cannot go on."""


class Reason(IntEnum):
    """Why someone is refused, left out or sent home."""

    NONE = 0
    SETTINGS = 1
    NUMBER = 2
    SILENT = 3
    REPLACED = 4
    FLOOD = 5
    OVERSIZED = 6
    SHORTFALL = 7
    NO_STATE = 8
    FAULT = 9
    UNREACHABLE = 10


REASONS = {
    Reason.NONE: "all is done",
    Reason.SETTINGS: "it runs with other settings or another version than the run; start all alike",
    Reason.NUMBER: "its number is not among those of the run; start as many replicas as the run was told of",
    Reason.SILENT: "it was lost, or did not answer within strategy.fastest.silence_s",
    Reason.REPLACED: "another process has come under its number",
    Reason.FLOOD: "it sent far more messages than the protocol has",
    Reason.OVERSIZED: "it sent a message of a length that no record has",
    Reason.SHORTFALL: (
        "fewer than strategy.fastest.k gradients came within strategy.fastest.patience_s; lower k, or set "
        "on_shortfall to 'wait' or 'shrink'"
    ),
    Reason.NO_STATE: "no replica is left that holds the parameters; go on from the last checkpoint",
    Reason.UNREACHABLE: "others could not exchange gradients with it, though it answers; look at its network",
    Reason.FAULT: "the coordinator failed; read the output of the launcher",
}
"""In words."""


class RecordError(ValueError):
    """A message that is not what it should be; the text says what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record. What a field means beside its name stands at its `Kind`."""

    kind: Kind
    reason: Reason = Reason.NONE
    rank: int = 0
    """The replica it comes from, or is about."""
    generation: int = 0
    """How many were let in under this number so far, this one included."""
    number: int = 0
    """Counts the sender's records from 1."""
    step: int = 0
    """Steps done by the parameters that it is about; -1 for none."""
    attempt: int = 0
    """Counts all meetings of a run, so that none is mistaken for another."""
    made_at: int = 0
    """The step whose parameters the gradient belongs to."""
    peer: int = -1
    """Another replica."""
    peer_generation: int = 0
    finite: bool = True
    """Whether the gradient is free of NaN and Inf."""
    loss: float = math.nan
    square: float = math.nan
    """Squared norm of the gradient, where the rule needs it."""
    dot: float = math.nan
    """Product of the gradient with the trusted one, where the rule needs it."""
    nonce: bytes = bytes(TOKEN_BYTES)
    """Of JOIN: drawn anew each time."""
    digest: bytes = bytes(TOKEN_BYTES)
    """Of JOIN: of run id, settings and versions."""


class Seal:
    """Packs and checks messages of one session.

    Args:
        session: 16 bytes drawn by the host.
        secret: shared by all; empty for none.

    Example:
        >>> seal = Seal(bytes(16), secret=b"ours")
        >>> seal.unpack(seal.pack([Record(kind=Kind.DONE, rank=3, step=7)]))[0].step
        7
    """

    def __init__(self, session: bytes, *, secret: bytes = b"") -> None:
        if len(session) != TOKEN_BYTES:
            raise RecordError(f"a session has {TOKEN_BYTES} bytes, got {len(session)}")
        self._session = session
        self._secret = hmac.digest(secret, b"hardy election" + session, "sha256")

    def pack(self, records: Sequence[Record]) -> bytes:
        """Return the message of some records."""
        if not 1 <= len(records) <= MAX_RECORDS:
            raise RecordError(f"a message has 1 to {MAX_RECORDS} records, got {len(records)}")
        head = _HEAD.pack(_MAGIC, _VERSION, len(records), self._session)
        data = head + b"".join(_pack(record) for record in records)
        return data + hmac.digest(self._secret, data, "sha256")

    def unpack(self, data: bytes, *, max_records: int = MAX_RECORDS) -> list[Record]:
        """Return the records of a message.

        Raises:
            RecordError: it is not a message of this session, or not sealed with the secret.
        """
        if len(data) > _HEAD.size + max_records * _BODY.size + _SEAL_BYTES:
            raise RecordError(f"{len(data)} bytes, more than {max_records} records have")
        if len(data) < ONE_RECORD_BYTES:
            raise RecordError(f"{len(data)} bytes, fewer than one record has")
        body, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
        if not hmac.compare_digest(hmac.digest(self._secret, body, "sha256"), seal):
            raise RecordError("a seal that was not made with the secret of this run, or a damaged message")
        magic, version, count, session = _HEAD.unpack_from(body)
        if (magic, version, session) != (_MAGIC, _VERSION, self._session):
            raise RecordError("a message of another session or version")
        if count < 1 or len(body) != _HEAD.size + count * _BODY.size:
            raise RecordError(f"{len(data)} bytes, which {count} records do not have")
        return [_unpack(body, _HEAD.size + i * _BODY.size) for i in range(count)]

    def lane(self, rank: int, generation: int, *, way: str) -> str:
        """Return the name of a member's queue; strangers to the secret cannot guess it."""
        name = f"{way}/{rank}.{generation}"
        return f"fastest/{name}/{hmac.digest(self._secret, name.encode(), 'sha256').hex()[:32]}"

    def proof(self) -> bytes:
        """Return what tells those who know the secret from all others."""
        return hmac.digest(self._secret, b"proof", "sha256")


def digest_of(*words: str) -> bytes:
    """Return a short digest of some words.

    Example:
        >>> digest_of("a", "b") == digest_of("ab", "")
        False
    """
    return hashlib.sha256("\0".join(words).encode()).digest()[:TOKEN_BYTES]


def _pack(record: Record) -> bytes:
    values = vars(record)
    try:
        return _BODY.pack(*values.values())
    except struct.error as error:
        raise RecordError(f"{record} does not fit a record: {error}") from error


def _unpack(data: bytes, offset: int) -> Record:
    kind, reason, *rest = _BODY.unpack_from(data, offset)
    names = list(Record.__dataclass_fields__)[2:]
    try:
        return Record(kind=Kind(kind), reason=Reason(reason), **dict(zip(names, rest, strict=True)))
    except ValueError as error:
        raise RecordError(str(error)) from error
