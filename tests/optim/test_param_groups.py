"""Which parameters are decayed."""

import pytest
import torch
from torch import nn

from hardy.optim.param_groups import parameter_groups


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def names(groups):
    return {group["weight_decay"]: [name for name, _ in group["params"]] for group in groups}


def test_matrices_are_decayed_and_vectors_are_not():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm(4), nn.Linear(4, 2))
    assert names(parameter_groups(model.named_parameters(), weight_decay=0.1)) == {
        0.1: ["0.weight", "2.weight"],
        0.0: ["0.bias", "1.weight", "1.bias", "2.bias"],
    }


def test_embeddings_are_matrices_and_a_tied_weight_appears_once():
    twice = Tied().named_parameters(remove_duplicate=False)
    assert names(parameter_groups(twice, weight_decay=0.1)) == {
        0.1: ["embedding.weight"],
        0.0: ["norm.weight", "norm.bias"],
    }


def test_frozen_parameters_are_left_out():
    model = Tied()
    model.embedding.weight.requires_grad_(False)
    assert names(parameter_groups(model.named_parameters(), weight_decay=0.1)) == {
        0.0: ["norm.weight", "norm.bias"]
    }


def test_scalars_are_vectors():
    scale = nn.Parameter(torch.tensor(1.0))
    assert names(parameter_groups([("scale", scale)], weight_decay=0.1)) == {0.0: ["scale"]}


def test_a_model_without_trained_parameters_is_refused():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that is trained"):
        parameter_groups(model.named_parameters(), weight_decay=0.1)
