"""The container for torchtitan: in torchtitan where it is installed, else in a stand-in with its interface.

torchtitan brings datasets, wandb and tensorboard, so it is not among what the tests install; the stand-in has
what its 0.3 promises: a Config that builds its owner, and state by parameter name after a step at rate 0.
"""

import copy
import io
import sys
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from hardy.config import ConfigError, UserError
from hardy.integrations.torchtitan import container_class, optimizer_config
from hardy.optim.make import make_optimizer

COMPONENT = "torchtitan.components.optimizer"


class StandIn(Optimizer):
    """What torchtitan's container does with its optimizers."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        param_groups: list[Any] = field(default_factory=list)
        implementation: str = "fused"

        def build(self, **kwargs):
            return self._owner(config=replace(self), **kwargs)

    def __init_subclass__(cls):
        cls.Config._owner = cls

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self):
        flat = {}
        for optimizer in self.optimizers:
            make_state(optimizer)
            packed = optimizer.state_dict()
            for group in packed["param_groups"]:
                for number, name in zip(group["params"], group["param_names"], strict=True):
                    for key, value in packed["state"].get(number, {}).items():
                        flat[f"state.{name}.{key}"] = value
                    for key in group.keys() - {"params", "param_names"}:
                        flat[f"param_groups.{name}.{key}"] = group[key]
        return flat

    def load_state_dict(self, flat):
        for optimizer in self.optimizers:
            make_state(optimizer)
            packed = optimizer.state_dict()
            for group in packed["param_groups"]:
                for number, name in zip(group["params"], group.pop("param_names"), strict=True):
                    held = packed["state"].get(number, {})
                    packed["state"][number] = {key: flat[f"state.{name}.{key}"] for key in held}
                    group |= {key: flat[f"param_groups.{name}.{key}"] for key in group.keys() - {"params"}}
            optimizer.load_state_dict(packed)


def make_state(optimizer):
    """Take the step that torchtitan takes before it saves or loads."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step(closure=None)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


@pytest.fixture(params=["stand-in", "torchtitan"])
def titan(request, monkeypatch):
    """Make torchtitan's container importable."""
    container_class.cache_clear()
    if request.param == "stand-in":
        module = ModuleType(COMPONENT)
        module.OptimizersContainer = StandIn
        monkeypatch.setitem(sys.modules, "torchtitan", ModuleType("torchtitan"))
        monkeypatch.setitem(sys.modules, "torchtitan.components", ModuleType("torchtitan.components"))
        monkeypatch.setitem(sys.modules, COMPONENT, module)
    elif find_spec("torchtitan") is None:
        pytest.skip("torchtitan is not installed; pip install torchtitan runs these on the real one")
    yield
    container_class.cache_clear()


def make_model():
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 30))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def train(model, optimizer, steps):
    for step in steps:
        tokens = torch.randint(30, (20,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


SETTINGS = {
    "apollo": {"lr": 0.01, "weight_decay": 0.1, "rank": 2, "embed_kind": "smmf", "backend": "foreach"},
    "muon": {"lr": 0.01, "weight_decay": 0.1, "backend": "foreach"},
}


def build(preset, *parts):
    return optimizer_config(preset, **SETTINGS[preset]).build(model_parts=list(parts))


@pytest.mark.parametrize("preset", SETTINGS)
def test_it_trains_as_make_optimizer_does(titan, preset):
    ours, expected = make_model(), make_model()
    container = build(preset, ours)
    optimizer = make_optimizer(expected, preset, **SETTINGS[preset])
    assert equal(train(ours, container, range(4)), train(expected, optimizer, range(4)))


@pytest.mark.parametrize("preset", SETTINGS)
@pytest.mark.parametrize("taken", [0, 3])
def test_stop_save_load_go_on_gives_the_same_bits(titan, preset, taken):
    """Saving before the first step makes the state by a step at rate 0, which must not count."""
    model = make_model()
    container = build(preset, model)
    train(model, container, range(taken))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": container.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = make_model()
    again.load_state_dict(saved["model"])
    second = build(preset, again)
    second.load_state_dict(saved["optimizer"])
    assert equal(train(again, second, range(taken, 6)), train(model, container, range(taken, 6)))
    whole = make_model()
    assert equal(list(again.parameters()), train(whole, build(preset, whole), range(6)))


def test_each_part_of_the_model_has_its_optimizer_and_hooks_are_called(titan):
    first, last = make_model(), nn.Linear(16, 30, bias=False)
    container = build("apollo", first, last)
    assert [len(optimizer.param_groups) for optimizer in container.optimizers] == [3, 1]
    calls = []
    container.register_step_pre_hook(lambda *_: calls.append(1))
    container.step()
    assert calls == [1]


def test_the_size_of_the_vocabulary_tells_the_head_of_a_stage_without_embedding(titan):
    stage = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 30))
    config = optimizer_config("apollo", rank=2, vocab_size=30)
    container = config.build(model_parts=[copy.deepcopy(stage)])
    kinds = {group["role"]: group["kind"] for group in container.optimizers[0].param_groups}
    assert kinds == {"matrix": "apollo", "embedding": "adamw", "vector": "adamw"}


def test_groups_in_torchtitans_words_are_refused(titan):
    config = optimizer_config("apollo")
    config.param_groups = ["anything"]
    with pytest.raises(
        ConfigError, match=r"param_groups is not read.*say by rules=\[\(pattern, kind, settings\)\]"
    ):
        config.build(model_parts=[make_model()])


def test_a_missing_torchtitan_is_named(monkeypatch):
    container_class.cache_clear()
    monkeypatch.setitem(sys.modules, COMPONENT, None)
    with pytest.raises(UserError, match=r"needs torchtitan \(.*\); install it by pip install torchtitan"):
        optimizer_config("apollo")


def test_an_old_torchtitan_is_named(monkeypatch):
    container_class.cache_clear()
    for name in ("torchtitan", "torchtitan.components", COMPONENT):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[COMPONENT].OptimizersContainer = object
    with pytest.raises(UserError, match="older than 0.3, where optimizers became components with a Config"):
        optimizer_config("apollo")
