"""When each rank works."""

import pytest

from hardy.balance.plan import Group, MicroBatch, Plan, Scheme
from hardy.balance.timeline import spans, timeline


def plan_of(objective, slots, *, cost, pipeline=1):
    scheme = Scheme(pipeline=pipeline)
    made = tuple(
        tuple(
            MicroBatch(
                group=Group(first_rank=k * pipeline, scheme=scheme),
                sequences=(k,) if time else (),
                tokens=1,
                cost=time,
            )
            for k, time in enumerate(slot)
        )
        for slot in slots
    )
    size = len(slots[0]) * pipeline
    return Plan(slots=made, world_size=size, objective=objective, cost=cost, lower_bound=cost)


def test_in_lock_step_a_slot_waits_for_all():
    made = plan_of("lock_step", [(4.0, 2.0), (1.0, 3.0)], cost=7.0)
    assert spans(made, 0) == [(0.0, 4.0), (4.0, 5.0)]
    assert spans(made, 1) == [(0.0, 2.0), (4.0, 7.0)]


def test_free_running_ranks_go_on_at_once():
    made = plan_of("free_running", [(4.0, 2.0), (0.0, 1.0)], cost=4.0)
    assert spans(made, 1) == [(0.0, 2.0), (2.0, 3.0)]
    assert spans(made, 0) == [(0.0, 4.0)]


def test_a_pipelines_bubbles_count_to_its_last():
    made = plan_of("free_running", [(4.0,), (2.0,)], cost=10.0, pipeline=2)
    assert spans(made, 1) == [(0.0, 4.0), (4.0, 10.0)]


def test_letters_are_as_long_as_they_take():
    lines = timeline(plan_of("lock_step", [(4.0, 2.0), (1.0, 4.0)], cost=8.0), width=8)
    assert lines == ["rank   0 |aaaab...| 62%", "rank   1 |aa..bbbb| 75%"]


def test_many_ranks_are_cut():
    made = plan_of("lock_step", [(1.0,) * 5], cost=1.0)
    assert timeline(made, most_ranks=3)[-1] == "... and 2 more ranks"
    assert len(timeline(made, most_ranks=5)) == 5


@pytest.mark.parametrize("width", [1, 7, 60])
def test_a_line_has_its_width(width):
    made = plan_of("free_running", [(0.001, 5.0), (4.0, 0.0)], cost=5.0)
    assert all(len(line.split("|")[1]) == width for line in timeline(made, width=width))
