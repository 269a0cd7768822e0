"""The plugin for axolotl: in axolotl where it is installed, else with a stand-in for the base of its plugins.

axolotl pins some fifty packages to exact versions, so it is not among what the tests install.
"""

import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from hardy.config import ConfigError, UserError
from hardy.integrations import axolotl
from hardy.integrations.hf import decayed_names
from hardy.optim.make import make_optimizer

pytest.importorskip("transformers", reason="transformers is not installed (extra dev)")

BASE = "axolotl.integrations.base"
CFG = {"hardy": {"preset": "apollo", "rank": 2, "betas": [0.8, 0.9]}}


class StandIn:
    """The hooks of a plugin that ours leaves as they are do nothing."""


@pytest.fixture(params=["stand-in", "axolotl"])
def plugin(request, monkeypatch):
    """Load the plugin as axolotl does, by the path of its class."""
    axolotl._plugin_class.cache_clear()
    if request.param == "stand-in":
        module = ModuleType(BASE)
        module.BasePlugin = StandIn
        for name in ("axolotl", "axolotl.integrations"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, BASE, module)
    elif find_spec("axolotl") is None:
        pytest.skip("axolotl is not installed; pip install axolotl runs these on the real one")
    yield axolotl.Plugin()
    axolotl._plugin_class.cache_clear()


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.up = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)


def make_trainer(**changes):
    """Return what the plugin asks of a trainer."""
    said = {
        "learning_rate": 0.2,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
    }
    torch.random.manual_seed(0)
    return SimpleNamespace(
        model=Small(), args=SimpleNamespace(**{**said, **changes}), optimizer_cls_and_kwargs=None
    )


def settings_of(optimizer):
    keys = ("kind", "lr", "weight_decay", "betas", "eps", "rank")
    return [
        (name, *(group.get(key) for key in keys))
        for group in optimizer.param_groups
        for name in group["param_names"]
    ]


def expected_settings(trainer):
    settings = {"lr": 0.2, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "rank": 2}
    decayed = decayed_names(trainer.model)
    assert sorted(decayed) == ["embed.weight", "up.weight"]
    return settings_of(make_optimizer(trainer.model, "apollo", decayed=decayed, **settings))


def test_its_hook_makes_the_optimizer(plugin):
    trainer = make_trainer()
    assert settings_of(plugin.create_optimizer(CFG, trainer)) == expected_settings(trainer)


@pytest.mark.parametrize("calls", ["as transformers does", "as axolotl does"])
def test_the_trainer_gets_a_factory(plugin, calls):
    trainer = make_trainer()
    plugin.post_trainer_create(CFG, trainer)
    factory, named = trainer.optimizer_cls_and_kwargs
    told = [trainer.args] if calls == "as axolotl does" else []
    optimizer = factory()(trainer.model, *told, **named)
    assert settings_of(optimizer) == expected_settings(trainer)


def test_its_settings_are_added_to_axolotls(plugin):
    pytest.importorskip("pydantic", reason="pydantic comes with axolotl")
    home, _, name = plugin.get_input_args().rpartition(".")
    namespace = {}
    exec(f"from {home} import {name}", namespace)  # as axolotl does
    assert namespace[name](hardy={"preset": "smmf"}).hardy == {"preset": "smmf"}
    assert namespace[name]().hardy is None


@pytest.mark.parametrize("said", [None, {"rank": 4}, "apollo"])
def test_a_missing_preset_is_named(plugin, said):
    with pytest.raises(
        ConfigError, match=r"hardy must be a table with a preset, such as {preset: apollo-mini}, got"
    ):
        plugin.post_trainer_create({"hardy": said}, make_trainer())


def test_rates_that_would_be_dropped_are_refused(plugin):
    trainer = make_trainer(embedding_lr=1e-4, lr_groups=None)
    with pytest.raises(
        ConfigError, match="embedding_lr has no effect on an optimizer of a plugin.*hardy.rules"
    ):
        plugin.create_optimizer(CFG, trainer)


def test_a_missing_axolotl_is_named(monkeypatch):
    axolotl._plugin_class.cache_clear()
    monkeypatch.setitem(sys.modules, BASE, None)
    with pytest.raises(UserError, match=r"needs axolotl \(.*\); install it by pip install axolotl"):
        axolotl.Plugin  # noqa: B018


def test_other_names_are_attribute_errors():
    assert not hasattr(axolotl, "plugin")
