"""What every optimizer of `optim.name` promises; a new one is one line in ENTRIES.

Promises that need sharding are kept in tests/mp/test_checkpoint.py and tests/mp/test_sharded.py.
"""

import copy
import io
import math

import pytest
import torch
from torch import nn

from hardy.optim.build import OPTIMIZERS, build_optimizer, set_learning_rate
from hardy.optim.config import (
    AdafactorConfig,
    AdamWConfig,
    AdaptiveAdamWConfig,
    APOLLOConfig,
    APOLLOMiniConfig,
    MuonConfig,
    SGDConfig,
    SMMFConfig,
    TorchConfig,
)
from hardy.optim.state_bytes import state_bytes

ENTRIES = {
    "adamw": AdamWConfig(lr=0.05),
    "sgd": SGDConfig(lr=0.05),
    "adaptive_adamw": AdaptiveAdamWConfig(lr=0.05),
    "apollo": APOLLOConfig(lr=0.05, rank=2, weight_decay=0.1),
    "apollo_mini": APOLLOMiniConfig(lr=0.05, scale=2.0),
    "smmf": SMMFConfig(lr=0.1, weight_decay=0.1),
    "muon": MuonConfig(lr=0.5, weight_decay=0.01),
    "adafactor": AdafactorConfig(lr=0.3),
    "torch.optim.RMSprop": TorchConfig(lr=0.05),
}
ELSEWHERE = {"qapollo"}
"""Needs int8 weights: tests/optim/test_int8.py."""
STATE = {
    "adamw": ("adamw", "adamw", {}),
    "sgd": ("sgd", "sgd", {"momentum": 0.9}),
    "adaptive_adamw": ("adamw", "adamw", {}),
    "apollo": ("apollo", "adamw", {"rank": 2}),
    "apollo_mini": ("apollo", "adamw", {"rank": 1, "scale_type": "tensor"}),
    "smmf": ("smmf", "adamw", {}),
    "muon": ("muon", "adamw", {}),
    "adafactor": ("adafactor", "adafactor", {}),
}
"""The rule of matrices, that of vectors, and the settings: what the documented bytes of state depend on."""


@pytest.fixture(params=ENTRIES)
def config(request):
    return ENTRIES[request.param]


def make_model(dtype=torch.float32):
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def backward(model, step, *, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(4, 5, generator=generator).to(dtype)
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()


def train(model, optimizer, steps):
    for step in steps:
        backward(model, step)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_optimizer_is_in_the_table():
    assert {name for name in ENTRIES if "." not in name} == set(OPTIMIZERS) - ELSEWHERE == set(STATE)


def test_the_same_start_gives_the_same_bits(config):
    runs = []
    for _ in range(2):
        model = make_model()
        runs.append(train(model, build_optimizer(config, model), range(5)))
    assert equal(*runs)


def test_gradients_are_read_only(config):
    model = make_model()
    optimizer = build_optimizer(config, model)
    for step in range(2):
        backward(model, step)
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert equal([p.grad for p in model.parameters()], before)


def test_stop_save_load_go_on_gives_the_same_bits(config):
    model = make_model()
    whole = train(model, build_optimizer(config, model), range(6))
    first = make_model()
    optimizer = build_optimizer(config, first)
    train(first, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = make_model()
    again = build_optimizer(config, second)
    second.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    assert equal(train(second, again, range(3, 6)), whole)


def test_a_zero_gradient_step_at_rate_zero_builds_the_state_and_moves_nothing(config):
    """Torch's distributed checkpoint takes such a step before it loads."""
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(config, model)
    set_learning_rate(optimizer, 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert equal([p.detach() for p in model.parameters()], before)
    tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert len(optimizer.state) == len(before)
    assert all(value.isfinite().all() for value in tensors)


def test_a_parameter_without_gradient_is_left_alone(config):
    model = make_model()
    optimizer = build_optimizer(config, model)
    backward(model, 0)
    still = model[2].weight
    before = still.detach().clone()
    still.grad = None
    optimizer.step()
    assert torch.equal(still, before)


def test_matrices_decay_and_vectors_do_not(config):
    model = make_model()
    optimizer = build_optimizer(config, model)
    decays = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
    assert decays == {"0.weight": config.weight_decay, "2.weight": config.weight_decay, "0.bias": 0.0}


def test_the_learning_rate_can_change_at_every_step(config):
    model, other = make_model(), make_model()
    optimizer = build_optimizer(config, model)
    for step, rate in enumerate((0.05, 0.01, 0.0)):
        backward(model, step)
        before = copy.deepcopy(list(model.parameters()))
        set_learning_rate(optimizer, rate)
        optimizer.step()
        moved = not equal(list(model.parameters()), before)
        assert moved == (rate > 0)
    assert not equal(list(model.parameters()), list(other.parameters()))


def test_state_takes_the_bytes_of_the_formula(config):
    model = make_model()
    optimizer = build_optimizer(config, model)
    train(model, optimizer, range(1))
    held = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    if config.name not in STATE:
        pytest.skip("the state of a class named by its path has no formula of ours")
    matrices, vectors, settings = STATE[config.name]
    formula = [
        state_bytes(matrices if p.ndim > 1 else vectors, tuple(p.shape), settings=settings)
        for p in model.parameters()
    ]
    assert held == sum(formula)


def test_it_falls_on_a_quadratic(config):
    model = nn.Linear(6, 1, bias=False)
    optimizer = build_optimizer(config, model)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model.weight - 3.0).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(map(math.isfinite, losses))
