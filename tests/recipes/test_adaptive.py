"""The adaptive recipe."""

import pytest

from hardy.config import UserError
from hardy.optim.config import GuardConfig, PerfDecayConfig
from hardy.recipes.adaptive import adaptive, pretrain
from hardy.recipes.small import tiny
from hardy.train.plan import plan_run


def test_it_needs_nothing_but_this_machine_and_is_small():
    config = adaptive()
    assert (config.data, config.train.device, config.log.trackers) == (tiny().data, "auto", ())
    plan = plan_run(config, num_workers=2)
    assert 900_000 < plan.num_parameters < 1_100_000
    assert plan.total_tokens < 1_000_000


def test_schedule_and_guard_have_the_defaults_of_the_recipe():
    config = adaptive()
    assert config.optim == pretrain(lr=config.optim.lr, steps=config.train.steps)
    assert config.optim.schedule.name == "performance"
    assert config.optim.schedule.performance == PerfDecayConfig(interval_steps=10)
    assert config.optim.guard == GuardConfig(history="global")
    assert (config.optim.beta1, config.optim.beta2, config.optim.weight_decay) == (0.9, 0.95, 0.1)
    assert (config.optim.clip_norm, config.optim.eps) == (1.0, 1e-8)


@pytest.mark.parametrize(
    ("steps", "warmup_steps", "interval_steps"), [(200, 10, 10), (10_000, 500, 200), (5, 0, 10)]
)
def test_warm_up_and_interval_follow_the_length_of_the_run(steps, warmup_steps, interval_steps):
    schedule = pretrain(lr=1e-3, steps=steps).schedule
    assert schedule.warmup_steps == warmup_steps
    assert schedule.performance.interval_steps == interval_steps


def test_a_rate_of_zero_is_refused():
    with pytest.raises(UserError, match=r"optim.lr must be a number above 0, got 0"):
        pretrain(lr=0, steps=100)
