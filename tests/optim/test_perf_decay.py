"""The schedule that follows the loss: its two curves, its bounds, what it ignores, how it resumes."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hardy.config import ConfigError
from hardy.optim.config import PerfDecayConfig
from hardy.optim.perf_decay import PerfExpDecay, write_rates

FINAL_SLOW, FINAL_FAST = 0.3, 0.01


def decay_of(*, peak=2.0, total_steps=200, warmup_steps=20, delay_steps=None, goal="min", **config):
    return PerfExpDecay(
        PerfDecayConfig(**config),
        peak=peak,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        delay_steps=delay_steps,
        goal=goal,
    )


def run(decay, losses):
    """Feed one loss per step and return the rate of each step."""
    rates = []
    for loss in losses:
        rates.append(decay.rate(decay.steps_done))
        decay.record(loss)
    return rates


def curve(final, t, *, total_steps=200, warmup_steps=20, peak=2.0):
    return peak * final ** ((t - warmup_steps) / (total_steps - warmup_steps))


@pytest.mark.parametrize("total_steps", [200, 20_000])
def test_time_alone_is_the_closed_form_of_the_slow_curve(total_steps):
    decay = decay_of(mode="time", total_steps=total_steps)
    rates = run(decay, [math.nan] * total_steps)
    for t in range(20, total_steps + 1):
        assert rates[t - 1] == pytest.approx(curve(FINAL_SLOW, t, total_steps=total_steps), rel=1e-12)
    assert rates[:20] == [2.0 * t / 20 for t in range(1, 21)]
    assert rates[-1] == pytest.approx(2.0 * FINAL_SLOW, rel=1e-12)


def test_time_with_a_final_share_of_one_is_constant_to_the_bit():
    rates = run(decay_of(mode="time", final_slow=1.0, warmup_steps=0), [1.0] * 200)
    assert rates == [2.0] * 200


@given(
    losses=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=60, max_size=60),
    interval_steps=st.integers(1, 7),
    warmup_steps=st.integers(0, 30),
    smoothing=st.floats(0, 0.99),
    target=st.floats(1e-6, 10),
    data=st.data(),
)
def test_the_rate_lies_between_both_curves_and_never_rises(
    losses, interval_steps, warmup_steps, smoothing, target, data
):
    settings = {"interval_steps": interval_steps, "smoothing": smoothing, "target": target}
    delay_steps = data.draw(st.integers(0, interval_steps))
    decay = decay_of(total_steps=60, warmup_steps=warmup_steps, delay_steps=delay_steps, **settings)
    rates = run(decay, losses)
    shape = {"total_steps": 60, "warmup_steps": warmup_steps}
    for t in range(warmup_steps + 1, 61):
        fast, slow = curve(FINAL_FAST, t, **shape), curve(FINAL_SLOW, t, **shape)
        assert fast * (1 - 1e-12) <= rates[t - 1] <= slow * (1 + 1e-12)
    after = rates[max(0, warmup_steps - 1) :]
    assert all(b <= a * (1 + 1e-15) for a, b in zip(after, after[1:], strict=False))


def test_improving_by_the_target_each_interval_is_the_slow_curve():
    settings = {"interval_steps": 4, "target": 0.005, "delay_steps": 0}
    losses = [5.0 * 0.99 ** (t // 4) for t in range(200)]
    rates = run(decay_of(**settings), losses)
    for t in range(20, 201):
        assert rates[t - 1] == pytest.approx(curve(FINAL_SLOW, t), rel=1e-12)


def test_a_constant_loss_is_the_fast_curve_from_the_second_observation_on():
    rates = run(decay_of(interval_steps=4, delay_steps=0), [3.0] * 200)
    slow, fast = (-math.log(final) / 180 for final in (FINAL_SLOW, FINAL_FAST))
    for t in range(21, 201):
        slow_steps = min(t - 20, 8)  # two intervals: the first has nothing to compare with
        clock = slow_steps * slow + (t - 20 - slow_steps) * fast
        assert rates[t - 1] == pytest.approx(2.0 * math.exp(-clock), rel=1e-12)


def test_half_the_target_is_a_decay_half_way():
    decay = decay_of(interval_steps=1, delay_steps=0, target=0.1, smoothing=0.0, warmup_steps=0)
    run(decay, [1.0, 0.95])
    assert decay.stall == pytest.approx(0.5, rel=1e-12)
    before = decay.rate(2)
    decay.record(0.95 * 0.95)
    k = (-math.log(FINAL_SLOW) - math.log(FINAL_FAST)) / 2 / 200
    assert decay.rate(3) / before == pytest.approx(math.exp(-k), rel=1e-12)


def test_improvements_are_averaged():
    decay = decay_of(interval_steps=1, delay_steps=0, target=1.0, smoothing=0.75, warmup_steps=0)
    run(decay, [1.0, 0.6, 0.6])
    assert decay.stall == pytest.approx(1 - 0.75 * 0.4, rel=1e-12)


def test_a_mean_acts_the_delay_after_its_interval():
    def stalls(delay_steps):
        decay = decay_of(interval_steps=5, delay_steps=delay_steps, warmup_steps=0)
        seen = []
        for _ in range(20):
            decay.record(1.0)
            seen.append(decay.stall)
        return seen

    assert [stalls(0).index(1.0), stalls(3).index(1.0), stalls(5).index(1.0)] == [9, 12, 14]
    assert stalls(None) == stalls(5)  # an interval, at most 8
    assert decay_of(interval_steps=20).delay_steps == 8


def test_the_first_interval_and_the_warm_up_say_nothing():
    decay = decay_of(interval_steps=4, delay_steps=0)
    run(decay, [math.inf] * 20 + [1.0] * 4)
    assert decay.stall == 0.0
    run(decay, [1.0] * 4)
    assert decay.stall == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_interval_that_is_not_finite_is_ignored(bad):
    plain, hurt = decay_of(interval_steps=2, delay_steps=0), decay_of(interval_steps=2, delay_steps=0)
    falling = [5.0] * 20 + [5.0, 5.0, 4.0, 4.0]
    run(plain, falling)
    run(hurt, falling + [bad, 1.0])
    assert hurt.stall == plain.stall == 0.0
    run(hurt, [4.0, 4.0])
    run(plain, [4.0, 4.0])
    assert hurt.stall == plain.stall == pytest.approx(0.0)  # 4 after 4, averaged with the fall before
    run(hurt, [4.0] * 20)
    assert hurt.stall > 0.5


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_loss_of_zero_or_below_is_no_fault(value):
    decay = decay_of(interval_steps=1, delay_steps=0, warmup_steps=0, smoothing=0.0)
    run(decay, [value, value])
    assert decay.stall == 1.0
    decay.record(value - 1.0)
    assert decay.stall == 0.0


def test_a_goal_of_max_is_the_mirror_image():
    losses = [3.0, 2.0, 2.1, 2.0, 1.9, 1.9, 2.5] * 10
    settings = {"interval_steps": 1, "warmup_steps": 0}
    falling = run(decay_of(**settings), losses)
    assert run(decay_of(goal="max", **settings), [-loss for loss in losses]) == falling
    assert run(decay_of(goal="max", **settings), losses) != falling


def test_an_evaluation_is_watched_where_the_config_says_so():
    watching = decay_of(metric="validation", warmup_steps=0)
    deaf = decay_of(warmup_steps=0, interval_steps=100)
    for decay in (watching, deaf):
        for step in range(40):
            decay.record(float(step))  # the training loss gets worse
            if step % 10 == 9:
                decay.observe(1.0)
    assert (watching.stall, deaf.stall) == (1.0, 0.0)


def test_a_plateau_cuts_the_rate_and_is_followed_by_a_pause():
    settings = {"mode": "plateau", "interval_steps": 1, "delay_steps": 0, "warmup_steps": 0}
    shape = {"factor": 0.5, "patience": 3, "threshold": 1e-3, "cooldown": 1}
    rates = run(decay_of(**settings, **shape), [1.0] * 12)
    # One best, three without, cut; one not looked at, three without, cut; ...
    assert [rate / 2.0 for rate in rates] == pytest.approx([1.0] * 4 + [0.5] * 4 + [0.25] * 4, rel=1e-12)
    small = run(decay_of(**settings, **shape), [0.9998**i for i in range(12)])  # three steps gain 0.0006
    assert small[3:5] == [2.0, 1.0]
    better = run(decay_of(**settings, **shape), [0.99**i for i in range(12)])
    assert better == [2.0] * 12


def test_a_plateau_never_goes_below_the_final_share():
    decay = decay_of(mode="plateau", interval_steps=1, patience=1, cooldown=0, warmup_steps=0, factor=0.1)
    rates = run(decay, [1.0] * 30)
    assert min(rates) == 2.0 * FINAL_FAST


def test_after_the_planned_steps_the_decay_goes_on_to_the_final_share():
    decay = decay_of(mode="time", final_slow=0.5, total_steps=20, warmup_steps=0)
    rates = run(decay, [1.0] * 200)
    assert rates[19] == pytest.approx(1.0, rel=1e-12)
    assert rates[39] == pytest.approx(0.5, rel=1e-12)
    assert rates[-1] == 2.0 * FINAL_FAST


@pytest.mark.parametrize("mode", ["perf", "time", "plateau"])
@pytest.mark.parametrize("at", [0, 7, 23, 26, 60, 133])
def test_stopping_and_going_on_gives_the_same_rates_to_the_bit(mode, at):
    losses = [4.0 + math.sin(7 * t) / (1 + t) for t in range(200)]
    settings = {"mode": mode, "interval_steps": 5, "patience": 2}
    whole = run(decay_of(**settings), losses)
    first, second = decay_of(**settings), decay_of(**settings)
    rates = run(first, losses[:at])
    state = json.loads(json.dumps(first.state_dict()))
    assert all(value is None or isinstance(value, int | float) for value in state.values())
    second.load_state_dict(state)
    assert rates + run(second, losses[at:]) == whole


def test_the_state_is_a_copy():
    decay = decay_of()
    state = decay.state_dict()
    run(decay, [1.0] * 50)
    assert state == decay_of().state_dict()


def test_more_steps_at_a_resume_spread_what_is_left_over_what_is_left():
    first = decay_of(mode="time")
    rates = run(first, [1.0] * 110)
    longer = decay_of(mode="time", total_steps=400)
    longer.load_state_dict(first.state_dict())
    rates += run(longer, [1.0] * 290)
    assert rates[110] < rates[109]
    assert rates[110] / rates[109] == pytest.approx((FINAL_SLOW / rates[109] * 2.0) ** (1 / 290), rel=1e-12)
    assert rates[-1] == pytest.approx(2.0 * FINAL_SLOW, rel=1e-12)
    shorter = decay_of(mode="time", total_steps=150)
    shorter.load_state_dict(first.state_dict())
    assert run(shorter, [1.0] * 40)[-1] == pytest.approx(2.0 * FINAL_SLOW, rel=1e-12)


def test_a_run_lengthened_after_a_stall_stays_between_where_it_was_and_the_fast_curve():
    first = decay_of(interval_steps=1)
    run(first, [1.0] * 200)
    assert first.share == pytest.approx(FINAL_FAST, rel=0.1)
    longer = decay_of(interval_steps=1, total_steps=300)
    longer.load_state_dict(first.state_dict())
    share = longer.share
    rates = run(longer, [0.9**t for t in range(100)])
    assert rates[0] == pytest.approx(2.0 * share)
    assert all(2.0 * FINAL_FAST <= rate <= rates[0] for rate in rates)


def test_a_reset_starts_over_or_at_a_step():
    decay = decay_of(mode="time")
    fresh = run(decay_of(mode="time"), [1.0] * 200)
    run(decay, [1.0] * 90)
    state = decay.state_dict()
    decay.reset()
    assert run(decay, [1.0] * 200) == fresh
    decay.load_state_dict(state, reset_schedule=True)
    assert run(decay, [1.0] * 200) == fresh
    decay.reset(at_step=100)
    rates = run(decay, [1.0] * 100)
    assert rates[0] == pytest.approx(2.0, rel=0.02)
    assert rates[-1] == pytest.approx(2.0 * FINAL_SLOW, rel=1e-12)


def test_a_step_out_of_order_is_refused():
    decay = decay_of()
    with pytest.raises(
        ValueError, match=r"stands before step 0 and was asked for step 3.*reset\(at_step=3\)"
    ):
        decay.rate(3)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"warmup_steps": 200}, r"warmup_steps=200 must be at least 0 and below total_steps=200.*lower the"),
        ({"warmup_steps": -1}, r"warmup_steps=-1 must be at least 0"),
        (
            {"interval_steps": 4, "delay_steps": 5},
            r"delay_steps=5 must be from 0 to the interval of 4 steps.*raise interval_steps",
        ),
    ],
)
def test_what_cannot_work_is_refused(settings, text):
    with pytest.raises(ConfigError, match=text):
        decay_of(**settings)


def test_defaults_follow_the_length_of_the_run():
    decay = PerfExpDecay(peak=1.0, total_steps=1000)
    assert (decay.interval_steps, decay.delay_steps) == (20, 8)
    assert decay.rate(0) == pytest.approx(1 / 50)
    assert PerfExpDecay(peak=1.0, total_steps=10).interval_steps == 1


def test_rates_keep_their_ratio_and_stay_tensors():
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [a], "lr": 1.0}, {"params": [b], "lr": torch.tensor(4.0)}]
    optimizer = torch.optim.SGD(groups)
    kept = optimizer.param_groups[1]["lr"]
    write_rates(optimizer, base_rates=[1.0, 4.0], share=0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[1]["lr"] is kept and kept.item() == 1.0
    with pytest.raises(ValueError, match="shorter"):
        write_rates(optimizer, base_rates=[1.0], share=0.25)
