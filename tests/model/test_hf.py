import builtins

import pytest
import torch
from torch.nn.functional import cross_entropy

from hardy.config import ConfigError, UserError
from hardy.model import hf
from hardy.model.build import build_model
from hardy.model.config import ModelConfig
from hardy.model.convert import export_folder
from hardy.model.decoder import compile_blocks, unit_names
from hardy.model.generate import generate
from hardy.model.hf import HFCausalLM, attend
from hardy.ops.packed import IGNORED_LABEL, DocumentLayout

LENGTHS = (7, 1, 12, 7)
SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2},
    "qwen2": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt_neox": {**SMALL, "intermediate_size": 48},
    "gpt2": {
        "vocab_size": 60,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
    "mistral": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 4},
}


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="session")
def save(transformers, tmp_path_factory):
    """Save a random model of a family once; return its folder."""
    folders = {}

    def saved(family, **changes):
        if family == "gpt2" and transformers.__version__.startswith("4."):
            pytest.skip("GPT-2 makes its own mask before transformers 5, and is refused")
        key = (family, *sorted(changes.items()))
        if key not in folders:
            torch.random.manual_seed(0)
            config = transformers.AutoConfig.for_model(
                family, **(FAMILIES | {"gemma2": GEMMA})[family] | changes
            )
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
            folders[key] = tmp_path_factory.mktemp(family)
            model.save_pretrained(folders[key])
        return folders[key]

    return saved


GEMMA = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}


def pack():
    generator = torch.Generator().manual_seed(0)
    tokens_T = torch.randint(60, (sum(LENGTHS),), generator=generator)
    labels_T = torch.randint(60, (sum(LENGTHS),), generator=generator)
    labels_T[3] = IGNORED_LABEL
    return tokens_T, DocumentLayout.from_lengths(LENGTHS), labels_T


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_are_those_of_each_document_alone(transformers, save, family):
    model = HFCausalLM(save(family))
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        save(family), attn_implementation="eager"
    ).eval()
    tokens_T, layout, _ = pack()
    model.eval()
    with torch.no_grad():
        packed = model(tokens_T, layout).split(LENGTHS)
        for ours, document in zip(packed, tokens_T.split(LENGTHS), strict=True):
            theirs = plain(document.unsqueeze(0), use_cache=False).logits[0]
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_plain_ones_and_never_holds_all_logits(save, family):
    model = HFCausalLM(save(family))
    assert model.has_plain_head
    assert model.pretrained and model.training
    tokens_T, layout, labels_T = pack()
    total = model(tokens_T, layout, labels_T)
    expected = cross_entropy(model(tokens_T, layout), labels_T, ignore_index=IGNORED_LABEL, reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(x, parameters) for x in (total, expected))
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-4)


def test_the_decoder_and_its_export_train_alike(transformers, make_decoder, tmp_path):
    decoder = make_decoder(tied=False)
    export_folder(decoder, tmp_path / "model")
    model = build_model(ModelConfig(name=f"hf:{tmp_path / 'model'}"), vocab_size=50, device="cpu")
    tokens_T, layout, labels_T = pack()
    tokens_T, labels_T = tokens_T % 50, labels_T.clamp(max=49)
    totals = [x(tokens_T, layout, labels_T) for x in (decoder, model)]
    torch.testing.assert_close(*totals, rtol=1e-5, atol=0)
    for total in totals:
        total.backward()
    theirs = model.get_parameter("model.model.layers.1.mlp.down_proj.weight").grad
    torch.testing.assert_close(decoder.blocks[1].feed_forward.down.weight.grad, theirs, rtol=1e-3, atol=1e-4)
    assert generate(decoder, [1, 2], max_new_tokens=9, seed=1) == generate(
        model, [1, 2], max_new_tokens=9, seed=1
    )


def test_capped_logits_fall_back_to_the_models_own(save):
    model = HFCausalLM(save("gemma2", attn_logit_softcapping=None, final_logit_softcapping=3.0))
    assert not model.has_plain_head
    tokens_T, layout, labels_T = pack()
    logits_TV = model(tokens_T, layout)
    assert logits_TV.abs().max() <= 3.0
    expected = cross_entropy(logits_TV, labels_T, ignore_index=IGNORED_LABEL, reduction="sum")
    torch.testing.assert_close(model(tokens_T, layout, labels_T), expected)


def test_recomputed_layers_keep_documents_apart(save):
    keep, again = HFCausalLM(save("llama")), HFCausalLM(save("llama"), recompute="blocks")
    calls = []
    again.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (keep, again):
        model(*pack()).backward()
    assert len(calls) == 2
    for one, other in zip(keep.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize(
    ("family", "layers"), [("llama", "model.model.layers"), ("gpt2", "model.transformer.h")]
)
def test_units_are_the_layers(save, family, layers):
    assert unit_names(HFCausalLM(save(family))) == [f"{layers}.0", f"{layers}.1"]


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # torch.compile's own question
def test_compiled_layers_equal_the_eager_ones(save):
    torch.compiler.reset()
    eager, compiled = HFCausalLM(save("llama")), HFCausalLM(save("llama"))
    compile_blocks(compiled, backend="eager")
    torch.testing.assert_close(compiled(*pack()), eager(*pack()), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("family", "changes", "text"),
    [
        (
            "llama",
            {"attention_dropout": 0.1},
            "attention dropout 0.1, packed attention has none; set attention_dropout",
        ),
        ("gpt2", {"attn_pdrop": 0.2}, "attention dropout 0.2"),
        ("gemma2", {}, "adds softcap to attention, which packed attention has not"),
    ],
)
def test_what_packed_attention_has_not_is_named(save, family, changes, text):
    with pytest.raises(UserError, match=text):
        HFCausalLM(save(family, **changes))


def test_a_model_that_mixes_documents_is_refused(save, monkeypatch):
    def leak(module, query, key, value, mask, **more):
        more["hardy_layout"] = DocumentLayout.from_lengths([query.shape[2]])
        return attend(module, query, key, value, mask, **more)

    hf._transformers().AttentionInterface.register(hf.ATTENTION_NAME, leak)
    try:
        with pytest.raises(
            UserError, match="one document changed the other in the isolation probe.*LlamaForCausalLM"
        ):
            HFCausalLM(save("llama"))
    finally:
        hf._transformers().AttentionInterface.register(hf.ATTENTION_NAME, attend)


def test_positions_that_ignore_the_layout_are_refused(save, monkeypatch):
    run = HFCausalLM._run

    def unaware(self, module, tokens_T, layout):
        positions_T = torch.arange(layout.num_tokens) ** 2  # differ from those of a document alone
        return run(
            self,
            module,
            tokens_T,
            DocumentLayout(lengths=layout.lengths, cumulative_S=layout.cumulative_S, positions_T=positions_T),
        )

    monkeypatch.setattr(HFCausalLM, "_run", unaware)
    with pytest.raises(
        UserError, match="a packed document differs from the same alone in the isolation probe"
    ):
        HFCausalLM(save("llama"))


def test_attention_without_a_layout_is_refused():
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(UserError, match="Linear does not hand the borders of documents down"):
        attend(torch.nn.Linear(1, 1), x, x, x, None)
    layout = DocumentLayout.from_lengths([2])
    with pytest.raises(UserError, match="makes a mask of its own"):
        attend(torch.nn.Linear(1, 1), x, x, x, torch.ones(1), hardy_layout=layout)
    with pytest.raises(UserError, match="wants attention dropout 0.5"):
        attend(torch.nn.Linear(1, 1), x, x, x, None, hardy_layout=layout, dropout=0.5)


def test_a_tokenizer_that_does_not_fit_is_named(save):
    with pytest.raises(
        ConfigError, match="has 60 tokens, data.tokenizer 61: a tokenizer whose vocabulary does not fit"
    ):
        build_model(ModelConfig(name=f"hf:{save('llama')}"), vocab_size=61)


def test_a_folder_that_cannot_be_loaded_is_named(transformers, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="transformers cannot load it"):
        HFCausalLM(tmp_path)


def test_a_missing_transformers_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "transformers":
            raise ImportError("No module named 'transformers'")
        return real(name, *args, **kwargs)

    hf._transformers.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs transformers .*; install it by pip install 'hardy\[hf\]'"):
        HFCausalLM("anywhere")
    hf._transformers.cache_clear()
