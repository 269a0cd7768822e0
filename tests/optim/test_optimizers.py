"""The classes to use: what they set when nothing is said, and APOLLO's two ways to give its scale."""

import math

import pytest
import torch
from torch import nn

from hardy.optim.optimizers import (
    APOLLO,
    MINI_SCALE,
    QAPOLLO,
    RULES,
    SMMF,
    AdaptiveAdamW,
    APOLLOMini,
    apollo_scale_from_released,
)


def settings_of(cls, **settings):
    (group,) = cls([("w", nn.Parameter(torch.ones(2, 2)))], **settings).param_groups
    return group


SHARED = {"bf16_update": "stochastic", "nonfinite": "propagate", "backend": "auto", "seed": 0}
DEFAULTS = {
    AdaptiveAdamW: {"kind": "adamw", "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    APOLLO: {
        "kind": "apollo",
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-12,  # 1e-6 there: log.md, "A norm that is almost zero"
        "weight_decay": 0.0,
        "rank": 256,
        "scale_type": "channel",
        "scale": 1.0,
        "update_proj_gap": 200,
        "proj": "normal",
        "limiter": "reference",
        "limiter_gamma": 1.01,
        "zero_grad": "skip",
        "bias_correction": True,
        "share_projection": False,
        "side": "auto",
    },
    APOLLOMini: {"kind": "apollo", "rank": 1, "scale_type": "tensor", "scale": math.sqrt(128), "eps": 1e-12},
    SMMF: {
        "kind": "smmf",
        "lr": 1e-3,
        "beta1": 0.9,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "decay_rate": -0.8,
        "growth_rate": 0.999,
        "vector_reshape": True,
        "weight_decay_mode": "adamw",
        "beta1_floor": 0.0,
        "max_update": None,
        "mask_zero_grad": True,
        "shape_policy": "auto",
        "pack": True,
        "per_slice": False,
    },
}
"""The specification's, section 4 of each method."""


@pytest.mark.parametrize("cls", DEFAULTS)
def test_defaults_are_those_of_the_specification(cls):
    group = settings_of(cls)
    assert {key: group[key] for key in DEFAULTS[cls] | SHARED} == DEFAULTS[cls] | SHARED
    assert group.keys() - {"params", "param_names", "calls", "kind"} == (
        group.keys() & ({"lr", "weight_decay"} | SHARED.keys() | RULES[group["kind"]].defaults.keys())
    )


@pytest.mark.parametrize("cls", [APOLLO, APOLLOMini, QAPOLLO])
def test_the_scale_is_given_as_the_papers_or_as_its_square(cls):
    assert settings_of(cls, scale=3.0)["scale"] == 3.0
    assert settings_of(cls, scale="auto")["scale"] == "auto"
    assert settings_of(cls, scale_squared=9.0)["scale"] == 3.0
    with pytest.raises(ValueError, match="give scale=3.0 or scale_squared=9.0, not both; scale is the root"):
        settings_of(cls, scale=3.0, scale_squared=9.0)


def test_the_released_scale_is_alpha_squared():
    assert apollo_scale_from_released(128.0) == MINI_SCALE == settings_of(APOLLOMini)["scale"]


@pytest.mark.parametrize("cls", [AdaptiveAdamW, APOLLO, APOLLOMini, SMMF])
def test_every_class_takes_every_kind_of_group(cls):
    named = [(kind, nn.Parameter(torch.ones(4, 3))) for kind in RULES]
    optimizer = cls([{"params": [pair], "kind": pair[0]} for pair in named], lr=0.1)
    for _, param in named:
        param.grad = torch.ones(4, 3)
    optimizer.step()
    assert all((param != 1).all() for _, param in named)
    assert {kind for kind in RULES} == {rule.kind for rule in cls.rules.values()}


def test_rates_and_decays_reach_the_rules():
    for cls in DEFAULTS:
        ends = []
        for lr, decay in ((0.1, 0.0), (0.2, 0.0), (0.1, 0.5)):
            param = nn.Parameter(torch.ones(4, 3))
            optimizer = cls([("w", param)], lr=lr, weight_decay=decay)
            param.grad = torch.ones(4, 3)
            optimizer.step()
            ends.append(1 - param.detach())
        torch.testing.assert_close(ends[1], 2 * ends[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(ends[2], ends[0] + 0.05, rtol=1e-5, atol=0)
