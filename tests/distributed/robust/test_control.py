"""Host and members in one process: what goes through the queues, and what is refused there."""

import math
import socket
import time

import pytest

from hardy.config import UserError
from hardy.distributed.comm import WorkerLostError
from hardy.distributed.robust.control import LANE_LIMIT, POPS, ElectionHost, RunKey, StoreWire
from hardy.distributed.robust.election import Rules
from hardy.distributed.robust.records import ONE_RECORD_BYTES, Kind, Reason, Record
from hardy.distributed.store import connect_store

KEY = RunKey(run_id="a run", fingerprint="settings 1", secret=b"ours")


@pytest.fixture
def open_host():
    made = []

    def make(rules=None, *, replicas=2, key=KEY, **settings):
        made.append(ElectionHost(rules or Rules(k=1), key, replicas=replicas, **settings))
        return made[-1]

    yield make
    for host in made:
        host.close()
        assert not host._thread.is_alive()


def member(host, rank=0, *, key=KEY, at=0):
    wire = StoreWire(host.address, rank, key, start_s=20.0)
    assert wire.join(at).kind is Kind.ADMIT
    return wire


def until(fact, within_s=5.0):
    deadline_s = time.monotonic() + within_s
    while not fact():
        assert time.monotonic() < deadline_s, "it did not come true"
        time.sleep(0.005)


def ready(wire, step=0):
    wire.send(Record(kind=Kind.ANNOUNCE, step=step, made_at=step))


def push(wire, data):
    """Put bytes into a member's own queue."""
    wire._store.queue_push(wire._seal.lane(wire.rank, wire.generation, way="up"), data)


def test_a_lone_member_is_elected_and_commits(open_host):
    lines = []
    host = open_host(replicas=1, record_line=lines.append)
    wire = member(host)
    for step in range(3):
        ready(wire, step)
        go, announced = wire.hear()
        assert (go.kind, go.step, announced.rank) == (Kind.GO, step, 0)
        wire.send(Record(kind=Kind.DONE, attempt=go.attempt))
        assert [record.kind for record in wire.hear()] == [Kind.COMMIT, Kind.COUNTS]
    assert [line.elected for line in lines] == [(0,)] * 3
    wire.close()


@pytest.mark.parametrize(
    "changes", [{"secret": b"theirs"}, {"secret": b""}, {"run_id": "another"}], ids=["other", "none", "run"]
)
def test_another_secret_or_run_is_refused_before_anything_is_said(open_host, changes):
    host = open_host()
    key = RunKey(**({"run_id": "a run", "fingerprint": "settings 1", "secret": b"ours"} | changes))
    with pytest.raises(UserError, match=r"replica 0 has another secret than the host at .*secret_file"):
        StoreWire(host.address, 0, key)
    assert host.coordinator.counts["refused"] == 0


def test_no_secret_is_ever_shown():
    assert "ours" not in repr(KEY) and "a run" in repr(KEY)


def test_other_settings_are_refused_with_the_reason(open_host):
    host = open_host()
    wire = StoreWire(host.address, 1, RunKey(run_id="a run", fingerprint="settings 2", secret=b"ours"))
    with pytest.raises(
        UserError, match="replica 1 is refused: it runs with other settings or another version"
    ):
        wire.join(0)


def test_a_loss_that_the_launcher_reports_lets_the_others_begin(open_host):
    host = open_host(replicas=2)
    wire = member(host, 1)
    ready(wire)
    assert host.coordinator._attempt is None
    host.report_loss(0)
    assert wire.hear()[0].kind is Kind.GO


def test_damaged_long_forged_and_replayed_messages_are_refused_and_counted(open_host, caplog):
    host = open_host(replicas=2)
    wire, other = member(host, 0), member(host, 1)
    good = wire._seal.pack([Record(kind=Kind.LEAVE, rank=0, generation=1, number=1)])
    damaged = bytes([good[0] ^ 1]) + good[1:]
    forged = wire._seal.pack([Record(kind=Kind.LEAVE, rank=1, generation=1, number=1)])
    joins = wire._seal.pack([Record(kind=Kind.JOIN, rank=0)])
    for data in (b"", b"x", good[:-1], damaged, forged, joins):
        push(wire, data)
    ready(other)
    assert other.hear()[0].kind is Kind.GO
    until(lambda: host.coordinator.counts["refused"] == 6)
    assert host.coordinator.members == {0: 1, 1: 1}
    assert "a LEAVE of replica 1 in the wrong queue" in "".join(caplog.messages) or len(caplog.messages) >= 3
    push(wire, wire._seal.pack([Record(kind=Kind.ASK, rank=0, generation=1, number=1)]))
    push(wire, wire._seal.pack([Record(kind=Kind.ASK, rank=0, generation=1, number=1)]))
    wire._store.set("fastest/bell", "")
    until(lambda: host.coordinator.counts["duplicates"] == 1)


def test_what_was_sealed_for_another_start_of_the_run_is_refused(open_host):
    first, second = open_host(), open_host()
    old = member(first)
    wire = member(second)
    push(wire, old._seal.pack([Record(kind=Kind.LEAVE, rank=0, generation=1, number=1)]))
    second.report_loss(1)
    until(lambda: second.coordinator.counts["refused"] == 1)
    assert 0 in second.coordinator.members


@pytest.mark.parametrize("size", [ONE_RECORD_BYTES + 1, 8 << 20])
def test_a_message_that_no_record_can_be_ends_its_senders_membership(open_host, size):
    host = open_host(replicas=2)
    wire, other = member(host, 0), member(host, 1)
    push(wire, bytes(size))
    wire._store.set("fastest/bell", "")  # after all of it has arrived
    ready(other)
    assert other.hear()[0].kind is Kind.GO
    out = wire.hear()[0]
    assert (out.kind, out.reason) == (Kind.OUT, Reason.OVERSIZED)
    with pytest.raises(UserError, match="it sent far more messages|is refused"):
        wire.join(0)


def test_a_flood_ends_its_senders_membership_and_delays_nobody(open_host):
    host = open_host(replicas=2)
    wire, other = member(host, 0), member(host, 1)
    for _ in range(30_000):
        push(wire, b"x" * ONE_RECORD_BYTES)
    began_s = time.monotonic()
    for step in range(3):
        ready(other, step)
        go = other.hear()[0]
        other.send(Record(kind=Kind.DONE, attempt=go.attempt))
        assert other.hear()[0].kind is Kind.COMMIT
    assert time.monotonic() - began_s < 2.0
    assert wire.hear()[0].reason is Reason.FLOOD
    assert host.coordinator.counts["refused"] <= POPS + 1  # the rest was never taken


def test_a_burst_below_the_limit_is_no_flood(open_host):
    host = open_host(replicas=1)
    wire = member(host)
    for _ in range(LANE_LIMIT):
        push(wire, b"x" * ONE_RECORD_BYTES)
    ready(wire)
    assert wire.hear()[0].kind is Kind.GO
    assert host.coordinator.counts["refused"] == LANE_LIMIT


def test_a_flood_of_those_who_ask_to_join_delays_no_member(open_host):
    host = open_host(replicas=1)
    wire = member(host)
    for _ in range(20_000):
        wire._store.queue_push("fastest/join", b"nonsense")
    began_s = time.monotonic()
    ready(wire)
    assert wire.hear()[0].kind is Kind.GO
    assert time.monotonic() - began_s < 1.0
    assert host.coordinator.counts["refused"] < 20_000


def test_a_coordinator_that_fails_sends_all_home(open_host, caplog):
    def full_disk(_line):
        raise MemoryError("no memory")

    host = open_host(replicas=1, record_line=full_disk)
    wire = member(host)
    ready(wire)
    wire.send(Record(kind=Kind.DONE, attempt=wire.hear()[0].attempt))
    end = wire.hear()[0]
    assert (end.kind, end.reason) == (Kind.END, Reason.FAULT)
    assert "the coordinator of the elections failed" in caplog.text


def test_decisions_that_are_due_by_time_come(open_host):
    host = open_host(Rules(k=2, patience_s=0.05, on_shortfall="shrink"), replicas=1)
    wire = member(host)
    ready(wire)
    assert wire.hear()[0].kind is Kind.GO
    assert host.coordinator.due_s(math.inf) == math.inf


def test_a_moment_that_passes_while_the_coordinator_thinks_is_not_missed(open_host, monkeypatch):
    host = open_host(Rules(k=2, patience_s=0.3, on_shortfall="shrink"), replicas=1)
    wire = member(host)  # opens the election
    tick = host.coordinator.tick
    monkeypatch.setattr(host.coordinator, "tick", lambda now_s: (tick(now_s), time.sleep(0.4)))
    ready(wire)
    until(lambda: wire._store.queue_len(wire._seal.lane(wire.rank, wire.generation, way="down")) > 0)
    assert wire.hear()[0].kind is Kind.GO


def test_the_store_listens_at_the_given_interface(open_host):
    assert open_host().address.startswith("127.0.0.1:")
    with pytest.raises(UserError, match=r"cannot listen at '192.0.2.1'"):
        ElectionHost(Rules(k=1), KEY, replicas=1, host="192.0.2.1")


def test_a_store_that_does_not_answer_says_what_to_check():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(WorkerLostError, match=f"store of the elections at {address} does not answer; check"):
        StoreWire(address, 0, KEY, start_s=0.3)


def test_a_message_to_a_member_that_is_damaged_is_left_out(open_host, caplog):
    host = open_host(replicas=1)
    wire = member(host)
    wire._store.queue_push(wire._seal.lane(0, 1, way="down"), b"nonsense")
    ready(wire)
    assert wire.hear()[0].kind is Kind.GO
    assert "a message to replica 0 is refused: 8 bytes" in caplog.text
    assert connect_store(host.address, timeout_s=5.0).check(["fastest/salt"])
