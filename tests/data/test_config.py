"""The settings of the room data."""

import pytest

from hardy.config import ConfigError, from_dict, to_dict
from hardy.data.config import DataConfig


def test_defaults_survive_a_round_trip():
    assert from_dict(DataConfig, to_dict(DataConfig())) == DataConfig()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"validation_fraction": 0.6},
            "data.validation_fraction must be .*at least 0 and at most 0.5, got 0.6",
        ),
        ({"pack_tokens": 0}, "data.pack_tokens must be a whole number at least 1, got 0"),
        ({"limit_mb": 0.0}, "data.limit_mb must be .*above 0 .*got 0.0"),
    ],
)
def test_impossible_values_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        DataConfig(**settings)
