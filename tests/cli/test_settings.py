"""From words on a command line to a checked run."""

import pytest

from hardy.cli.settings import change, merged, resolve, settings_text
from hardy.config import ConfigError, settings_of
from hardy.optim.config import AdamWConfig, SGDConfig
from hardy.recipes.table import RECIPES, recipe
from hardy.train.config import TrainConfig


def refused(target, *arguments):
    with pytest.raises(ConfigError) as caught:
        resolve(target, arguments)
    return str(caught.value)


def test_a_recipe_with_settings_over_it():
    resolved = resolve("tiny", ["--optim.lr", "0.5", "--train.seed=3", "--data.limit_mb", "none"])
    assert (resolved.name, resolved.config.optim.lr, resolved.config.train.seed) == ("tiny", 0.5, 3)
    assert resolved.config.data.limit_mb is None
    assert resolved.config.model == recipe("tiny").model


def test_hyphens_name_the_same_recipe_and_run_folder():
    assert resolve("pretrain-60m") == resolve("pretrain_60m")
    assert resolve("pretrain-60m").name == "pretrain_60m"


def test_a_file_over_the_defaults(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[optim]\nlr = 0.5\n[train]\nsteps = 7\n")
    resolved = resolve(str(path), ["--train.steps", "8"])
    assert (resolved.name, resolved.config.optim.lr, resolved.config.train.steps) == ("mine", 0.5, 8)
    assert resolved.config.data == TrainConfig().data


def test_a_file_over_a_recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('recipe = "tiny"\noptim.name = "sgd"\ntrain.batch_packs = 4\n')
    config = resolve(str(path)).config
    assert isinstance(config.optim, SGDConfig)
    assert config.optim.schedule == recipe("tiny").optim.schedule
    assert (config.train.batch_packs, config.data) == (4, recipe("tiny").data)


def test_the_command_line_may_switch_what_a_file_chose(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[optim]\nname = "sgd"\nmomentum = 0.5\nlr = 0.25\n')
    assert resolve(str(path), ["--optim.name", "adamw"]).config.optim == AdamWConfig(
        lr=0.25, weight_decay=0.1
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('recipe = "tinny"', "there is no recipe 'tinny'; did you mean 'tiny'"),
        ("recipe = 3", "must be the name of a recipe, got 3"),
        ("[optim]\nlr = -1", "mine.toml: optim.lr must be a number above 0, got -1"),
        ("[optimizer]\nlr = 1", "mine.toml: there is no setting 'optimizer'; did you mean 'optim'"),
        ("[train]\nlr = 1", "mine.toml: there is no setting 'train.lr'; did you mean 'optim.lr'?"),
        ("lr =", "is not valid TOML"),
    ],
)
def test_faults_of_a_file_name_it(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert message in refused(str(path))
    assert str(path) in refused(str(path))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["tinny"], "there is no recipe 'tinny'; did you mean 'tiny'"),
        (["tinny"], "or give the path of a .toml file"),
        (["none.toml"], "there is no config file none.toml"),
        (["tiny", "--optim.lrr", "1"], "there is no setting 'optim.lrr'; did you mean 'optim.lr'"),
        (["tiny", "--train.lr", "1"], "there is no setting 'train.lr'; did you mean 'optim.lr'?"),
        (["tiny", "--opt.lr", "1"], "there is no setting 'opt'; did you mean 'optim'"),
        (
            ["tiny", "--optim.name", "sgd", "--optim.beta1", "0.5"],
            "there is no setting 'optim.beta1' here; it belongs to optim.name=adamw",
        ),
        (["tiny", "--optim.nesterov", "true"], "it belongs to optim.name=sgd"),
        (["tiny", "--optim.name", "adamm"], "there is no optim.name 'adamm'; did you mean 'adamw'"),
        (["tiny", "--train.steps", "many"], "train.steps must be a whole number at least 1, got 'many'"),
        (["tiny", "--train.steps"], "--train.steps needs a value"),
    ],
)
def test_wrong_words_are_refused(arguments, text):
    assert text in refused(*arguments)


def test_a_change_leaves_its_input_alone():
    config = recipe("tiny")
    assert change(config, {"train.steps": 3}).train.steps == 3
    assert config == recipe("tiny")


def test_the_list_shows_every_recipe_and_setting_with_its_doc():
    text = settings_text()
    for name, build in RECIPES.items():
        assert name in text and build.__doc__.splitlines()[0] in text
    for setting in settings_of(TrainConfig):
        assert f"--{setting.path} (" in text
        if setting.path != setting.when.partition("=")[0]:  # the setting that chooses stands there once
            assert all(line in text for line in setting.doc.splitlines())
    assert "--optim.lr (a number above 0; default 0.003) [optim.name=adamw, adaptive_adamw]" in text
    assert text.count("--optim.name (") == 1
    assert "--optim.name (one of adamw, sgd, " in text
    assert "--optim.clip_norm (a number above 0 or none; default 1.0)\n" in text
    assert max(map(len, text.splitlines())) < 140


def test_a_setting_that_all_variants_share_is_listed_once():
    paths = [setting.path for setting in merged(settings_of(TrainConfig))]
    assert paths.count("optim.schedule.warmup_steps") == 1
    whens = {setting.when for setting in merged(settings_of(TrainConfig)) if setting.path == "optim.beta2"}
    assert whens == {
        "optim.name=adamw",
        "optim.name=adaptive_adamw",
        "optim.name=apollo, apollo_mini, qapollo",
    }
    assert paths.count("optim.lr") > 1  # the defaults differ
