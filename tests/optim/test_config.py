"""Settings of optimizers and schedules."""

import pytest

from hardy.config import ConfigError, from_dict
from hardy.optim.config import AdamWConfig, ScheduleConfig, SGDConfig


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
