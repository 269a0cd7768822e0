import pytest
import torch

from hardy.config import ConfigError, UserError, from_dict
from hardy.model.build import build_model
from hardy.model.config import ModelConfig
from hardy.model.init import initialise
from hardy.ops.packed import DocumentLayout


def test_a_decoder_is_built_on_meta_without_weights():
    model = build_model(ModelConfig(name="7b"), vocab_size=32000)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert not model.pretrained


def test_settings_reach_the_model():
    given = {"shape": {"num_layers": 1}, "attention": "dense", "recompute": "blocks"}
    model = build_model(from_dict(ModelConfig, given), vocab_size=10, device="cpu")
    initialise(model, seed=0)
    assert (model.recompute, model.shape.num_layers, model.context_tokens) == ("blocks", 1, 2048)
    assert model.blocks[0].attention.attention.keywords == {"backend": "dense"}
    assert model(torch.tensor([1, 2]), DocumentLayout.from_lengths([2])).isfinite().all()


def test_compile_keeps_the_names():
    plain, compiled = (build_model(ModelConfig(compile=x), vocab_size=10) for x in (False, True))
    assert plain.state_dict().keys() == compiled.state_dict().keys()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"shape": {"num_layers": 1}}, "model.shape cannot change hf:/nowhere: its config.json decides"),
        ({"vocab_size": 5}, "model.vocab_size cannot change hf:/nowhere"),
        ({"context_tokens": 5}, "model.context_tokens cannot change hf:/nowhere"),
    ],
)
def test_sizes_of_a_foreign_model_are_its_own(given, text):
    with pytest.raises(ConfigError, match=text):
        build_model(from_dict(ModelConfig, {"name": "hf:/nowhere", **given}), vocab_size=10)


def test_a_foreign_model_that_is_not_there_is_named(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(UserError, match="there is no .*config.json; give a local model folder"):
        build_model(ModelConfig(name=f"hf:{tmp_path}"), vocab_size=10)
