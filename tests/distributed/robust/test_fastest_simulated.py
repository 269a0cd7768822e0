"""The simulated wire."""

import pytest
import torch

from hardy.distributed.robust.election import Rules
from hardy.distributed.robust.fastest_simulated import SimWire
from hardy.distributed.robust.records import Kind, Record
from hardy.distributed.simulation import SimWorld


def test_all_workers_share_one_coordinator_and_hear_their_own_answers():
    def body(comm):
        wire = SimWire(comm, rules=Rules(k=2))
        admitted = wire.join(0)
        comm.clock.sleep(0.1 * comm.rank)
        wire.send(Record(kind=Kind.ANNOUNCE, step=0, made_at=0))
        if comm.rank == 2:
            return admitted.generation, wire.coordinator.counts["late"]
        go, *announced = wire.hear()
        group = wire.comm({record.rank: record.generation for record in announced}, meeting=go.attempt)
        wire.drop(1)
        wire.close()
        return wire.rank, group.sum(torch.tensor(comm.rank + 1)).item(), round(comm.clock.now(), 3)

    assert SimWorld(3).run(body) == [(0, 3, 0.1), (1, 3, 0.1), (1, 1)]


def test_a_dead_worker_is_noticed_by_those_who_wait():
    def body(comm):
        wire = SimWire(comm, rules=Rules(k=2, patience_s=0.5, on_shortfall="shrink", least=1))
        wire.join(0)
        if comm.rank == 1:
            comm.die()
        wire.send(Record(kind=Kind.ANNOUNCE, step=0, made_at=0))
        return wire.hear()[0].kind, list(wire.coordinator.members), comm.clock.now()

    kind, members, now_s = SimWorld(2).run(body)[0]
    assert (kind, members) == (Kind.GO, [0]) and now_s == pytest.approx(0.5, abs=0.01)
