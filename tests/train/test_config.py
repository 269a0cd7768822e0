"""The whole configuration of a run."""

import json

import pytest

from hardy.config import ConfigError, from_dict, settings_of, to_dict
from hardy.train.config import LogConfig, LoopConfig, TrainConfig


def test_the_defaults_are_a_valid_run_and_survive_json():
    config = TrainConfig()
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_every_setting_has_a_doc_and_its_section_stands_in_its_errors():
    for setting in settings_of(TrainConfig):
        assert setting.doc, f"{setting.path} has no docstring below it"
        assert setting.path.count(".") >= 1


def test_sections_know_where_they_stand():
    config = TrainConfig()
    for name, section in vars(config).items():
        assert section.section == name
    assert config.optim.schedule.section == "optim.schedule"
    assert config.strategy.mesh.section == "strategy.mesh"
    assert config.model.shape.section == "model.shape"


def test_an_unknown_section_names_the_nearest():
    with pytest.raises(ConfigError, match="there is no setting 'optimizer'; did you mean 'optim'"):
        from_dict(TrainConfig, {"optimizer": {"lr": 1.0}})


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: LoopConfig(steps=0), "train.steps must be a whole number at least 1, got 0"),
        (lambda: LoopConfig(steps=True), "train.steps must be a whole number at least 1, got True"),
        (lambda: LoopConfig(steps=10.0), "train.steps must be a whole number at least 1, got 10.0"),
        (lambda: LoopConfig(device="gpu"), "train.device must be one of auto, cpu, cuda, got 'gpu'"),
        (
            lambda: LogConfig(trackers=("wandbb",)),
            "log.trackers must be a list of one of tensorboard, trackio, wandb, got ('wandbb',); "
            "did you mean 'wandb'?",
        ),
        (
            lambda: LogConfig(trackers="wandb"),
            "log.trackers must be a list of one of tensorboard, trackio, wandb, got 'wandb'",
        ),
    ],
)
def test_wrong_values_are_refused(build, text):
    with pytest.raises(ConfigError) as caught:
        build()
    assert str(caught.value) == text
