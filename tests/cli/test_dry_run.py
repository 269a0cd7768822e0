"""What --dry-run shows."""

import json
import tomllib

import pytest

from hardy.cli.dry_run import as_toml, plan_lines
from hardy.cli.main import main
from hardy.cli.settings import resolve
from hardy.config import from_dict, to_dict
from hardy.recipes.table import RECIPES, recipe
from hardy.train.config import TrainConfig
from hardy.train.plan import plan_run


@pytest.mark.parametrize("name", RECIPES)
def test_the_settings_shown_are_a_file_that_gives_the_same_run(name, tmp_path):
    path = tmp_path / "shown.toml"
    path.write_text("\n".join(as_toml(to_dict(recipe(name)))))
    assert resolve(str(path)).config.optim == recipe(name).optim
    nothing = {"data": {"limit_mb": None}, "train": {"micro_packs": None}}
    shown = tomllib.loads(path.read_text())
    assert from_dict(TrainConfig, {**shown, "data": nothing["data"] | shown["data"]}) == recipe(name)


def test_the_plan_in_words():
    config = resolve("tiny", ["--train.micro_packs", "2", "--strategy.mesh.shards", "2"]).config
    assert plan_lines(plan_run(config, num_workers=2)) == [
        "model: 984,448 parameters",
        "workers: 2 as 1 replicas x 2 shards",
        "step: 2,048 tokens; each worker runs 2 micro-batches of 2 packs",
        "run: 60 steps, 122,880 tokens",
    ]


def test_a_foreign_model_has_parameters_that_only_its_files_know():
    config = resolve("tiny", ["--model.name", "hf:somewhere"]).config
    assert plan_lines(plan_run(config, num_workers=1))[0] == "model: as many parameters as its files say"


def test_the_command_shows_and_starts_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny", "--dry-run", "--train.steps", "30"]) == 0
    text = capsys.readouterr().out
    assert "\nsteps = 30\n" in text and "# run: 30 steps, " in text
    assert list(tmp_path.iterdir()) == []


def test_the_command_shows_json(capsys):
    assert main(["train", "tiny", "--dry-run", "--json", "--workers", "2"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["name"] == "tiny"
    assert from_dict(TrainConfig, shown["config"]) == recipe("tiny")
    assert (shown["plan"]["num_workers"], shown["plan"]["num_parameters"]) == (2, 984448)
