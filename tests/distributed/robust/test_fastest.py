"""One replica among the fastest, in simulation; as processes in `mp/test_fastest.py`."""

import logging

import pytest
import torch

from hardy.distributed.comm import WorkerLostError
from hardy.distributed.groups import ExcludedError, split
from hardy.distributed.robust.election import Rules
from hardy.distributed.robust.fastest import FastestGroup
from hardy.distributed.robust.fastest_simulated import SimWire
from hardy.distributed.robust.records import Reason
from hardy.distributed.simulation import SimWorld


def train(comm, *, rules, steps=10, slow=None, inner=None, at=None, begin=0, **settings):
    """Descend a quadratic by the weighted mean of the elected; return what became of it."""
    after, end = settings.pop("after", None), settings.pop("end", None)
    wire = SimWire(comm, rules=rules, **settings)
    group = FastestGroup(wire, replicas=comm.size, step=begin, inner=inner)
    x = torch.zeros(3, dtype=torch.float64)  # changed in place only
    step, made_at, grad, elected, late, reports = begin, None, None, {}, 0, []

    def work(decision):
        (at or (lambda *_: None))(comm, decision)
        weight = decision.records[group.replica].weight
        total = decision.comm.sum(torch.cat([grad * weight, torch.tensor([weight])]))
        (after or (lambda *_: None))(comm, decision)
        decision.inner.barrier()
        (end or (lambda *_: None))(comm, decision)
        return total[:3] / total[3]

    if group.is_behind:
        step, state = group.late_state([x])
        x.copy_(state[0])
    while step < steps:
        if made_at is None:
            comm.clock.sleep(1.0 + (slow or {}).get(comm.rank, 0.0) + 0.01 * comm.rank)
            grad = x - (comm.rank + step)
        now = step if made_at is None else made_at
        mean = group.take_part(step, work, state=lambda: [x], made_at=now, loss=float(step))  # noqa: B023 - never another one
        if mean is None:
            late += 1
            made_at = step if rules.takes_late else None
            step, state = group.late_state([x])
            x.copy_(state[0])
            continue
        x -= 0.5 * mean
        step, made_at = step + 1, None
        elected[step] = group._elected.keys()
        group.serve([x])
        reports.append(group.take_report())
    group.finish([x])
    took_s = comm.clock.now()
    group.close()
    return {"x": x.tolist(), "took_s": took_s, "late": late, "step": step, "reports": reports}


def run(num_workers, **settings):
    world = {key: settings.pop(key) for key in ("deaths", "births", "detect_s") if key in settings}
    return SimWorld(num_workers, **world).run(lambda comm: train(comm, **settings))


def same(results):
    return all(result["x"] == results[0]["x"] and result["step"] == 10 for result in results)


def test_a_straggler_costs_no_time_and_rejoins():
    slow = run(4, rules=Rules(k=3), slow={3: 5.0})
    assert same(slow) and slow[3]["late"] >= 1
    assert max(result["took_s"] for result in slow[:3]) < 10 * 1.05 + 5.0
    assert slow[0]["reports"][5]["kth_arrival_s"] == pytest.approx(1.02, abs=0.01)
    assert slow[0]["reports"][5]["elected"] == [0, 1, 2]


def test_all_of_n_is_the_ordinary_mean():
    results = run(3, rules=Rules(k=3))
    x = 0.0
    for step in range(10):
        x -= 0.5 * (x - (1 + step))
    assert same(results) and results[0]["x"] == pytest.approx([x] * 3, rel=1e-12)


def test_a_death_among_the_elected_is_tried_again_without_it():
    def act(comm, decision):
        if comm.rank == 1 and decision.step == 4:
            comm.die()

    results = run(5, rules=Rules(k=4, silence_s=2.0), at=act, detect_s=0.5)
    assert results[1] is None
    alive = [result for result in results if result]
    assert len(alive) == 4 and same(alive)
    last = alive[0]["reports"][-1]
    assert last["lost"] == 1 and last["reelections"] >= 1


def test_a_death_before_the_announcement_costs_nothing():
    results = run(5, rules=Rules(k=4), deaths={2: 3.5}, detect_s=0.1)
    alive = [result for result in results if result]
    assert len(alive) == 4 and same(alive) and alive[0]["reports"][-1]["reelections"] == 0


def test_one_that_comes_late_to_the_run_takes_the_state():
    results = run(4, rules=Rules(k=2), births={3: 4.2}, begin=0)
    assert results[3]["x"] == results[0]["x"] and same(results)


def test_late_gradients_are_dampened_and_not_computed_anew():
    results = run(4, rules=Rules(k=3, takes_late=True), slow={3: 2.5})
    assert same(results)
    plain = run(4, rules=Rules(k=3), slow={3: 2.5})
    assert plain[0]["x"] != results[0]["x"] and results[3]["late"] >= 1
    assert any(3 in report["elected"] for report in results[0]["reports"])


def test_when_too_few_are_left_at_a_step_they_help_those_who_are_late():
    results = run(4, rules=Rules(k=3), slow={3: 2.5}, deaths={0: 4.3}, detect_s=0.1)
    alive = [result for result in results if result]
    assert len(alive) == 3 and same(alive)


def test_a_deadline_takes_those_who_are_a_little_late():
    strict = run(4, rules=Rules(k=2))
    lenient = run(4, rules=Rules(k=2, deadline_factor=4.0))
    assert [len(report["elected"]) for report in strict[0]["reports"]] == [2] * 10
    assert len(lenient[0]["reports"][-1]["elected"]) == 4


def test_a_shortfall_that_is_an_error_ends_all():
    rules = Rules(k=3, patience_s=3.0, on_shortfall="error")
    with pytest.raises(WorkerLostError, match="the run ends: fewer than strategy.fastest.k gradients came"):
        run(3, rules=rules, slow={2: 50.0})


def test_a_log_replays_to_the_bit():
    lines = []
    first = run(5, rules=Rules(k=3), slow={0: 0.005, 4: 0.02, 1: 0.03}, record_line=lines.append)
    replay = {line.step: line.elected for line in lines}
    again = run(5, rules=Rules(k=3), slow={2: 0.3, 3: 0.1}, replay=replay)
    assert same(first) and again[0]["x"] == first[0]["x"]
    other = run(5, rules=Rules(k=3), slow={0: 0.2, 2: 0.3})
    assert other[0]["x"] != first[0]["x"]


def test_replicas_of_several_workers_decide_together():
    def body(comm):
        grid = split(comm, replicas=3, shards=2)
        return train(grid.outer, rules=Rules(k=2), inner=grid.inner, slow={2: 3.0})

    results = SimWorld(6).run(body)
    assert same(results) and results[5]["late"] == results[4]["late"] >= 1


@pytest.mark.parametrize("moment", ["after", "end"])
def test_what_one_worker_of_a_replica_could_not_finish_all_try_again(moment):
    failed = []

    def fail(comm, decision):
        if comm.rank == 1 and decision.step == 4 and not failed:
            failed.append(True)
            raise WorkerLostError("a connection broke")

    def body(comm):
        grid = split(comm, replicas=3, shards=2)
        hooks = {moment: fail} if comm.rank == 3 else {}
        return train(grid.outer, rules=Rules(k=3), inner=grid.inner, **hooks)

    results = SimWorld(6).run(body)
    assert failed and same(results)
    assert [result["reports"][-1]["reelections"] for result in results] == [1] * 6


def test_one_that_was_given_up_comes_back(caplog):
    def act(comm, decision):
        if comm.rank == 1 and decision.step == 4:
            comm.store["fastest"].coordinator.lose(1, comm.clock.now())

    with caplog.at_level(logging.WARNING):
        results = run(4, rules=Rules(k=3), at=act)
    assert same(results)
    assert "the others went on without replica 1: it was lost, or did not answer" in caplog.text


def test_one_that_is_replaced_or_barred_does_not_come_back():
    def act(comm, decision):
        if comm.rank == 1 and decision.step == 4:
            comm.store["fastest"].coordinator.lose(1, comm.clock.now(), reason=Reason.REPLACED)

    def body(comm):
        if comm.rank != 1:
            return train(comm, rules=Rules(k=3), at=act)
        with pytest.raises(ExcludedError, match="another process has come under its number"):
            train(comm, rules=Rules(k=3), at=act)
        return None

    results = SimWorld(4).run(body)
    assert same([result for result in results if result])


def test_a_report_is_given_once():
    def body(comm):
        group = FastestGroup(SimWire(comm, rules=Rules(k=1)), replicas=1)
        assert group.take_report() == {} and not group.is_behind
        decision = group.announce_and_elect(0, loss=2.5, square=4.0, dot=-1.0)
        assert decision.is_elected and decision.elected == (0,) and decision.comm.size == 1
        record = decision.records[0]
        assert (record.loss, record.square, record.dot, record.finite) == (2.5, 4.0, -1.0, True)
        assert group.commit() and group.step == 1
        assert group.take_report()["elected"] == [0] and group.take_report() == {}
        decision = group.announce_and_elect(1, finite=False)
        assert not decision.records[0].finite
        assert not group.commit(WorkerLostError("somebody died")) and group.step == 1
        assert group.announce_and_elect(1, finite=False).is_elected and group.commit()
        return group.step

    assert SimWorld(1).run(body) == [2]
