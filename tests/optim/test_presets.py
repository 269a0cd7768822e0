"""Optimizers by name: the settings of the papers, and who gets which rule."""

import math

import pytest

from hardy.config import ConfigError
from hardy.optim.presets import KINDS, PRESETS, check_kind, kind_for, preset


def test_the_settings_are_those_of_the_specification():
    assert PRESETS["apollo"].settings["rank"] == 256 and PRESETS["apollo"].settings["scale"] == 1.0
    assert PRESETS["apollo"].settings["scale_type"] == "channel"
    for name in ("apollo_mini", "qapollo"):
        settings = PRESETS[name].settings
        assert (settings["rank"], settings["scale_type"]) == (1, "tensor")
        assert settings["scale"] == pytest.approx(math.sqrt(128), rel=1e-15)
    assert PRESETS["apollo_svd"].settings["proj"] == "svd"
    assert PRESETS["smmf"].settings["decay_rate"] == -0.8
    assert PRESETS["smmf_llm"].settings["max_update"] == 10.0
    assert [name for name, found in PRESETS.items() if found.int8_weights] == ["qapollo"]
    assert [name for name, found in PRESETS.items() if found.release] == ["qapollo"]


def test_every_preset_names_rules_that_exist():
    for found in PRESETS.values():
        check_kind(found.kind)
        check_kind(found.embed_kind)


def test_hyphens_are_underscores():
    assert preset("smmf-llm") is PRESETS["smmf_llm"]


def test_a_wrong_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="there is no optimizer 'apolo'; did you mean 'apollo'"):
        preset("apolo")
    with pytest.raises(ConfigError, match="there is no kind of parameter group 'smf'; did you mean 'smmf'"):
        check_kind("smf")


ROLES = ("matrix", "experts", "conv", "embedding", "vector", "router", "other")


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [
        ("apollo", ["apollo", "apollo", "apollo", "smmf", "adamw", "adamw", "adamw"]),
        ("adamw", ["adamw", "adamw", "adamw", "smmf", "adamw", "adamw", "adamw"]),
        ("muon", ["muon", "adamw", "adamw", "smmf", "adamw", "adamw", "adamw"]),
        ("sgd", ["sgd", "sgd", "sgd", "smmf", "sgd", "sgd", "sgd"]),
    ],
)
def test_who_gets_which_rule(kind, kinds):
    assert kind in KINDS
    assert [kind_for(role, kind=kind, embed_kind="smmf") for role in ROLES] == kinds
