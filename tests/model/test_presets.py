import re

import pytest
import torch

from hardy.config import ConfigError, from_dict
from hardy.model.config import ModelConfig
from hardy.model.decoder import Decoder
from hardy.model.presets import PRESETS, check_context, check_folder, count_parameters, resolve_shape
from hardy.ops.attention import packed_attention


@pytest.mark.parametrize("name", PRESETS)
def test_the_count_is_what_the_module_has(name):
    with torch.device("meta"):
        model = Decoder(PRESETS[name], attention=packed_attention)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert count_parameters(PRESETS[name]) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_about_the_parameters_of_its_name(name):
    number, unit = re.fullmatch(r"(\d+)([mb])", name).groups()
    named = int(number) * {"m": 10**6, "b": 10**9}[unit]
    # 1b is the usual name of the 1.34 billion of the papers' table.
    assert 0.9 <= count_parameters(PRESETS[name]) / named <= (1.35 if name == "1b" else 1.2)


def test_grouped_and_untied_shapes_are_counted_too():
    config = from_dict(
        ModelConfig, {"name": "3m", "shape": {"num_kv_heads": 2, "head_size": 16, "tied": False}}
    )
    shape = resolve_shape(config, vocab_size=100)
    with torch.device("meta"):
        model = Decoder(shape, attention=packed_attention)
    assert count_parameters(shape) == sum(parameter.numel() for parameter in model.parameters())


def test_single_sizes_replace_the_presets():
    given = {"num_heads": 8, "num_layers": 3, "rope_theta": 500.0, "norm_eps": 1e-5, "tied": False}
    config = from_dict(ModelConfig, {"name": "1m", "shape": given, "context_tokens": 77})
    shape = resolve_shape(config, vocab_size=64)
    got = {key: getattr(shape, key) for key in given}
    assert got == given
    assert (shape.head_size, shape.num_kv_heads, shape.context_tokens) == (16, 8, 77)
    assert (shape.hidden_size, shape.vocab_size) == (PRESETS["1m"].hidden_size, 64)


@pytest.mark.parametrize(
    ("tokenizer", "setting", "rows"), [(64, None, 64), (65, None, 128), (65, 65, 65), (65, 70, 70)]
)
def test_the_embedding_fits_the_tokenizer(tokenizer, setting, rows):
    assert resolve_shape(ModelConfig(vocab_size=setting), vocab_size=tokenizer).vocab_size == rows


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"name": "60mm"},
            r"model.name: there is no preset '60mm'; did you mean '60m'\? Known: 10m, .*, or hf:PATH",
        ),
        (
            {"vocab_size": 10},
            "model.vocab_size=10 is below the tokenizer's vocabulary of 300, which does not fit the model; "
            "leave model.vocab_size out",
        ),
        (
            {"shape": {"num_heads": 3}},
            "model.shape.hidden_size=128 is not a multiple of model.shape.num_heads=3",
        ),
        (
            {"shape": {"num_kv_heads": 3}},
            "model.shape.num_heads=4 is not a multiple of model.shape.num_kv_heads=3",
        ),
        ({"shape": {"head_size": 7}}, "model.shape.head_size=7 is odd"),
    ],
)
def test_what_does_not_fit_is_named(given, text):
    with pytest.raises(ConfigError, match=text):
        resolve_shape(from_dict(ModelConfig, given), vocab_size=300)


def test_documents_longer_than_the_context_are_refused():
    shape = resolve_shape(ModelConfig(context_tokens=128), vocab_size=300)
    check_context(shape.context_tokens, document_tokens=128)
    check_context(None, document_tokens=10**9)
    with pytest.raises(
        ConfigError, match="data.document_tokens=129 is longer than model.context_tokens=128; lower"
    ):
        check_context(shape.context_tokens, document_tokens=129)


def test_a_model_folder_that_is_not_there_is_named(tmp_path):
    check_folder("60m")
    text = rf"model.name=hf:{tmp_path}: there is no {tmp_path}/config.json; give a local model folder"
    with pytest.raises(ConfigError, match=text):
        check_folder(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    check_folder(f"hf:{tmp_path}")
