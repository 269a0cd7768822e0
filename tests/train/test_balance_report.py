"""Times of workers, and costs held against them: what is warned of, fitted again, or left alone."""

import logging

import pytest
import torch
from torch import nn

from hardy.balance.cost import LengthCostModel, SchemeCost
from hardy.balance.plan import Group, MicroBatch, Plan, Scheme
from hardy.balance.planner import plan
from hardy.clock import VirtualClock
from hardy.train.balance_report import (
    STEPS_LOOKED_AT,
    UNTIMED_STEPS,
    CostCheck,
    GroupsFormed,
    OwnTime,
    works_of,
)

STEPS = STEPS_LOOKED_AT + UNTIMED_STEPS


def cost(*, unit="ms", a=1.0):
    schemes = (
        SchemeCost(scheme=Scheme(), a=a, b=1.0, c=2.0, cap_tokens=64),
        SchemeCost(scheme=Scheme(context=2), a=a / 2, b=0.5, c=2.0, cap_tokens=128),
    )
    return LengthCostModel(schemes=schemes, unit=unit)


def steps(check, count, seconds_of, *, objective="free_running", offset=0):
    """Show `count` steps of two workers to the check; return what it gave back."""
    found = []
    for step in range(offset, offset + count):
        lengths = [3 + step % 5, 4, 9, 2, 7, 1 + step % 3]
        made = plan(lengths, world_size=2, cost=check.cost, objective=objective, mode="dispatch")
        found.append(check.add(made, lengths, [seconds_of(time) for time in made.rank_times]))
    return found


def test_good_costs_are_left_alone(caplog):
    check = CostCheck(cost(), refit=True)
    assert check.error is None
    with caplog.at_level(logging.WARNING):
        assert set(steps(check, 2 * STEPS, lambda ms: 1.1e-3 * ms)) == {None}
    assert check.error == pytest.approx(0.1 / 1.1)
    assert not caplog.records


def test_costs_that_are_off_are_warned_of_once(caplog):
    check = CostCheck(cost(), refit=False)
    with caplog.at_level(logging.WARNING):
        assert set(steps(check, STEPS - 1, lambda ms: 2e-3 * ms)) == {None}
        assert not caplog.records
        assert set(steps(check, STEPS, lambda ms: 2e-3 * ms)) == {None}
    assert [record.getMessage() for record in caplog.records] == [
        "predicted step times are off by 50 % (median of 32 steps), so plans balance something else; measure "
        "costs with `hardy balance profile` on this machine and give balance.cost, or set "
        "balance.model_error=refit"
    ]


def test_costs_that_are_off_are_fitted_again():
    check = CostCheck(cost(), refit=True)
    found = steps(check, STEPS, lambda ms: 2e-3 * ms)
    assert found[:-1] == [None] * (STEPS - 1)
    assert found[-1].of(Scheme()).a == pytest.approx(2.0)
    check.use(found[-1])
    assert check.error is None
    assert set(steps(check, STEPS, lambda ms: 1e-3 * ms)) == {None}
    assert check.error == pytest.approx(0, abs=1e-9)


def test_in_lock_step_the_whole_step_counts_and_only_the_scale_changes():
    check = CostCheck(cost(), refit=True)
    for step in range(STEPS):
        lengths = [3 + step % 5, 40, 39, 2, 7]
        made = plan(lengths, world_size=2, cost=check.cost, objective="lock_step", mode="dispatch")
        found = check.add(made, lengths, [3e-3 * made.cost] * 2)
    assert (found.of(Scheme()).a, found.of(Scheme()).c) == pytest.approx((3.0, 6.0))


def test_costs_in_another_unit_find_their_seconds():
    check = CostCheck(cost(unit="GFLOP"), refit=False)
    assert check.seconds_per_unit is None
    steps(check, UNTIMED_STEPS, lambda units: units)  # slower, and not counted
    assert check.seconds_per_unit is None
    steps(check, 5, lambda units: 0.25 * units)
    assert check.seconds_per_unit == pytest.approx(0.25)
    assert check.error == pytest.approx(0)


def test_virtual_steps_that_take_no_time_say_nothing():
    check = CostCheck(cost(), refit=True)
    assert set(steps(check, 2 * STEPS, lambda _: 0.0)) == {None}
    assert check.error is None


def test_works_are_those_of_busy_workers():
    both = Group(first_rank=0, scheme=Scheme(context=2))
    lone, idle = (Group(first_rank=rank, scheme=Scheme()) for rank in (2, 3))
    slots = (
        (micro_batch(both, 0), micro_batch(lone, 1, 2), micro_batch(idle)),
        (micro_batch(both, 3), micro_batch(lone), micro_batch(idle)),
    )
    made = Plan(slots=slots, world_size=4, objective="free_running", cost=1.0, lower_bound=1.0)
    works = works_of(made, [6, 3, 2, 1], [0.1, 0.2, 0.3, 0.4])
    shared = {"scheme": both.scheme, "squares": 37.0, "tokens": 7.0, "micro_batches": 2}
    alone = {"scheme": lone.scheme, "squares": 13.0, "tokens": 5.0, "micro_batches": 1}
    told = [shared | {"seconds": 0.1}, shared | {"seconds": 0.2}, alone | {"seconds": 0.3}]
    assert sorted(map(vars, works), key=lambda work: work["seconds"]) == told


def micro_batch(group, *sequences):
    return MicroBatch(group=group, sequences=sequences, tokens=len(sequences), cost=float(len(sequences)))


def test_own_time_ends_with_the_last_gradient():
    clock = VirtualClock()
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    time = OwnTime(layers.parameters(), clock, torch.device("cpu"))
    clock.sleep(5.0)
    time.start()
    assert time.seconds() == 0.0
    for _ in range(2):
        clock.sleep(1.5)
        layers(torch.ones(1, 2)).sum().backward()
    clock.sleep(4.0)  # waiting for others
    assert time.seconds() == 3.0


def test_that_no_group_was_formed_is_said_with_what_a_group_would_have_taken():
    groups, own = GroupsFormed(), cost()
    assert groups.note(own, 2) is None, "before any step there is nothing to say"
    for lengths in ([3, 4, 9], [12, 2]):
        groups.add(plan(lengths, world_size=2, cost=own, mode="dispatch"), lengths)
    alone, shared = 12 * 12 + 12 + 2, 6 * 12 + 6 + 2
    assert groups.note(own, 2) == (
        f"no group of several workers was worth it in 2 steps: by the costs 2 workers that share the longest "
        f"document (12 tokens) take {shared / alone:.2f} of the time that one takes, and no step would have "
        f"been shorter"
    )
    made = plan([100], world_size=2, cost=own)
    assert made.groups[-1].scheme.ranks == 2
    groups.add(made, [100])
    groups.add(plan([3, 4], world_size=2, cost=own, mode="dispatch"), [3, 4])
    assert groups.note(own, 2) is None, "one group in a run is enough"


def test_a_group_without_documents_is_no_group_that_was_worth_it():
    groups, both = GroupsFormed(), Group(first_rank=0, scheme=Scheme(context=2))
    empty = MicroBatch(group=both, sequences=(), tokens=0, cost=0.0)
    one = MicroBatch(group=Group(first_rank=0, scheme=Scheme()), sequences=(0,), tokens=3, cost=1.0)
    groups.add(
        Plan(slots=((empty,), (one,)), world_size=2, objective="lock_step", cost=1.0, lower_bound=1.0), [3]
    )
    assert "in 1 steps" in groups.note(cost(), 2)
