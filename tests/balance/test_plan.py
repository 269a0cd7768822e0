"""A plan: who computes what, and what it says of itself."""

from dataclasses import replace

import pytest

from hardy.balance.plan import Group, MicroBatch, Plan, Scheme, stage_time, step_time


def batch(first, scheme, sequences=(), cost=0.0):
    group = Group(first_rank=first, scheme=scheme)
    return MicroBatch(group=group, sequences=tuple(sequences), tokens=len(sequences), cost=cost)


PAIR, ALONE = Scheme(context=2), Scheme()
SLOTS = (
    (batch(0, PAIR, [3], 4.0), batch(2, ALONE, [1], 1.0), batch(3, ALONE)),
    (batch(0, ALONE, [0], 2.0), batch(1, ALONE), batch(2, PAIR, [2, 4], 3.0)),
)
PLAN = Plan(slots=SLOTS, world_size=4, objective="lock_step", cost=7.0, lower_bound=5.0, bound_by=3)


def test_a_rank_finds_its_work_in_every_slot():
    assert [each.sequences for each in PLAN.of_rank(3)] == [(), (2, 4)]
    assert PLAN.mine(0, 1) is PLAN.mine(0, 0)
    assert PLAN.mine(1, 1) is not PLAN.mine(1, 0)


def test_groups_come_small_before_large_and_each_once():
    assert [(g.first_rank, g.scheme.ranks) for g in PLAN.groups] == [
        (0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (2, 2),
    ]  # fmt: skip


def test_idle_is_what_ranks_wait():
    assert PLAN.rank_times == (6.0, 4.0, 4.0, 3.0)
    assert PLAN.idle_share == pytest.approx(1 - 17 / 28)


def test_a_rank_without_a_group_is_idle_all_the_time():
    plan = replace(PLAN, slots=((batch(0, PAIR, [0], 7.0),),), objective="free_running")
    assert plan.mine(0, 3) is None and plan.of_rank(3) == ()
    assert plan.rank_times == (7.0, 7.0, 0.0, 0.0)


def test_times_by_objective():
    assert step_time(SLOTS, "lock_step") == 7.0
    fixed = ((batch(0, PAIR, [0], 4.0), batch(2, PAIR, [1], 1.0)), (batch(0, PAIR), batch(2, PAIR, [2], 5.0)))
    assert step_time(fixed, "lock_step") == 9.0
    assert step_time(fixed, "free_running") == 6.0


def test_a_pipeline_adds_its_slowest_for_every_further_stage():
    assert stage_time([2.0, 5.0], pipeline=1) == 7.0
    assert stage_time([5.0], pipeline=4) == 20.0
    pipe = Scheme(pipeline=2)
    slots = ((batch(0, pipe, [0], 2.0),), (batch(0, pipe, [1], 3.0),))
    plan = replace(PLAN, slots=slots, world_size=2, objective="free_running", cost=8.0)
    assert step_time(slots, "free_running") == 8.0 and plan.rank_times == (8.0, 8.0)


def test_the_hash_is_of_who_computes_what_alone():
    assert 0 <= PLAN.hash() < 2**63
    assert replace(PLAN, cost=8.0, lower_bound=1.0).hash() == PLAN.hash()
    other = (SLOTS[0], (batch(0, ALONE, [0]), batch(1, ALONE), batch(2, PAIR, [4, 2])))
    assert replace(PLAN, slots=other).hash() != PLAN.hash()
    assert replace(PLAN, slots=SLOTS[::-1]).hash() != PLAN.hash()
    joined = ((*SLOTS[0], *SLOTS[1]),)
    assert replace(PLAN, slots=joined).hash() != PLAN.hash()
    assert replace(PLAN, objective="free_running").hash() != PLAN.hash()
    assert PLAN.hash() == 4850884722516234031, "other machines would have another one"


def test_a_gap_is_explained():
    assert replace(PLAN, cost=5.2).warning() is None
    many = ((batch(0, PAIR, range(20), 7.0), batch(2, PAIR, range(20, 40), 1.0)),)
    assert "sequence 3 alone is the bound" in replace(PLAN, slots=many).warning()
    assert "40.0%" in replace(PLAN, slots=many, bound_by=None).warning()
    assert "loose" in PLAN.warning()


@pytest.mark.parametrize("degrees", [{"tensor": 0}, {"context": -1}])
def test_degrees_below_one_are_refused(degrees):
    with pytest.raises(ValueError, match="at least 1"):
        Scheme(**degrees)


def test_schemes_in_words():
    assert [str(s) for s in (Scheme(), Scheme(context=4), Scheme(tensor=8, pipeline=2))] == [
        "cp1", "cp4", "tp8 pp2",
    ]  # fmt: skip
