"""Learning-rate schedules: exact end points, continuity, monotone rise and fall, refused warm-ups."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardy.config import ConfigError, settings_of
from hardy.optim.config import PerfDecayConfig, ScheduleConfig
from hardy.optim.perf_decay import PerfExpDecay
from hardy.optim.schedules import FixedSchedule, build_schedule, learning_rate

NAMES = ["constant", "linear", "cosine", "exponential", "wsd"]
FALLING = [name for name in NAMES if name != "constant"]


def curve(total_steps, *, peak=1.0, warmup_steps=0, **shape):
    schedule = ScheduleConfig(warmup_steps=warmup_steps, **shape)
    steps = range(total_steps)
    return [learning_rate(step, total_steps=total_steps, peak=peak, schedule=schedule) for step in steps]


@st.composite
def schedules(draw):
    total_steps = draw(st.integers(1, 60))
    return {
        "total_steps": total_steps,
        "warmup_steps": draw(st.integers(0, total_steps - 1)),
        "final_fraction": draw(st.floats(0.01, 1)),
        "decay_fraction": draw(st.floats(0, 1)),
        "peak": draw(st.floats(1e-6, 10)),
    }


@pytest.mark.parametrize("name", NAMES)
@given(shape=schedules())
def test_rises_to_the_peak_and_never_rises_again(name, shape):
    rates = curve(name=name, **shape)
    top = shape["warmup_steps"]
    ulp = 1e-12 * shape["peak"]
    assert all(b > a for a, b in zip(rates[:top], rates[1:top], strict=False))
    assert all(b <= a + ulp for a, b in zip(rates[top:], rates[top + 1 :], strict=False))
    assert max(rates) <= shape["peak"] + ulp
    if top < shape["total_steps"] - 1:
        assert rates[top] == shape["peak"]
    if top:
        assert rates[0] == shape["peak"] / (top + 1)


@pytest.mark.parametrize("name", FALLING)
@given(shape=schedules())
def test_the_last_step_is_exactly_the_final_share(name, shape):
    assert curve(name=name, **shape)[-1] == shape["peak"] * shape["final_fraction"]


@pytest.mark.parametrize("name", ["linear", "cosine", "exponential"])
def test_no_jump_is_larger_than_a_few_times_the_mean_slope(name):
    rates = curve(1000, name=name, warmup_steps=100)
    jumps = [abs(b - a) for a, b in zip(rates, rates[1:], strict=False)]
    assert max(jumps[:100]) == pytest.approx(1 / 101)
    assert max(jumps[100:]) < 3 * 0.9 / 899


def test_known_values_halfway():
    assert curve(101, name="linear", final_fraction=0.0)[50] == pytest.approx(0.5)
    assert curve(101, name="cosine", final_fraction=0.0)[25] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert curve(101, name="exponential", final_fraction=0.01)[50] == pytest.approx(0.1)


def test_wsd_keeps_the_peak_until_its_decay_begins():
    rates = curve(100, name="wsd", warmup_steps=10, final_fraction=0.0, decay_fraction=0.2)
    assert rates[10:80] == [1.0] * 70
    assert rates[80] == pytest.approx(0.95)
    assert rates[-1] == 0.0


def test_wsd_without_a_decay_falls_in_the_last_step_only():
    assert curve(5, name="wsd", decay_fraction=0.0, final_fraction=0.5) == [1.0, 1.0, 1.0, 1.0, 0.5]


def test_constant_stays_at_the_peak_to_the_end():
    assert curve(5, name="constant", warmup_steps=1) == [0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("warmup_steps", [10, 11])
def test_a_warm_up_as_long_as_the_run_names_both_settings(warmup_steps):
    with pytest.raises(
        ConfigError, match=rf"optim.schedule.warmup_steps={warmup_steps} .*train.steps=10.*to 1 or"
    ):
        curve(10, name="cosine", warmup_steps=warmup_steps)


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_run_is_refused(step):
    with pytest.raises(ValueError, match=f"from 0 to 9, got {step}"):
        learning_rate(step, total_steps=10, peak=1.0, schedule=ScheduleConfig(warmup_steps=0))


def test_these_tests_cover_every_schedule_of_the_config():
    (setting,) = (s for s in settings_of(ScheduleConfig) if s.path == "name")
    assert setting.allowed == "one of " + ", ".join([*NAMES, "performance"])


def test_performance_is_no_function_of_the_step():
    with pytest.raises(ValueError, match="performance depends on the losses so far; use build_schedule"):
        curve(10, name="performance")


@pytest.mark.parametrize("name", NAMES)
def test_a_fixed_schedule_is_the_function_and_hears_nothing(name):
    config = ScheduleConfig(name=name, warmup_steps=3)
    schedule = build_schedule(config, peak=2.0, total_steps=20)
    assert isinstance(schedule, FixedSchedule)
    for step in (7, 0, 19):
        schedule.record(math.nan)
        schedule.observe(5.0)
        schedule.reset(at_step=9)
        assert schedule.rate(step) == learning_rate(step, total_steps=20, peak=2.0, schedule=config)
    assert schedule.state_dict() == {}
    schedule.load_state_dict({"step": 3})


def test_performance_is_built_with_its_settings():
    settings = PerfDecayConfig(mode="time", final_slow=0.5)
    schedule = build_schedule(
        ScheduleConfig(name="performance", warmup_steps=4, performance=settings), peak=2.0, total_steps=8
    )
    assert isinstance(schedule, PerfExpDecay) and schedule.config is settings
    rates = []
    for step in range(8):
        rates.append(schedule.rate(step))
        schedule.record(1.0)
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0] + [2.0 * 0.5 ** (t / 4) for t in range(1, 5)])


@pytest.mark.parametrize("name", ["cosine", "performance"])
def test_a_warm_up_as_long_as_the_run_is_refused_when_it_is_built(name):
    with pytest.raises(ConfigError, match=r"optim.schedule.warmup_steps=10 must be below train.steps=10"):
        build_schedule(ScheduleConfig(name=name, warmup_steps=10), peak=1.0, total_steps=10)
