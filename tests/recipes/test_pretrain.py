"""Pre-training runs: their docstrings keep to the numbers."""

import re

import pytest

from hardy.recipes import pretrain
from hardy.recipes.table import RECIPES
from hardy.train.plan import plan_run

NAMES = [name for name in RECIPES if name.startswith("pretrain_")]
UNITS = {"M": 1e6, "B": 1e9}


@pytest.mark.parametrize("name", NAMES)
def test_the_first_line_says_the_parameters_and_tokens_of_the_run(name):
    build = RECIPES[name]
    plan = plan_run(build(), num_workers=8)
    said = re.match(r"([\d.]+) ([MB]) parameters, ([\d.]+) B tokens", build.__doc__)
    assert plan.num_parameters == pytest.approx(float(said[1]) * UNITS[said[2]], rel=0.1)
    assert plan.total_tokens == pytest.approx(float(said[3]) * 1e9, rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_the_source_is_read_as_far_as_the_run_needs(name):
    config = RECIPES[name]()
    plan = plan_run(config, num_workers=8)
    assert config.data.limit_mb * 1e6 == pytest.approx(5 * plan.total_tokens)
    assert config.data.source == pretrain.SOURCE


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_the_tokens_that_the_module_promises(name):
    tokens = plan_run(RECIPES[name](), num_workers=8).tokens_per_step
    assert 0.13e6 <= tokens <= 2.1e6


def test_large_models_are_sharded_and_recompute():
    for name in ("pretrain_1b", "pretrain_7b"):
        config = RECIPES[name]()
        assert config.strategy.mesh.sizes(16) == (2, 8)
        assert config.model.recompute == "blocks"
