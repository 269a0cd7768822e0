"""Gradient release: when a parameter is updated, and what ends it; that it changes no bit is in limits/."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hardy.optim import release as module
from hardy.optim.optimizers import APOLLO, SMMF, AdaptiveAdamW
from hardy.optim.release import GradientRelease


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        for parameter in self.parameters():
            nn.init.eye_(parameter)

    def forward(self, *, b=True):
        x = self.a(torch.ones(1, 3))
        return (self.b(x) if b else x).square().sum()


def watch(model, *, accumulation_steps=1, units=None, monkeypatch=None):
    """Return the units that were updated, as lists of names, and the release."""
    updated = []
    names = {param: name for name, param in model.named_parameters()}
    if units is not None:
        of_name = {name: param for param, name in names.items()}
        grouped = [[of_name[name] for name in unit] for unit in units]
        monkeypatch.setattr(module, "units_of", lambda *_: grouped)

    def update(params, group_of):
        assert not torch.is_grad_enabled()
        assert any(param.grad is not None for param in params)
        updated.append([names[param] for param in params])

    release = GradientRelease(
        model, model.parameters(), splits=[], update=update, accumulation_steps=accumulation_steps
    )
    return updated, release


def test_each_parameter_is_updated_in_the_backward_pass_and_its_gradient_dropped(caplog):
    model = Two()
    updated, release = watch(model)
    model().backward()
    assert updated == [["b.weight"], ["a.weight"]] and not caplog.records
    assert model.a.weight.grad is None and model.b.weight.grad is None
    assert release.finish() and not release.finish()
    assert len(updated) == 2


def test_a_unit_is_updated_once_all_its_gradients_are_there(monkeypatch):
    model = Two()
    updated, release = watch(model, units=[["a.weight", "b.weight"]], monkeypatch=monkeypatch)
    model().backward()
    assert updated == [["a.weight", "b.weight"]]
    model(b=False).backward()  # b never comes: the unit waits for the step
    assert len(updated) == 1 and model.a.weight.grad is not None
    assert release.finish()
    assert len(updated) == 2 and model.a.weight.grad is None


def test_accumulated_gradients_are_released_by_the_last_backward_pass(caplog):
    model = Two()
    updated, release = watch(model, accumulation_steps=2)
    assert "released in the last of the 2 backward passes of a step only, and all are kept" in caplog.text
    model().backward()
    assert not updated and model.a.weight.grad is not None
    model().backward()
    assert len(updated) == 2
    release.finish()
    model().backward()
    model(b=False).backward()
    assert updated[2:] == [["a.weight"]]
    release.finish()  # b had a gradient in one of the two
    assert updated[2:] == [["a.weight"], ["b.weight"]] and model.b.weight.grad is None
    model().backward()
    assert len(updated) == 4  # the count began anew


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="accumulation_steps must be at least 1, got 0"):
        watch(Two(), accumulation_steps=0)
    model = Two()
    replicated = DistributedDataParallel.__new__(DistributedDataParallel)
    monkeypatch.setattr(model, "modules", lambda: iter([model, replicated]), raising=False)
    with pytest.raises(ValueError, match="cannot be released under DistributedDataParallel.*use fully_shard"):
        watch(model)


def test_the_optimizer_can_go_back_to_ordinary_steps():
    model = Two()
    optimizer = SMMF(model.named_parameters(), lr=0.1)
    optimizer.enable_release(model)
    model().backward()
    assert model.a.weight.grad is None
    optimizer.step()
    optimizer.disable_release()
    before = model.a.weight.detach().clone()
    model().backward()
    assert model.a.weight.grad is not None and torch.equal(model.a.weight, before)
    optimizer.step()
    assert not torch.equal(model.a.weight, before)
    assert optimizer.param_groups[0]["calls"] == 2


def test_release_can_be_switched_on_again_with_other_settings():
    model = Two()
    optimizer = AdaptiveAdamW(model.named_parameters(), lr=0.1)
    optimizer.enable_release(model)
    optimizer.enable_release(model, accumulation_steps=2)
    before = model.a.weight.detach().clone()
    model().backward()
    assert torch.equal(model.a.weight, before)  # the first hooks are gone
    model().backward()
    optimizer.step()
    assert not torch.equal(model.a.weight, before)


@pytest.mark.parametrize(
    "make", [SMMF, lambda named, lr: APOLLO(named, lr=lr, rank=2)], ids=["smmf", "apollo"]
)
def test_loading_a_checkpoint_keeps_the_release(make):
    ends = []
    for released in (False, True):
        model = Two()
        optimizer = make(model.named_parameters(), lr=0.1)
        if released:
            optimizer.enable_release(model)
        for step in range(4):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
            if step == 1:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        ends.append([param.detach().clone() for param in model.parameters()])
        assert optimizer.param_groups[0]["calls"] == 4
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    optimizer.disable_release()
    model().backward()
    assert model.a.weight.grad is not None


def test_frozen_parameters_get_no_hook():
    model = Two()
    model.b.weight.requires_grad_(False)
    optimizer = SMMF(model.named_parameters(), lr=0.1)
    optimizer.enable_release(model)
    model().backward()
    optimizer.step()
    assert torch.equal(model.b.weight, torch.eye(3)) and not torch.equal(model.a.weight, torch.eye(3))
    model.b.weight.requires_grad_(True)
    model().backward()
    with pytest.raises(ValueError, match="added or unfrozen after enable_release.*call enable_release again"):
        optimizer.step()
    optimizer.enable_release(model)
    model().backward()
    optimizer.step()
    assert not torch.equal(model.b.weight, torch.eye(3))


def test_one_gradient_at_a_time_is_held():
    """In a chain of layers, the gradient of the one before comes after the last was dropped."""
    model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(5)])
    optimizer = SMMF(model.named_parameters(), lr=0.1)
    optimizer.enable_release(model)
    held = SimpleNamespace(most=0)

    def count(_):
        held.most = max(held.most, sum(param.grad is not None for param in model.parameters()))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
    model(torch.ones(2, 4)).sum().backward()
    assert held.most == 0  # ours ran before, and left nothing
