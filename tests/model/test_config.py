import pytest

from hardy.config import ConfigError, from_dict, settings_of, to_dict
from hardy.model.config import ModelConfig


def test_defaults_go_to_a_table_and_back():
    config = ModelConfig()
    assert from_dict(ModelConfig, to_dict(config)) == config
    assert (config.name, config.attention, config.recompute, config.compile) == (
        "1m",
        "auto",
        "nothing",
        False,
    )


def test_every_setting_is_documented():
    assert [setting.path for setting in settings_of(ModelConfig, path="model") if not setting.doc] == []


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"vocab_size": 0}, "model.vocab_size must be a whole number at least 1 or none, got 0"),
        (
            {"shape": {"num_heads": -2}},
            "model.shape.num_heads must be a whole number at least 1 or none, got -2",
        ),
        ({"shape": {"heads": 2}}, "there is no setting 'model.shape.heads'"),
        (
            {"attention": "flash"},
            "model.attention must be one of auto, reference, dense, varlen, flex, got 'flash'",
        ),
        ({"recompute": "block"}, "did you mean 'blocks'?"),
    ],
)
def test_what_cannot_be_is_named(given, text):
    with pytest.raises(ConfigError) as error:
        from_dict(ModelConfig, given, path="model")
    assert text in str(error.value)
