"""Envelopes between simulated replicas: what faults do, what is refused, and that replicas may vanish."""

import pytest
import torch

from hardy.distributed.comm import Alone
from hardy.distributed.gossip.exchange import ACCEPTED, NOTHING, REFUSED, Exchange, Ledger
from hardy.distributed.gossip.message import Flag
from hardy.distributed.simulation import SimWorld

X = [torch.arange(4.0), torch.ones(2)]


def exchange(comm, **settings):
    settings = {"run": 7, "like": X, "comm_dtype": torch.float32, "sums": False} | settings
    return Exchange(comm, Alone(clock=comm.clock), **settings)


def one_way(rounds=1, sender=None, faults=None, **settings):
    """Send from 0 to 1; return (codes of receipts, what arrived by round, counters of 1)."""

    def body(comm):
        mine = exchange(comm, faults=faults, **(settings | (sender or {}) if comm.rank == 0 else settings))
        codes, arrived = [], []
        for t in range(rounds):
            if comm.rank == 0:
                mine.send(t, {1: 0.25}, [x + t for x in X], 2.0, settings.get("sketch"))
                codes.append(mine.receipt(1).code)
            else:
                arrived.append(mine.receive(0, mass=1.0, sketch_m=None))
        return codes if comm.rank == 0 else (arrived, mine.counters)

    codes, (arrived, counters) = SimWorld(2).run(body)
    return codes, arrived, counters


def test_a_message_brings_numerators_their_share_and_mass():
    codes, [[gain]], counters = one_way()
    assert codes == [ACCEPTED] and (gain.sender, gain.factor, gain.mass, gain.sender_mass) == (
        0,
        0.25,
        0.5,
        2.0,
    )
    assert all(torch.equal(a, b) for a, b in zip(gain.vectors, X, strict=True))
    assert set(vars(counters).values()) == {0}


def fault(kind):
    return lambda t, sender, receiver: kind if t == 0 else ""


@pytest.mark.parametrize(
    ("kind", "code", "numbers", "counter"),
    [
        ("lost", REFUSED, [0, 1], "lost"),
        ("nan", REFUSED, [0, 1], "refused"),
        ("twice", ACCEPTED, [1, 1], "duplicates"),
        ("late", NOTHING, [0, 2], None),
    ],
)
def test_each_fault_has_its_end(kind, code, numbers, counter):
    codes, arrived, counters = one_way(rounds=2, faults=fault(kind))
    assert codes == [code, ACCEPTED] and [len(gains) for gains in arrived] == numbers
    assert {name: n for name, n in vars(counters).items() if n} == ({counter: 1} if counter else {})
    if kind == "late":
        assert [float(gain.vectors[1][0]) for gain in arrived[1]] == [1.0, 2.0]


def test_running_sums_make_good_for_what_was_lost():
    codes, arrived, _ = one_way(rounds=3, faults=fault("lost"), sums=True)
    assert codes[1:] == [ACCEPTED, ACCEPTED] and arrived[0] == []
    (second,), (third,) = arrived[1:]
    assert second.factor == 1.0 and second.mass == 1.0 and third.mass == 0.5  # two messages, then one
    assert second.vectors[1].tolist() == [0.25 * (1 + 2)] * 2 and third.vectors[1].tolist() == [0.75] * 2
    assert second.vectors[0].dtype == torch.float64


@pytest.mark.parametrize("stranger", [{"run": 8}])
def test_messages_of_another_run_are_refused_with_a_warning(stranger, caplog):
    codes, [gains], counters = one_way(sender=stranger)
    assert codes == [REFUSED] and gains == [] and counters.refused == 1
    assert "a message of replica 0 was refused: it belongs to another run" in caplog.text


def test_bytes_that_are_no_record_end_an_envelope():
    def body(comm):
        if comm.rank == 0:
            comm.post(torch.zeros(56, dtype=torch.uint8), to=1, tag=1)
            return exchange(comm).receipt(1).code
        mine = exchange(comm)
        return mine.receive(0, mass=1.0, sketch_m=None), mine.counters.refused

    assert SimWorld(2).run(body) == [REFUSED, ([], 1)]


def test_withheld_parameters_are_told_and_bring_nothing():
    def body(comm):
        mine = exchange(comm)
        if comm.rank == 0:
            mine.withhold(0, [1], 1.0, None)
            return mine.receipt(1).code
        (letter,) = mine.fetch(0)
        mine.drawn_letters[0] = [letter]
        return mine.receive(0, mass=1.0, sketch_m=None), letter.payload

    assert SimWorld(2).run(body) == [REFUSED, ([], [])]


def test_sketches_travel_both_ways():
    def body(comm):
        mine, sketch = exchange(comm, sketch_size=3), torch.full((3,), float(comm.rank + 1))
        if comm.rank == 0:
            mine.send(0, {1: 0.5}, X, 1.0, sketch)
            receipt = mine.receipt(1)
            return receipt.sketch_m.tolist(), receipt.mass
        (gain,) = mine.receive(0, mass=1.5, sketch_m=sketch)
        return gain.sketch_m.tolist()

    assert SimWorld(2).run(body) == [([2.0] * 3, 1.5), [1.0] * 3]


def test_what_travels_may_be_narrower():
    def body(comm):
        mine = exchange(comm, comm_dtype=torch.bfloat16)
        if comm.rank == 0:
            mine.send(0, {1: 0.5}, [x / 3 for x in X], 1.0, None)
            mine.receipt(1)
            return comm.bytes_sent
        (gain,) = mine.receive(0, mass=1.0, sketch_m=None)
        return gain.vectors[0].dtype

    assert SimWorld(2).run(body) == [56 + 2 * 6, torch.bfloat16]


def test_a_replica_that_died_is_left_out_and_its_share_kept(caplog):
    def body(comm):
        mine = exchange(comm)
        if comm.rank == 1:
            comm.die()
        if comm.rank == 2:
            return None
        gains = mine.receive(1, mass=1.0, sketch_m=None)
        sent = mine.send(0, {1: 0.3, 2: 0.3}, X, 1.0, None)
        return gains, sent.shares, mine.gone, mine.receipt(1), mine.counters.reabsorbed

    assert SimWorld(3, detect_s=0.5).run(body)[0] == ([], {2: 0.3}, {1}, None, 1)
    assert "replica 1 is gone" in caplog.text


def test_a_ledger_takes_each_round_once():
    ledger = Ledger()
    assert [ledger.takes(t) for t in (0, 0, 2, 1)] == [True, False, True, False]
    ledger.awaited.add(1)
    assert [ledger.takes(t) for t in (1, 1, 3)] == [True, False, True]


def test_names_are_kept_when_ranks_change():
    def body(comm):
        mine = exchange(comm)
        mine.ledgers[1], mine.ledgers[2] = Ledger(), Ledger()
        part = comm.divide([[0, 2], [1]])
        if comm.rank == 1:
            return None
        mine.forget([1])
        mine.join(part, [0, 2], generation=1)
        if comm.rank == 0:
            mine.send(0, {2: 0.5}, X, 1.0, None)
            return mine.me, mine.receipt(2).code, sorted(mine.ledgers)
        return mine.me, [gain.sender for gain in mine.receive(0, mass=1.0, sketch_m=None)]

    assert SimWorld(3).run(body) == [(0, ACCEPTED, [2]), None, (2, [0])]


def test_flags_are_told_apart():
    assert len({Flag.WITHHELD, Flag.MORE, Flag.LATE}) == 3
