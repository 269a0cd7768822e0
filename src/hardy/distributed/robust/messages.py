"""What records say, as elections and reports know it. Pure.

Paper: none.
"""

from collections.abc import Mapping
from typing import Any

from hardy.distributed.robust.election import Announcement
from hardy.distributed.robust.records import Kind, Record

_FIELDS = {
    "late": "step",
    "duplicates": "number",
    "reelections": "attempt",
    "refused": "made_at",
    "starved": "peer",
    "lost": "peer_generation",
}
"""Where a COUNTS record holds what was counted."""


def announcement_of(record: Record) -> Announcement:
    """Return what an ANNOUNCE says."""
    return Announcement(
        rank=record.rank,
        generation=record.generation,
        step=record.step,
        made_at=record.made_at,
        finite=record.finite,
        loss=record.loss,
        square=record.square,
        dot=record.dot,
    )


def record_of(announcement: Announcement) -> Record:
    """Return the ANNOUNCE that says this."""
    return Record(kind=Kind.ANNOUNCE, **vars(announcement))


def counts_record(counts: Mapping[str, int], *, kth_arrival_s: float, last_arrival_s: float) -> Record:
    """Return the COUNTS of what was counted so far, and of one step's arrivals."""
    numbers: dict[str, Any] = {field: counts.get(name, 0) for name, field in _FIELDS.items()}
    return Record(kind=Kind.COUNTS, square=kth_arrival_s, dot=last_arrival_s, **numbers)


def report_of(record: Record) -> dict[str, Any]:
    """Return what a COUNTS says, by name.

    Example:
        >>> report_of(counts_record({"late": 3}, kth_arrival_s=0.1, last_arrival_s=0.2))["late"]
        3
    """
    numbers = {name: getattr(record, field) for name, field in _FIELDS.items()}
    return {"kth_arrival_s": record.square, "last_arrival_s": record.dot} | numbers
