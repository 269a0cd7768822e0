"""Records as elections and reports know them."""

from hardy.distributed.robust.election import Announcement
from hardy.distributed.robust.messages import announcement_of, counts_record, record_of, report_of
from hardy.distributed.robust.records import Kind, Seal

COUNTS = {"late": 1, "duplicates": 2, "reelections": 3, "refused": 4, "starved": 5, "lost": 6}


def test_announcements_come_back():
    announcement = Announcement(
        rank=1, generation=2, step=3, made_at=2, finite=False, loss=4.0, square=5.0, dot=6.0
    )
    record = record_of(announcement)
    assert record.kind is Kind.ANNOUNCE and announcement_of(record) == announcement


def test_counts_come_back_over_the_wire():
    seal = Seal(bytes(16))
    record = counts_record(COUNTS, kth_arrival_s=0.5, last_arrival_s=0.75)
    report = report_of(seal.unpack(seal.pack([record]))[0])
    assert report == COUNTS | {"kth_arrival_s": 0.5, "last_arrival_s": 0.75}
