import copy
import gc
import logging
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hardy.config import ConfigError
from hardy.optim.int8 import quantize_model
from hardy.optim.make import TORCH_CLASSES, describe_optimizer, make_optimizer
from hardy.optim.optimizers import APOLLO, MINI_SCALE, QAPOLLO, SMMF, AdaptiveAdamW, APOLLOMini
from hardy.optim.presets import PRESETS
from hardy.optim.together import Together


class Small(nn.Module):
    """A model with each role: embedding, matrices, norm, bias, head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 40, bias=False)

    def forward(self, tokens):
        return self.head(self.norm(self.down(torch.tanh(self.up(self.embed(tokens))))))


def make_model():
    model = Small()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def backward(model, step):
    tokens = torch.randint(40, (4, 6), generator=torch.Generator().manual_seed(step))
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten().roll(1))
    loss.backward()
    return loss


def train(model, optimizer, steps=range(3)):
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def value_of(optimizer, key):
    """Return a setting by parameter name; None where a group does not have it."""
    return {name: g.get(key) for g in optimizer.param_groups for name in g["param_names"]}


NAMES = [name for name, _ in make_model().named_parameters()]
MATRICES = {"up.weight", "down.weight"}
CLASSES = {
    "adamw": AdaptiveAdamW,
    "adaptive_adamw": AdaptiveAdamW,
    "apollo": APOLLO,
    "apollo_mini": APOLLOMini,
    "apollo_svd": APOLLO,
    "smmf": SMMF,
    "smmf_llm": SMMF,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
    "muon": Together,
}


def test_every_preset_is_tried_here():
    assert {name for name, preset in PRESETS.items() if not preset.int8_weights} == set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_a_preset_gives_its_class_over_all_parameters_and_trains(name):
    model = make_model()
    optimizer = (
        make_optimizer(model, name, weight_decay=0.1, backend="foreach")
        if name not in TORCH_CLASSES
        else (make_optimizer(model, name, weight_decay=0.1))
    )
    assert type(optimizer) is CLASSES[name]
    assert sorted(value_of(optimizer, "lr")) == sorted(NAMES)
    assert {n for n, decay in value_of(optimizer, "weight_decay").items() if decay == 0.1} == MATRICES
    first = backward(model, 0).item()
    train(model, optimizer, steps=[0] * 8)
    assert backward(model, 0).item() < first


def test_int8_weights_are_updated_where_they_are():
    model = make_model()
    names = quantize_model(model)
    optimizer = make_optimizer(model, "qapollo", lr=0.02, backend="foreach")
    assert type(optimizer) is QAPOLLO and names == ["up", "down"]
    assert {n for n, scale in value_of(optimizer, "scale").items() if scale == MINI_SCALE} == MATRICES
    before = [model.get_submodule(name).q.clone() for name in names]
    train(model, optimizer, steps=[0])
    assert [torch.equal(model.get_submodule(n).q, q) for n, q in zip(names, before, strict=True)] == [
        False,
        False,
    ]


def test_adafactor_of_torch_refuses_shards(one_process):
    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ConfigError, match="Adafactor cannot update sharded parameters; use 'smmf'"):
        make_optimizer(model, "adafactor")


def test_a_sharded_model_trains_as_the_whole_one(one_process):
    """On two workers in tests/mp/test_accelerate.py."""
    whole, model = make_model(), make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    expected = train(whole, make_optimizer(whole, "apollo", rank=2, backend="foreach"))
    got = train(model, make_optimizer(model, "apollo", rank=2, backend="foreach"))
    assert equal([parameter.full_tensor() for parameter in got], expected)


def test_hyphens_are_underscores():
    optimizer = make_optimizer(make_model(), "apollo-mini")
    assert type(optimizer) is APOLLOMini


def test_the_presets_settings_reach_its_own_groups_alone():
    optimizer = make_optimizer(make_model(), "apollo-mini", embed_kind="smmf")
    kinds = {"matrix": "apollo", "embedding": "smmf", "vector": "adamw"}
    assert {group["role"]: group["kind"] for group in optimizer.param_groups} == kinds
    assert {n: s for n, s in value_of(optimizer, "scale").items() if s is not None} == dict.fromkeys(
        MATRICES, MINI_SCALE
    )
    assert set(value_of(optimizer, "lr").values()) == {1e-2}


def test_a_setting_goes_to_all_groups_that_have_it():
    optimizer = make_optimizer(
        make_model(), "apollo", lr=0.02, rank=4, betas=(0.8, 0.9), eps=1e-5, bf16_update="kahan", seed=7
    )
    for key, value in {
        "lr": 0.02,
        "betas": (0.8, 0.9),
        "eps": 1e-5,
        "bf16_update": "kahan",
        "seed": 7,
    }.items():
        assert set(value_of(optimizer, key).values()) == {value}, key
    assert {n for n, rank in value_of(optimizer, "rank").items() if rank == 4} == MATRICES


def test_settings_are_those_of_the_class_built_by_hand():
    ours, by_hand = make_model(), make_model()
    made = make_optimizer(ours, "apollo", rank=3, weight_decay=0.1, update_proj_gap=2, backend="foreach")
    named = dict(by_hand.named_parameters())
    groups = [
        {
            "params": [(n, named[n]) for n in ("embed.weight", "head.weight")],
            "kind": "adamw",
            "weight_decay": 0.0,
        },
        {"params": [(n, named[n]) for n in ("up.weight", "down.weight")], "weight_decay": 0.1},
        {"params": [(n, named[n]) for n in ("up.bias", "norm.weight", "norm.bias")], "kind": "adamw"},
    ]
    expected = APOLLO(groups, lr=1e-2, rank=3, update_proj_gap=2, backend="foreach")
    assert equal(train(ours, made), train(by_hand, expected))


def test_a_rules_own_settings_come_first():
    rules = [(r"^down", "adamw", {"lr": 0.5, "weight_decay": 0.3})]
    optimizer = make_optimizer(
        make_model(), "smmf", lr=0.01, weight_decay=0.1, rules=rules, backend="foreach"
    )
    assert value_of(optimizer, "lr") == dict.fromkeys(NAMES, 0.01) | {"down.weight": 0.5}
    decays = {name: decay for name, decay in value_of(optimizer, "weight_decay").items() if decay}
    assert decays == {"up.weight": 0.1, "down.weight": 0.3}


def test_muon_takes_matrices_and_adamw_the_rest_and_any_rule_beside():
    rules = [("embed", "smmf", {}), ("head", "sgd", {"momentum": 0.5})]
    optimizer = make_optimizer(make_model(), "muon", lr=0.02, betas=(0.9, 0.95), rules=rules, eps=1e-6)
    parts = {type(part).__name__: part for part in optimizer.parts}
    assert parts.keys() == {"Muon", "AdaptiveAdamW", "SGD"}
    held = {
        name: sorted(n for g in part.param_groups for n in g["param_names"]) for name, part in parts.items()
    }
    assert held["Muon"] == sorted(MATRICES) and held["SGD"] == ["head.weight"]
    assert value_of(optimizer, "momentum")["head.weight"] == 0.5
    assert set(value_of(optimizer, "lr").values()) == {0.02}
    eps = value_of(optimizer, "eps")  # what Muon calls so stands elsewhere in its formula
    assert {eps[name] for name in MATRICES} == {1e-7}
    assert eps["norm.weight"] == eps["embed.weight"] == 1e-6
    assert value_of(optimizer, "betas")["norm.weight"] == (0.9, 0.95)


def test_decayed_names_decide_over_roles_but_not_over_rules():
    rules = [("head", "adamw", {"weight_decay": 0.0})]
    optimizer = make_optimizer(
        make_model(),
        "apollo",
        weight_decay=0.1,
        rules=rules,
        decayed=["module.embed.weight", "up.weight", "norm.weight", "head.weight"],
    )
    decays = {name for name, decay in value_of(optimizer, "weight_decay").items() if decay}
    assert decays == {"embed.weight", "up.weight", "norm.weight"}


def wrapped_by_ddp(model):
    return DistributedDataParallel(model)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [wrapped_by_ddp, lambda model: torch.compile(model, backend="eager")])
def test_names_and_roles_are_those_of_the_bare_model(wrap, one_process):
    """Projections follow names, so a wrapper must not change them."""
    bare, model = make_model(), make_model()
    expected = make_optimizer(bare, "apollo", rank=2, backend="foreach")
    optimizer = make_optimizer(wrap(model), "apollo", rank=2, backend="foreach")
    assert value_of(optimizer, "kind") == value_of(expected, "kind")
    assert equal(train(model, optimizer), train(bare, expected))


def test_parameters_swapped_after_construction_are_those_that_move():
    """What accelerate does under FSDP2: stubs first, then other parameters, in the optimizer's groups."""
    model, expected = make_model(), make_model()
    optimizer = make_optimizer(model, "apollo", rank=2, embed_kind="smmf", backend="foreach")
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            group["params"][index] = torch.empty(1, dtype=parameter.dtype)
    other = copy.deepcopy(model)
    by_name = dict(other.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [by_name[name] for name in group["param_names"]]
    twin = make_optimizer(expected, "apollo", rank=2, embed_kind="smmf", backend="foreach")
    assert equal(train(other, optimizer), train(expected, twin))


def test_originals_of_swapped_parameters_are_let_go():
    """Or sharding would not free a model's memory; a wrapper has loaded the empty state before."""
    model = make_model()
    optimizer = make_optimizer(model, "apollo", rank=2, backend="foreach")
    optimizer.load_state_dict(optimizer.state_dict())
    originals = [weakref.ref(parameter) for parameter in model.parameters()]
    for group in optimizer.param_groups:
        group["params"] = [torch.empty(1) for _ in group["params"]]
    del model
    gc.collect()
    assert [original() for original in originals] == [None] * len(NAMES)


def test_a_class_by_its_path_takes_everything_in_two_groups():
    model, expected = make_model(), make_model()
    optimizer = make_optimizer(model, "torch.optim.RMSprop", lr=0.01, weight_decay=0.1, alpha=0.9)
    assert type(optimizer) is torch.optim.RMSprop
    decays = value_of(optimizer, "weight_decay")
    assert decays == {name: 0.1 if name in MATRICES else 0.0 for name in NAMES}
    named = dict(expected.named_parameters())
    groups = [{"params": [named[n]], "weight_decay": decay} for n, decay in decays.items()]
    assert equal(train(model, optimizer), train(expected, torch.optim.RMSprop(groups, lr=0.01, alpha=0.9)))


def test_a_class_without_weight_decay_takes_one_group_and_no_weight_decay():
    optimizer = make_optimizer(make_model(), "torch.optim.LBFGS", lr=0.5)
    assert len(optimizer.param_groups) == 1 and "weight_decay" not in optimizer.param_groups[0]
    with pytest.raises(
        ConfigError, match=r"weight_decay=0.1 has no meaning for torch.optim.LBFGS; set it to 0"
    ):
        make_optimizer(make_model(), "torch.optim.LBFGS", weight_decay=0.1)


def test_no_weight_decay_means_none_even_where_the_class_has_some():
    optimizer = make_optimizer(make_model(), "torch.optim.AdamW")
    assert set(value_of(optimizer, "weight_decay").values()) == {0.0}


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("apolo", {}, r"there is no optimizer 'apolo'; did you mean 'apollo'\?.*such as torch.optim.RMSprop"),
        ("apollo", {"rnk": 4}, r"there is no setting of 'apollo' 'rnk'; did you mean 'rank'\?"),
        ("sgd", {"betas": (0.9, 0.9)}, "there is no setting of 'sgd' 'betas'"),
        ("apollo", {"scale": 1.0, "scale_squared": 2.0}, "give scale=1.0 or scale_squared=2.0, not both"),
        ("apollo", {"decayed": ["nothing"]}, "it has 'nothing', the model 'down.weight'"),
        ("apollo", {"embed_kind": "smf"}, r"kind of parameter group 'smf'; did you mean 'smmf'\?"),
        (
            "muon",
            {"rules": [("up.weight", "muon", {"stes": 1})]},
            "there is no setting of a 'muon' group 'stes'",
        ),
        ("torch.optim.Muon", {}, "takes matrices only; use 'muon', which gives the rest to AdamW"),
        ("torch.optim.SGD", {"embed_kind": "adamw"}, "takes every parameter, so embed_kind has no meaning"),
        ("torch.optim.SGD", {"rules": []}, "so rules has no meaning; leave it out or use a preset"),
        ("torch.optim.SGD", {"momentum": -1}, r"torch.optim.SGD: Invalid momentum value: -1; change its arg"),
        (
            "torch.optim.SGD",
            {"momentun": 0.9},
            r"setting of torch.optim.SGD 'momentun'; did you mean 'momentum'\?",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(name, settings, text):
    with pytest.raises(ConfigError, match=text):
        make_optimizer(make_model(), name, **settings)


def test_the_table_tells_groups_and_bytes_and_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="hardy.optim.make"):
        optimizer = make_optimizer(make_model(), "smmf", embed_kind="smmf", backend="foreach")
    table = describe_optimizer(optimizer)
    assert caplog.records[0].levelno == logging.INFO
    assert caplog.records[0].getMessage() == f"smmf:\n{table}"
    model = make_model()
    optimizer = make_optimizer(model, "smmf", embed_kind="smmf", backend="foreach")
    train(model, optimizer, steps=[0])
    for line, group in zip(table.splitlines()[1:], optimizer.param_groups, strict=True):
        states = [optimizer.state[parameter] for parameter in group["params"]]
        held = sum(value.nbytes for state in states for value in state.values())
        words = line.split()
        assert words[:3] == [group["role"], group["kind"], str(len(group["params"]))]
        told = float(words[-2]) * {"B": 1, "kB": 1e3}[words[-1]]
        assert abs(told - held) <= 0.05e3


def test_embeddings_that_hold_most_of_the_state_are_a_warning(caplog):
    make_optimizer(make_model(), "apollo-mini")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "with embed_kind='smmf' they would hold" in caplog.text


def test_only_presets_can_be_described():
    optimizer = make_optimizer(make_model(), "torch.optim.SGD")
    with pytest.raises(
        ConfigError, match=r"SGD has groups without a kind.*only optimizers made from a preset"
    ):
        describe_optimizer(optimizer)


def test_a_registered_factory_gets_what_was_asked(monkeypatch):
    """Looking names up is tried in test_foreign.py."""
    got = {}

    def factory(model, **settings):
        got.update(settings)
        return torch.optim.SGD(model.parameters(), lr=settings["lr"])

    monkeypatch.setattr("hardy.optim.make.registered_factory", lambda name, beside: factory)
    optimizer = make_optimizer(make_model(), "theirs", lr=0.3, embed_kind="adamw", depth=2)
    assert isinstance(optimizer, torch.optim.SGD)
    assert got == {"lr": 0.3, "weight_decay": 0.0, "embed_kind": "adamw", "depth": 2}


def test_a_rate_in_a_tensor_is_shared_by_all_groups():
    model = make_model()
    rate = torch.tensor(0.01)
    optimizer = make_optimizer(model, "apollo", lr=rate, rank=2, backend="foreach")
    assert all(group["lr"] is rate for group in optimizer.param_groups)
    before = [p.detach().clone() for p in model.parameters()]
    rate.fill_(0.0)
    train(model, optimizer, steps=[0])
    assert equal(list(model.parameters()), before)


MOST_BYTES_A_WEIGHT = {"smmf": 0.15, "apollo-mini": 0.2, "apollo": 1.1}
"""Of a whole model, embeddings and head included; AdamW has 8."""


@pytest.mark.parametrize("name", MOST_BYTES_A_WEIGHT)
def test_the_60m_model_of_the_papers_trains_with_state_next_to_nothing(name):
    hidden, inner, rows = 512, 1376, 32000
    shapes = {"embedding.weight": (rows, hidden), "head.weight": (rows, hidden)}
    for block in range(8):
        for part in ("query", "key", "value", "output"):
            shapes[f"blocks.{block}.attention.{part}.weight"] = (hidden, hidden)
        shapes |= {f"blocks.{block}.feed_forward.{part}.weight": (inner, hidden) for part in ("gate", "up")}
        shapes[f"blocks.{block}.feed_forward.down.weight"] = (hidden, inner)
    # One element expanded: the shell looks at shapes only before the first step.
    params = {key: nn.Parameter(torch.zeros(()).expand(shape)) for key, shape in shapes.items()}
    kinds = {key: "smmf" if rows in shape else name for key, shape in shapes.items()}
    rule = {"smmf": "smmf", "apollo": "apollo", "apollo-mini": "apollo"}
    groups = [
        {"params": [(key, params[key]) for key in shapes if kinds[key] == kind], "kind": rule[kind]}
        for kind in dict.fromkeys(kinds.values())
    ]
    settings = {"rank": 128} if name == "apollo" else {}
    optimizer = {"smmf": SMMF, "apollo": APOLLO, "apollo-mini": APOLLOMini}[name](groups, lr=1e-3, **settings)
    optimizer.materialize_state()
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert held / sum(p.numel() for p in params.values()) <= MOST_BYTES_A_WEIGHT[name]
