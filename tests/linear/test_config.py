"""Settings of the solvers: what is refused, and how."""

import pytest

from hardy.config import ConfigError
from hardy.linear.config import SolverConfig


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"gamma": 0.0}, "linear.gamma must be"),
        ({"gamma": float("nan")}, "linear.gamma must be"),
        ({"gamma": float("inf")}, "linear.gamma must be"),
        ({"max_iter": 0}, "linear.max_iter must be"),
        ({"method": "newton"}, "linear.method must be"),
        (
            {"method": "perceptron", "gamma": 2.0},
            "linear.gamma=2 changes nothing with linear.method='perceptron'",
        ),
        (
            {"method": "batch_perceptron", "stop": "margin"},
            "linear.stop='margin' needs steps after separation",
        ),
    ],
)
def test_what_cannot_work_is_refused(settings, text):
    with pytest.raises(ConfigError) as error:
        SolverConfig(**settings)
    assert str(error.value).startswith(text)
