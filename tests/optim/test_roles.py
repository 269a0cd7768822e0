"""What a parameter is: by module, name and whole shape."""

import pytest
import torch
from torch import nn

from hardy.optim.roles import tenants_of


def roles(model, **given):
    return {tenant.name: tenant.role for tenant in tenants_of(model, **given)}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 6, 5))
        self.up_bias = nn.Parameter(torch.zeros(4, 6))


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(5, 4, bias=False)
        self.shared_expert_gate = nn.Linear(5, 1, bias=False)
        self.experts = Experts()


class Gated(nn.Module):
    """A feed-forward block with a gate, as Llama's: no router."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(5, 7, bias=False)
        self.down = nn.Linear(7, 5)


def test_each_role():
    model = nn.ModuleDict(
        {
            "tokens": nn.Embedding(11, 5),
            "norm": nn.LayerNorm([2, 3]),
            "mixture": Mixture(),
            "block": Gated(),
            "line": nn.Conv1d(4, 6, 3),
            "image": nn.Conv2d(4, 6, 3, bias=False),
            "attention": nn.MultiheadAttention(6, 2, bias=False),
            "head": nn.Linear(5, 11),
        }
    )
    model.positions = nn.Parameter(torch.zeros(1, 9, 5))
    model.table = nn.Parameter(torch.zeros(9, 5))
    assert roles(model) == {
        "positions": "other",
        "table": "other",
        "tokens.weight": "embedding",
        "norm.weight": "vector",
        "norm.bias": "vector",
        "mixture.gate.weight": "router",
        "mixture.shared_expert_gate.weight": "router",
        "mixture.experts.up": "experts",
        "mixture.experts.up_bias": "vector",
        "block.gate.weight": "matrix",
        "block.down.weight": "matrix",
        "block.down.bias": "vector",
        "line.weight": "conv",
        "line.bias": "vector",
        "image.weight": "conv",
        "attention.in_proj_weight": "matrix",
        "attention.out_proj.weight": "matrix",
        "head.weight": "embedding",
        "head.bias": "vector",
    }


def test_a_router_by_name_needs_no_experts_beside_it():
    model = nn.ModuleDict({"router": nn.ModuleDict({"layer": nn.Linear(5, 4, bias=False)})})
    assert roles(model) == {"router.layer.weight": "router"}


def test_the_head_is_found_by_the_vocabulary_not_by_its_name():
    model = nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 7, bias=False), nn.Linear(7, 11, bias=False))
    assert list(roles(model).values()) == ["embedding", "matrix", "embedding"]
    assert list(roles(model, vocab_size=7).values()) == ["embedding", "embedding", "matrix"]
    assert list(roles(model[1:]).values()) == ["matrix", "matrix"]


def test_a_block_as_wide_as_the_vocabulary_is_no_head():
    model = nn.ModuleDict(
        {
            "tokens": nn.Embedding(8, 8),
            "layers": nn.ModuleList([nn.Linear(8, 8, bias=False)]),
            "head": nn.Linear(8, 8, bias=False),
        }
    )
    assert roles(model) == {
        "tokens.weight": "embedding",
        "layers.0.weight": "matrix",
        "head.weight": "embedding",
    }


def test_nothing_in_a_block_is_a_head_even_where_none_is_found():
    model = nn.ModuleDict({"tokens": nn.Embedding(7, 5), "layers": nn.ModuleList([Gated()])})
    assert roles(model)["layers.0.gate.weight"] == "matrix"


def test_tied_weights_come_once_under_their_first_name():
    model = nn.ModuleDict({"head": nn.Linear(5, 11, bias=False), "tokens": nn.Embedding(11, 5)})
    model["tokens"].weight = model["head"].weight
    assert roles(model) == {"head.weight": "embedding"}


def test_frozen_parameters_are_left_out():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert roles(model) == {"weight": "matrix"}


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_on_any_device(device):
    with torch.device(device):
        assert roles(nn.Linear(3, 2)) == {"weight": "matrix", "bias": "vector"}


def test_a_matrix_without_elements_is_a_vector():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.empty(0, 4))
    roles = {tenant.name: tenant.role for tenant in tenants_of(model)}
    assert (roles["0.weight"], roles["1.weight"]) == ("matrix", "vector")
