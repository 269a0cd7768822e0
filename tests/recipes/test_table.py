"""The table of recipes."""

import pytest

from hardy.config import ConfigError
from hardy.recipes.table import RECIPES, recipe
from hardy.train.config import TrainConfig


def test_every_recipe_says_in_one_line_what_it_is():
    for name, build in RECIPES.items():
        assert build.__name__ == name
        first = (build.__doc__ or "").splitlines()[0]
        assert first.endswith(".") and len(first) <= 100


def test_hyphens_are_underscores():
    assert recipe("pretrain-1b") == recipe("pretrain_1b") == RECIPES["pretrain_1b"]()


def test_a_recipe_is_built_anew_and_equal_each_time():
    assert isinstance(recipe("tiny"), TrainConfig)
    assert recipe("tiny") == recipe("tiny")


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="there is no recipe 'tinny'; did you mean 'tiny'"):
        recipe("tinny")
