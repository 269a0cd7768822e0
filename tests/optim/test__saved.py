"""Saved state finds its parameters by name; settings that shape it cannot change beside it."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from hardy.optim import make_optimizer
from hardy.optim._saved import in_our_order
from hardy.optim.optimizers import APOLLO, SMMF, AdaptiveAdamW


def net(*names):
    """Return a model of square layers, listed in this order, whose weights depend on their names only."""
    model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in names})
    for name, layer in model.items():
        with torch.no_grad():
            layer.weight.copy_(torch.randn(4, 4, generator=torch.Generator().manual_seed(ord(name))))
    return model


def train(model, optimizer, steps):
    for step in steps:
        for name, layer in model.items():
            generator = torch.Generator().manual_seed(100 * step + ord(name))
            layer.weight.grad = torch.randn(4, 4, generator=generator).to(layer.weight.dtype)
        optimizer.step()
    return {name: layer.weight.detach().clone() for name, layer in model.items()}


OPTIMIZERS = {
    "apollo": lambda model: APOLLO(model.named_parameters(), rank=2, lr=0.1),
    "smmf": lambda model: SMMF(model.named_parameters(), lr=0.1),
    "adamw": lambda model: AdaptiveAdamW(model.named_parameters(), lr=0.1),
    "routed": lambda model: make_optimizer(model, "apollo", rank=2, lr=0.1),
    "together": lambda model: make_optimizer(model, "muon", rules=[("c", "adamw", {})], lr=0.1),
}


@pytest.mark.parametrize("through", ["torch", "dcp", "dcp flat"])
@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_lists_its_layers_in_another_order_resumes_bit_for_bit(build, through, dtype):
    whole = net("a", "b", "c").to(dtype)
    expected = train(whole, build(whole), range(6))
    first, second = net("a", "b", "c").to(dtype), net("c", "a", "b").to(dtype)
    before, after = build(first), build(second)
    train(first, before, range(3))
    second.load_state_dict(first.state_dict())
    if through == "torch":
        after.load_state_dict(copy.deepcopy(before.state_dict()))
    else:
        saved = copy.deepcopy(get_optimizer_state_dict(first, before))
        set_optimizer_state_dict(second, after, saved)
    for group in after.param_groups:
        assert [dict(second.named_parameters())[name] for name in group["param_names"]] == group["params"]
    got = train(second, after, range(3, 6))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_what_was_renamed_is_matched_by_order_among_the_rest_and_said(caplog):
    saved = {"param_groups": [{"kind": "smmf", "params": [0, 1, 2], "param_names": ["a", "b", "c"]}]}
    ours = [{"kind": "smmf", "params": [None] * 3, "param_names": ["c", "x", "module.a"]}]
    with caplog.at_level(logging.WARNING):
        (group,) = in_our_order(ours, saved)
    assert group["params"] == [2, 1, 0] and group["param_names"] == ["c", "b", "a"]
    assert "1 parameters have other names" in caplog.text and "such as x that of b" in caplog.text
    assert saved["param_groups"][0]["params"] == [0, 1, 2]


@pytest.mark.parametrize("names", [None, ["param.0", "param.1"]])
def test_without_names_the_order_decides(names):
    saved = {"param_groups": [{"kind": "smmf", "params": [0, 1], "param_names": ["b", "a"]}]}
    ours = [{"kind": "smmf", "params": [None] * 2, **({"param_names": names} if names else {})}]
    assert in_our_order(ours, saved)[0]["params"] == [0, 1]


def test_groups_in_another_order_are_found_by_their_names():
    model = net("a", "b", "c")
    (_, _, c) = named = list(model.named_parameters())
    optimizer = SMMF([{"params": named[:2]}, {"params": [c], "lr": 0.5}])
    train(model, optimizer, range(1))
    other = SMMF([{"params": [c]}, {"params": named[:2]}])
    other.load_state_dict(optimizer.state_dict())
    assert [(group["param_names"], group["lr"]) for group in other.param_groups] == [
        (["c.weight"], 0.5),
        (["a.weight", "b.weight"], 0.001),
    ]
    assert torch.equal(other.state[c[1]]["row_v"], optimizer.state[c[1]]["row_v"])


def test_a_parameter_that_is_in_another_group_now_is_refused():
    model = net("a", "b", "c")
    a, b, c = model.named_parameters()
    optimizer = SMMF([{"params": [a, b]}, {"params": [c]}])
    train(model, optimizer, range(1))
    other = SMMF([{"params": [a, c]}, {"params": [b]}])
    with pytest.raises(ValueError, match=r"parameter [bc].weight is in group \d and was saved in group \d"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


@pytest.mark.parametrize(
    ("build", "setting", "value"),
    [
        ("apollo", "rank", 3),
        ("apollo", "proj", "svd"),
        ("apollo", "seed", 9),
        ("apollo", "bf16_update", "kahan"),
        ("smmf", "beta1", None),
        ("smmf", "pack", False),
        ("smmf", "shape_policy", "exact"),
        ("adamw", "bf16_update", "kahan"),
    ],
)
def test_a_setting_that_shapes_the_state_cannot_change_beside_it(build, setting, value):
    model = net("a").to(torch.bfloat16)
    optimizer = OPTIMIZERS[build](model)
    before = train(model, optimizer, range(1))["a"]
    held = copy.deepcopy(optimizer.state_dict())
    was, optimizer.param_groups[0][setting] = optimizer.param_groups[0][setting], value
    with pytest.raises(ValueError, match=rf"{setting} of group 0 .* set to {value!r} after"):
        train(model, optimizer, range(1, 2))
    assert torch.equal(model["a"].weight, before)
    optimizer.param_groups[0][setting] = was
    assert str(optimizer.state_dict()) == str(held)
    train(model, optimizer, range(1, 2))
    assert not torch.equal(model["a"].weight, before)


def test_settings_may_change_before_there_is_state_also_after_a_refused_load():
    model = net("a")
    saved = APOLLO(model.named_parameters(), rank=3)
    train(model, saved, range(1))
    optimizer = APOLLO(model.named_parameters(), rank=2)
    with pytest.raises(ValueError, match="saved with shape"):
        optimizer.load_state_dict(saved.state_dict())
    optimizer.param_groups[0]["rank"] = 3
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.state[model["a"].weight]["exp_avg"].shape == (4, 3)
