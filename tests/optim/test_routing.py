"""Who is updated by which rule: defaults, rules, wrappers, models of others, and texts of refusals."""

import functools

import pytest
import torch
from torch import nn

from hardy.config import ConfigError, from_dict
from hardy.model.build import build_model
from hardy.model.config import ModelConfig
from hardy.optim.param_groups import parameter_groups
from hardy.optim.routing import describe, group_state_bytes, route_params


def small():
    return nn.ModuleDict(
        {
            "tokens": nn.Embedding(11, 5),
            "layers": nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 5)]),
            "head": nn.Linear(5, 11, bias=False),
        }
    )


def sketch(groups):
    """Return {(kind, role): names}."""
    return {(group["kind"], group["role"]): [name for name, _ in group["params"]] for group in groups}


def test_matrices_go_to_the_method_and_alone_decay():
    groups = route_params(small(), kind="smmf", weight_decay=0.1)
    assert sketch(groups) == {
        ("adamw", "embedding"): ["tokens.weight", "head.weight"],
        ("smmf", "matrix"): ["layers.0.weight", "layers.1.weight"],
        ("adamw", "vector"): ["layers.0.bias", "layers.1.bias"],
    }
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1, 0.0]


def test_embeddings_go_where_they_are_sent_and_do_not_decay():
    groups = route_params(small(), kind="smmf", embed_kind="smmf", weight_decay=0.1)
    assert {(group["kind"], group["role"]): group["weight_decay"] for group in groups} == {
        ("smmf", "embedding"): 0.0,
        ("smmf", "matrix"): 0.1,
        ("adamw", "vector"): 0.0,
    }


def test_a_rule_that_takes_whole_models_takes_vectors_too():
    groups = route_params(small(), kind="sgd", embed_kind="sgd")
    assert {group["kind"] for group in groups} == {"sgd"}


def test_the_first_rule_that_matches_decides():
    rules = [
        (r"layers\.0\.weight", "adamw", {"lr": 0.5}),
        (r"layers\.\d\.weight", "apollo", {"rank": 2, "weight_decay": 0.3}),
    ]
    groups = route_params(small(), rules, kind="smmf", weight_decay=0.1)
    chosen = {name: group for group in groups for name, _ in group["params"]}
    first, second = chosen["layers.0.weight"], chosen["layers.1.weight"]
    assert (first["kind"], first["lr"], first["weight_decay"]) == ("adamw", 0.5, 0.0)
    assert (second["kind"], second["rank"], second["weight_decay"]) == ("apollo", 2, 0.3)
    assert chosen["head.weight"]["kind"] == "adamw"


def test_a_rule_s_parameters_of_one_role_make_one_group():
    groups = route_params(small(), [("layers", "adamw", {"lr": 0.5})], kind="smmf")
    mine = [group for group in groups if group.get("lr") == 0.5]
    assert [(group["role"], len(group["params"])) for group in mine] == [("matrix", 2), ("vector", 2)]


def test_a_one_dimensional_convolution_is_no_stack_to_apollo():
    model = nn.Sequential(nn.Conv1d(4, 6, 3, bias=False), nn.Conv2d(4, 6, 3, bias=False))
    (group,) = route_params(model, kind="apollo")
    assert (group["role"], group["stacked"], len(group["params"])) == ("conv", False, 2)
    (group,) = route_params(model, kind="smmf")
    assert "stacked" not in group


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        (
            [("layer_norm", "adamw", {})],
            "routing rule 'layer_norm' matches no trained parameter; names are such as 'tokens.weight'",
        ),
        (
            [("layers", "adamw", {}), (r"layers\.1", "smmf", {})],
            r"routing rule 'layers\\\\.1' decides nothing: rules before it take all it matches; move it up",
        ),
        (
            [("layers", "apollo", {})],
            r"routing rule 'layers' gives layers.0.bias of shape \(7,\) to kind 'apollo', which takes "
            "matrices; narrow the pattern or use kind 'adamw'",
        ),
        ([("(", "adamw", {})], r"routing rule '\(' is no regular expression: "),
        ([("head", "adamv", {})], "routing rule 'head': there is no kind .* did you mean 'adamw'"),
        (
            [("head", "adamw", {"role": "x"})],
            "routing rule 'head' sets role, which routing fills in; leave it out",
        ),
    ],
)
def test_rules_that_cannot_be(rules, text):
    with pytest.raises(ConfigError, match=text):
        route_params(small(), rules)


def test_a_rule_for_frozen_parameters_matches_nothing():
    model = small()
    model["head"].requires_grad_(False)
    with pytest.raises(ConfigError, match="routing rule 'head' matches no trained parameter"):
        route_params(model, [("head", "adamw", {})])


def test_unknown_kinds_and_nothing_to_train():
    with pytest.raises(
        ConfigError, match="there is no kind of parameter group 'apolo'; did you mean 'apollo'"
    ):
        route_params(small(), kind="apolo")
    with pytest.raises(ConfigError, match="there is no kind of parameter group 'sgdd'; did you mean 'sgd'"):
        route_params(small(), embed_kind="sgdd")
    with pytest.raises(ConfigError, match="no parameter that is trained; all are frozen or it has none"):
        route_params(nn.ReLU())


class Wrapper(nn.Module):
    """What DDP (as `module`) and activation checkpointing do to names."""

    def __init__(self, module, name="module"):
        super().__init__()
        self.add_module(name, module)


def with_checkpoints(model):
    wrapped = [Wrapper(layer, "_checkpoint_wrapped_module") for layer in model["layers"]]
    model["layers"] = nn.ModuleList(wrapped)
    return model


WRAPPERS = {
    "ddp": Wrapper,
    "compile": functools.partial(torch.compile, backend="eager"),
    "checkpoint": with_checkpoints,
    "all": lambda model: Wrapper(torch.compile(with_checkpoints(model), backend="eager")),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_change_nothing(name):
    assert sketch(route_params(WRAPPERS[name](small()))) == sketch(route_params(small()))


@pytest.mark.parametrize("tied", [False, True])
def test_our_own_decoder_on_meta(tied):
    config = {"name": "1m", "shape": {"tied": tied, "num_layers": 1}}
    model = build_model(from_dict(ModelConfig, config), vocab_size=300)
    groups = route_params(model, kind="apollo")
    linears = [f"attention.{name}" for name in ("query", "key", "value", "output")]
    linears += [f"feed_forward.{name}" for name in ("gate", "up", "down")]
    assert sketch(groups) == {
        ("adamw", "embedding"): ["embedding.weight"] + ([] if tied else ["head.weight"]),
        ("adamw", "vector"): [
            "blocks.0.attention_norm.weight",
            "blocks.0.feed_forward_norm.weight",
            "norm.weight",
        ],
        ("apollo", "matrix"): [f"blocks.0.{name}.weight" for name in linears],
    }


def test_every_trained_parameter_is_routed_exactly_once():
    model = build_model(ModelConfig(name="1m"), vocab_size=300)
    names = [name for group in route_params(model) for name, _ in group["params"]]
    known = [
        name
        for group in parameter_groups(model.named_parameters(), weight_decay=0)
        for name, _ in group["params"]
    ]
    assert sorted(names) == sorted(known)


def foreign(kind, **sizes):
    """Build a tiny Hugging Face model on meta, vocabulary 64 as wide as its residual stream."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, bos_token_id=1, eos_token_id=2, num_hidden_layers=1, num_attention_heads=4, **sizes
    )
    with torch.device("meta"):
        return getattr(transformers, f"{kind}ForCausalLM")(config)


def test_hugging_face_s_llama():
    groups = sketch(route_params(foreign("Llama", hidden_size=64, intermediate_size=96)))
    assert groups["adamw", "embedding"] == ["model.embed_tokens.weight", "lm_head.weight"]
    matrices = [name.removeprefix("model.layers.0.") for name in groups["apollo", "matrix"]]
    attention = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    assert matrices == attention + [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert len(groups["adamw", "vector"]) == 3 and len(groups) == 3


def test_hugging_face_s_mixtral():
    groups = sketch(
        route_params(foreign("Mixtral", hidden_size=32, intermediate_size=48, num_local_experts=4))
    )
    assert [name for name in groups["adamw", "router"]] == ["model.layers.0.mlp.gate.weight"]
    inside = [name for (kind, _), names in groups.items() if kind == "apollo" for name in names]
    assert any("experts" in name for name in inside) and not any(".gate.weight" in name for name in inside)


def test_the_table_adds_up_and_warns_of_embeddings():
    model = build_model(ModelConfig(name="7b"), vocab_size=32000)
    groups = route_params(model, kind="apollo")
    text = describe(groups, settings={"rank": 1})
    assert text.split("\n") == [
        "group      kind    tensors       elements    state",
        "embedding  adamw         2    262,144,000  2.10 GB",
        "vector     adamw        65        266,240   2.1 MB",
        "matrix     apollo      224  6,476,005,376  12.7 MB",
        "warning: embeddings under adamw hold 2.10 GB of 2.11 GB of state; with embed_kind='smmf' they would "
        "hold 33.1 MB",
    ]
    assert sum(group_state_bytes(group, settings={"rank": 1}) for group in groups) == 2_111_934_220


def test_no_warning_where_nothing_is_leaner_or_embeddings_are_not_the_most():
    assert "warning" not in describe(route_params(small(), kind="adamw"))
    assert "warning" not in describe(route_params(small(), kind="smmf", embed_kind="smmf"))
    wide = nn.Sequential(nn.Embedding(2, 5), nn.Linear(5, 700, bias=False))
    assert "warning" not in describe(route_params(wide, kind="apollo"))
    most = nn.Sequential(nn.Embedding(700, 5), nn.Linear(5, 5, bias=False))
    kinds = ("apollo", "smmf", "muon")  # optim.embed_kind is no setting beside the last
    assert [kind for kind in kinds if "warning" in describe(route_params(most, kind=kind))] == [
        "apollo",
        "smmf",
    ]
    assert "\nwarning: " in describe(route_params(small(), kind="smmf"))


def test_a_group_s_own_settings_come_before_the_optimizer_s():
    groups = route_params(small(), [(r"layers\.0\.w", "apollo", {"rank": 2})], kind="apollo")
    sizes = {
        g["params"][0][0]: group_state_bytes(g, settings={"rank": 1}) for g in groups if g["role"] == "matrix"
    }
    assert sizes == {"layers.0.weight": 8 * 7 * 2 + 16, "layers.1.weight": 8 * 7 * 1 + 16}
