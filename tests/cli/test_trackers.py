"""Trackers get every number of every step; a missing package is named with the way to install it."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from hardy.cli.trackers import TRACKERS, tracker_hooks
from hardy.config import UserError
from hardy.train.config import LogConfig


@pytest.fixture
def no_packages(monkeypatch):
    for name in ("tensorboard", "trackio", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_named(no_packages, tmp_path, name):
    with pytest.raises(UserError, match=rf"log.trackers names '{name}'.*pip install 'hardy\[track\]'"):
        tracker_hooks([name], tmp_path, project="p")


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_service_gets_config_numbers_and_the_end(monkeypatch, tmp_path, name):
    calls = []
    service = ModuleType(name)
    service.init = lambda **named: calls.append(("init", named["project"], named["name"], named["config"]))
    service.log = lambda values, step: calls.append(("log", step, values))
    service.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, name, service)
    (hook,) = tracker_hooks([name], tmp_path / "run", project="mine")
    hook.on_start(SimpleNamespace(config={"a": 1}))
    hook.on_step({"step": 3, "loss": 2.5, "note": "text"})
    hook.close()
    assert calls == [("init", "mine", "run", {"a": 1}), ("log", 3, {"loss": 2.5}), ("finish",)]


def test_tensorboard_gets_scalars(monkeypatch, tmp_path):
    written = []

    class Writer:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    (hook,) = tracker_hooks(["tensorboard"], tmp_path, project="p")
    hook.close()
    assert written == []  # a run that was refused before its start leaves no file behind
    hook.on_start(None)
    hook.on_step({"step": 2, "loss": 1.5})
    hook.close()
    assert written == [str(tmp_path / "tensorboard"), ("loss", 1.5, 2), "closed"]


def test_the_table_holds_what_the_setting_allows():
    LogConfig(trackers=tuple(TRACKERS))
