"""Types and limits of dataclasses that are no part of a run's configuration."""

from dataclasses import dataclass, field

import pytest

from hardy.config import ConfigError, PositiveFloat, PositiveInt
from hardy.distributed.aggregation.settings import check_settings


@dataclass
class Part:
    rows: PositiveInt
    norm: PositiveFloat | None = None
    kept: dict[str, list[int]] = field(init=False, default_factory=dict)

    def __post_init__(self):
        check_settings(self, section="part")


def test_settings_come_in_the_type_they_are_annotated_with():
    part = Part(2, norm=3)
    assert (part.rows, part.norm, type(part.norm)) == (2, 3.0, float)


def test_what_is_kept_besides_is_left_alone():
    assert Part(1).kept == {}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rows": 0}, "part.rows must be a whole number at least 1, got 0"),
        ({"rows": 1.0}, "part.rows must be a whole number at least 1, got 1.0"),
        ({"rows": True}, "part.rows must be a whole number at least 1, got True"),
        ({"rows": 1, "norm": float("inf")}, "part.norm must be a number above 0 or none, got inf"),
    ],
)
def test_what_is_not_as_annotated_is_refused(arguments, says):
    with pytest.raises(ConfigError, match=says):
        Part(**arguments)
