"""Every recipe builds, survives JSON, and is what tests/golden says, setting by setting."""

import json

import pytest

from hardy.config import from_dict, to_dict
from hardy.recipes.table import RECIPES
from hardy.train.config import TrainConfig
from hardy.train.plan import plan_run


def flat(table, path=""):
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_the_golden_file_says(name, golden):
    golden(f"config_{name}", dict(flat(to_dict(RECIPES[name]()))))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json_and_its_checks(name):
    config = RECIPES[name]()
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    shards = config.strategy.mesh.shards
    assert plan_run(config, num_workers=shards).total_tokens > 0
    assert plan_run(config, num_workers=2 * shards).replicas == 2
