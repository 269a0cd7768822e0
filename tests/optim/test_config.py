"""Settings of optimizers and schedules."""

import pytest

from hardy.config import ConfigError, from_dict
from hardy.optim.config import AdamWConfig, GuardConfig, PerfDecayConfig, ScheduleConfig, SGDConfig


def test_defaults_are_valid_and_named():
    assert (AdamWConfig().name, SGDConfig().name, ScheduleConfig().name) == ("adamw", "sgd", "cosine")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"lr": 0}, "optim.lr must be a number above 0, got 0"),
        ({"beta1": 1}, "optim.beta1 must be a number at least 0 and below 1, got 1"),
        ({"eps": -1e-8}, "optim.eps must be a number above 0, got -1e-08"),
        ({"clip_norm": 0}, "optim.clip_norm must be a number above 0 or none, got 0"),
        ({"lr": float("nan")}, "optim.lr must be a number above 0, got nan"),
        ({"lr": float("inf")}, "optim.lr must be a number above 0, got inf"),
    ],
)
def test_values_out_of_range_are_refused(values, text):
    with pytest.raises(ConfigError) as caught:
        from_dict(AdamWConfig, values, path="optim")
    assert str(caught.value) == text


def test_nesterov_needs_momentum():
    with pytest.raises(
        ConfigError, match="optim.momentum must be above 0 when optim.nesterov is true, got 0"
    ):
        SGDConfig(momentum=0, nesterov=True)


def test_an_exponential_cannot_reach_zero():
    with pytest.raises(
        ConfigError, match="final_fraction must be above 0 when optim.schedule.name is exponential"
    ):
        ScheduleConfig(name="exponential", final_fraction=0)


def test_an_unknown_schedule_names_the_nearest():
    with pytest.raises(ConfigError, match="got 'cosin'; did you mean 'cosine'"):
        ScheduleConfig(name="cosin")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("config", [AdamWConfig(), SGDConfig()])
def test_clipping_by_history_is_off_unless_it_is_asked_for(config):
    assert config.guard == GuardConfig() and config.guard.history == "off"
    assert config.schedule.name != "performance"


def test_spikes_need_a_history():
    with pytest.raises(
        ConfigError,
        match=r"optim.guard.spike_skip=5 needs a history.*set optim.guard.history to global, tensor",
    ):
        GuardConfig(spike_skip=5.0)
    assert GuardConfig(history="zscore", spike_skip=5.0).spike_skip == 5.0


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"history": "globl"},
            "optim.guard.history must be one of off, global, tensor, zscore, got 'globl'; did",
        ),
        ({"history_factor": 0.5}, "optim.guard.history_factor must be a number at least 1 or none, got 0.5"),
        ({"history_beta": 1.0}, "optim.guard.history_beta must be a number at least 0 and below 1 or none"),
        ({"spike_skip": 1.0}, "optim.guard.spike_skip must be a number above 1 or none, got 1.0"),
    ],
)
def test_a_guard_that_cannot_be_is_refused(values, text):
    with pytest.raises(ConfigError) as caught:
        from_dict(GuardConfig, values, path="optim.guard")
    assert str(caught.value).startswith(text)


def test_a_fast_decay_must_end_below_the_slow_one():
    with pytest.raises(
        ConfigError,
        match=r"performance.final_fast=0.5 must be at most optim.schedule.performance.final_slow=0.3",
    ):
        PerfDecayConfig(final_fast=0.5)
    with pytest.raises(ConfigError, match=r"optim.schedule.performance.factor must be a number above 0 and"):
        PerfDecayConfig(factor=1.0)
