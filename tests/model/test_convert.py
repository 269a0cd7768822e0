import json
from functools import partial

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hardy.config import UserError
from hardy.model import convert
from hardy.model.convert import config_from_shape, export_folder, hf_name, import_folder, shape_from_config
from hardy.model.decoder import Decoder
from hardy.ops.attention import packed_attention
from hardy.ops.packed import DocumentLayout

CASES = [
    {"tied": True},
    {"tied": False},
    {"num_kv_heads": 1},
    {"num_kv_heads": 4},
    {"rope_theta": 300.0, "norm_eps": 1e-3},
]


def load(folder):
    found = import_folder(folder)
    model = Decoder(found.shape, attention=partial(packed_attention, backend="auto"))
    model.load_state_dict(dict(found.tensors()))
    return model


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def exported(make_decoder, tmp_path):
    model = make_decoder(tied=False)
    export_folder(model, tmp_path / "model")
    return model, tmp_path / "model"


@pytest.mark.parametrize("changes", CASES, ids=str)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 5000])
def test_there_and_back_is_exact(make_decoder, tmp_path, changes, max_shard_bytes):
    model = make_decoder(**changes)
    export_folder(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors*"))
    assert (len(files) > 2) == (max_shard_bytes == 5000)
    copy = load(tmp_path / "model")
    assert copy.shape == model.shape
    for (name, one), (other_name, other) in zip(
        model.state_dict().items(), copy.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing is left beside it


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_transformers_computes_the_same_logits(transformers, make_decoder, tmp_path, changes):
    model = make_decoder(**changes)
    export_folder(model, tmp_path / "model", max_shard_bytes=8000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    tokens_T = torch.randint(50, (20,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens_T.unsqueeze(0)).logits[0]
        got = model(tokens_T, DocumentLayout.from_lengths([20]))
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    assert theirs.config.max_position_embeddings == model.shape.context_tokens


@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_is_read(transformers, tmp_path, tied):
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_theta=500.0,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-4,
    )
    torch.random.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert (model.shape.rope_theta, model.shape.norm_eps, model.shape.tied) == (500.0, 1e-4, tied)
    tokens_T = torch.arange(30)
    with torch.no_grad():
        expected = theirs(tokens_T.unsqueeze(0)).logits[0]
        got = model(tokens_T, DocumentLayout.from_lengths([30]))
    assert (got - expected).abs().max() <= 1e-5


def test_older_configs_keep_the_base_at_the_top(tiny_shape, tmp_path):
    config = config_from_shape(tiny_shape, dtype=torch.float32, special_ids={})
    del config["rope_parameters"], config["head_dim"]
    config |= {"rope_theta": 7.0, "rope_scaling": None}
    shape = shape_from_config(config, folder=tmp_path)
    assert (shape.rope_theta, shape.head_size) == (7.0, 6)


def test_special_ids_and_tokenizer_files_go_along(make_decoder, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    export_folder(
        make_decoder(),
        tmp_path / "model",
        special_ids={"bos": 1, "eos": 2},
        tokenizer_files=[tmp_path / "tokenizer.json"],
    )
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert [config[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [1, 2, None]
    generation = json.loads((tmp_path / "model/generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    assert (tmp_path / "model/tokenizer.json").read_text() == "{}"


def test_full_tensors_may_come_from_elsewhere(make_decoder, tmp_path):
    model = make_decoder()
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    export_folder(model, tmp_path / "model", state=state)
    assert torch.equal(load(tmp_path / "model").norm.weight, state["norm.weight"])


def test_an_empty_folder_is_filled_and_a_full_one_left_alone(make_decoder, tmp_path):
    (tmp_path / "model").mkdir()
    export_folder(make_decoder(), tmp_path / "model")
    with pytest.raises(UserError, match="model is not empty; choose another folder or remove it"):
        export_folder(make_decoder(), tmp_path / "model")


def test_a_failed_export_leaves_nothing(make_decoder, tmp_path):
    with pytest.raises(FileNotFoundError):
        export_folder(make_decoder(), tmp_path / "model", tokenizer_files=[tmp_path / "missing.json"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(make_decoder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("my work")
    with pytest.raises(UserError, match="file/model cannot be written: .*; choose another folder"):
        export_folder(make_decoder(), tmp_path / "file" / "model")

    def full(*_args, **_settings):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(convert, "save_file", full)
    with pytest.raises(UserError, match="model cannot be written: No space left on device; make room, or"):
        export_folder(make_decoder(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_shape_that_transformers_refuses_is_not_exported(make_decoder, tmp_path):
    with pytest.raises(UserError, match=r"hidden size \(24\) is not a multiple of its heads \(5\)"):
        export_folder(make_decoder(num_heads=5, num_kv_heads=5), tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"architectures": ["MistralForCausalLM"]},
            r"\['MistralForCausalLM'\], not LlamaForCausalLM; use --model.name hf:",
        ),
        (
            {"attention_bias": True},
            "attention_bias is True, the decoder computes only False; use --model.name hf:",
        ),
        (
            {"architectures": None, "model_type": None},
            "/config.json names no architecture; give a folder saved",
        ),
        (
            {"architectures": None, "model": {"name": "1m"}, "train": {"steps": 1}},
            "^(.+) is a run folder of hardy; go on with it by `hardy resume .*, or .* `hardy export .* OUT`$",
        ),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', the decoder computes only 'silu'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type is 'linear'"),
    ],
)
def test_what_the_decoder_does_not_compute_is_named(exported, changes, text):
    edit(exported[1], **changes)
    with pytest.raises(UserError, match=text):
        import_folder(exported[1])


def test_tensors_that_do_not_fit_are_named(exported):
    _, folder = exported
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(1)}, file)
    with pytest.raises(
        UserError, match="has the unexpected tensors model.layers.0.self_attn.q_proj.bias; use"
    ):
        import_folder(folder)
    save_file({name: x for name, x in tensors.items() if "k_proj" not in name}, file)
    with pytest.raises(
        UserError, match="lacks tensors model.layers.0.self_attn.k_proj.weight, model.layers.1"
    ):
        import_folder(folder)
    save_file({**tensors, "lm_head.weight": torch.zeros(3, 4)}, file)
    with pytest.raises(
        UserError, match=r"tensor lm_head.weight has shape \(3, 4\), config.json makes it \(50, 24\)"
    ):
        import_folder(folder)
    file.write_bytes(b"not a tensor")
    with pytest.raises(UserError, match="model.safetensors is no readable safetensors file"):
        import_folder(folder)
    file.unlink()
    with pytest.raises(UserError, match="there is no .*model.safetensors; a Llama folder has"):
        import_folder(folder)


def test_what_old_exports_add_is_passed_over(make_decoder, tmp_path):
    model = make_decoder(tied=True)
    export_folder(model, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    extra = {
        "lm_head.weight": model.embedding.weight.detach().clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3),
    }
    save_file({**load_file(file), **extra}, file)
    assert torch.equal(load(tmp_path / "model").embedding.weight, model.embedding.weight)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "there is no .*config.json; give a folder"),
        ("{", "is not valid JSON"),
        ("{}", "names no architecture"),
    ],
)
def test_a_folder_without_a_config_is_named(tmp_path, content, text):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=text):
        import_folder(tmp_path)


def test_a_config_without_sizes_is_named(tmp_path):
    with pytest.raises(UserError, match="lacks 'hidden_size'; it is not a Llama's"):
        shape_from_config({"model_type": "llama"}, folder=tmp_path)


def test_unknown_parameters_have_no_name():
    with pytest.raises(ValueError, match="no parameter of a decoder is called 'blocks.0.bias'"):
        hf_name("blocks.0.bias")
