"""Ways of planning side by side."""

import numpy as np
import pytest

from hardy.balance.compare import (
    RANK_METHODS,
    STRATEGY_METHODS,
    attention_imbalance,
    compare,
    layout_text,
    padding,
    rank_methods,
    strategy_methods,
)
from hardy.balance.cost import DecoderSizes, LengthCostModel, SchemeCost, analytic_cost
from hardy.balance.cost_presets import cost_preset, published_strategies
from hardy.balance.lengths import draw_lengths, fit_lengths
from hardy.balance.plan import Group, MicroBatch, Plan, Scheme
from hardy.clock import VirtualClock
from hardy.config import UserError

COST = analytic_cost(DecoderSizes(32, 4096, 11008, 32, 32, 128, 32000), cap_tokens=8192, degrees=(1, 2, 4, 8))


def batches(count, *, size=128, most=8192):
    drawn = draw_lengths("wikipedia", count * size, np.random.default_rng(0))
    lengths = fit_lengths(drawn, most_tokens=most, overlong="truncate").lengths
    return [lengths[k * size : (k + 1) * size] for k in range(count)]


def rows_of(objective):
    methods = rank_methods(RANK_METHODS, world_size=8, cost=COST, objective=objective)
    rows = compare(batches(6), methods, cost=COST, clock=VirtualClock())
    return {row.method: row for row in rows}


@pytest.mark.parametrize("objective", ["lock_step", "free_running"])
def test_all_methods_on_the_same_batches(objective):
    rows = rows_of(objective)
    assert list(rows) == list(RANK_METHODS)
    assert rows["random"].speedup == 1.0
    for row in rows.values():
        assert row.speedup == pytest.approx(rows["random"].time / row.time)
        assert 0 <= row.idle_share < 1 and 0 <= row.attention_imbalance < 1 and row.gap >= 0
        assert sum(row.layouts.values()) == 6
    best = min(row.time for row in rows.values())
    assert rows["dynamic_cp"].time == pytest.approx(best)
    assert rows["dispatch"].time < rows["token_ffd"].time < rows["random"].time
    assert rows["static_cp"].attention_imbalance == 0


def test_free_running_dispatch_leaves_hardly_anyone_idle():
    assert rows_of("free_running")["dispatch"].idle_share < 0.01


def hydraulis(names, given, **changes):
    cost = cost_preset("hydraulis-32b")
    options = {"strategies": published_strategies(), "context_tokens": 32768} | changes
    methods = strategy_methods(names, world_size=64, cost=cost, **options)
    return {row.method: row for row in compare(given, methods, cost=cost, clock=VirtualClock())}


def test_strategies_beat_balance_and_balance_beats_packing():
    rows = hydraulis(STRATEGY_METHODS, batches(4, size=200, most=32768))
    assert rows["dynamic"].time < rows["balanced"].time < rows["fixed"].time
    assert rows["fixed"].layouts == {"4x tp16": 4}
    assert rows["bucketed"].time > rows["dynamic"].time
    assert all(row.gap >= 0 for row in rows.values())


def test_one_strategy_alone_is_balanced_and_changing_costs():
    given = batches(3, size=200, most=32768)
    one = hydraulis(["balanced", "dynamic"], given, strategies=published_strategies()[:1])
    assert one["dynamic"].time == one["balanced"].time
    free = hydraulis(["dynamic"], given)["dynamic"].time
    assert hydraulis(["dynamic"], given, switch_cost=1e9)["dynamic"].time >= free


def test_bucketed_takes_the_parts_one_after_another():
    cost = LengthCostModel(schemes=(SchemeCost(scheme=Scheme(), a=0.0, b=1.0, c=0.0, cap_tokens=20000),))
    methods = strategy_methods(["bucketed"], world_size=2, cost=cost, strategies=[(Scheme(), Scheme())])
    made, layout = methods["bucketed"](np.array([5000, 100, 6000, 300]))
    assert made.cost == 6000 + 300 and layout == "2x cp1; 2x cp1"
    assert [sorted(i for b in slot for i in b.sequences) for slot in made.slots] == [[0, 2], [1, 3]]


def test_the_bridge_is_in_every_methods_time():
    given = batches(2, size=60, most=32768)
    only = published_strategies()[:1]
    free = hydraulis(["fixed", "balanced", "dynamic"], given, strategies=only)
    moved = hydraulis(["fixed", "balanced", "dynamic"], given, strategies=only, bridge=lambda _: 500.0)
    for name, row in moved.items():
        assert row.time == pytest.approx(free[name].time + 500.0)
        assert row.gap < free[name].gap or free[name].gap == 0
    cost = LengthCostModel(schemes=(SchemeCost(scheme=Scheme(), a=0.0, b=1.0, c=0.0, cap_tokens=20000),))
    methods = strategy_methods(
        ["bucketed"], world_size=2, cost=cost, strategies=[(Scheme(), Scheme())], bridge=lambda _: 500.0
    )
    made, _ = methods["bucketed"](np.array([5000, 100, 6000, 300]))
    assert made.cost == 6000 + 300 + 2 * 500, "each part by itself moves weights and gradients"


def by_hand():
    alone = SchemeCost(scheme=Scheme(), a=1.0, b=0.0, c=0.0, cap_tokens=10)
    slot = tuple(
        MicroBatch(group=Group(first_rank=r, scheme=Scheme()), sequences=(r,), tokens=t, cost=float(t * t))
        for r, t in enumerate((4, 2))
    )
    made = Plan(slots=(slot,), world_size=2, objective="lock_step", cost=16.0, lower_bound=16.0)
    return made, LengthCostModel(schemes=(alone,))


def test_measures_by_hand():
    made, cost = by_hand()
    assert attention_imbalance(made, np.array([4, 2]), cost) == pytest.approx((0 + 12 / 16) / 2)
    assert padding(made, alignment=8) == pytest.approx(10 / 16)
    assert padding(made, alignment=1) == 0
    assert layout_text(made) == "2x cp1"
    rows = compare([np.array([4, 2])], {"a": lambda _: (made, "x")}, cost=cost, clock=VirtualClock())
    assert rows[0].cap_use == pytest.approx(0.3) and rows[0].idle_share == pytest.approx(12 / 32)


def test_the_planners_own_time_is_shown():
    made, cost = by_hand()
    clock = VirtualClock()

    def slow(_):
        clock.sleep(0.25)
        return made, "x"

    rows = compare([np.array([4, 2])] * 2, {"slow": slow}, cost=cost, clock=clock)
    assert rows[0].planner_ms == pytest.approx(250)


def test_unknown_methods_and_no_batches_are_refused():
    with pytest.raises(UserError, match="no method 'lpt'.*dispatch"):
        rank_methods(["lpt"], world_size=8, cost=COST, objective="lock_step")
    with pytest.raises(UserError, match="no method 'lpt'.*balanced"):
        hydraulis(["lpt"], [])
    with pytest.raises(UserError, match="no batch"):
        compare([], {}, cost=COST, clock=VirtualClock())
