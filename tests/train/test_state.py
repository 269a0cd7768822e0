"""Names and values of a model's and an optimizer's state, and what is refused when loading."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from hardy.config import UserError
from hardy.train.state import load_state, state_of


def make(optimizer=torch.optim.AdamW, **settings):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return model, optimizer(model.parameters(), lr=0.1, **settings)


def step(model, optimizer):
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def load(saved, model, optimizer):
    """Load a state that lies in memory."""
    kept = {key: value.clone() for key, value in saved.tensors.items()}
    load_state(
        model,
        optimizer,
        saved=kept,
        plain=saved.plain,
        fill=lambda targets: [target.data.copy_(kept[key]) for key, target in targets.items()],
    )


def test_names_are_canonical():
    model, optimizer = step(*make())
    plain = state_of(model, optimizer).tensors.keys()
    assert "model/1.weight" in plain and "optim/1.weight/exp_avg" in plain and "optim/0.bias/step" in plain
    compiled = torch.compile(model, backend="eager")
    assert state_of(compiled, optimizer).tensors.keys() == plain
    wrapped = nn.Sequential(*(checkpoint_wrapper(layer) for layer in model))
    assert state_of(wrapped, optimizer).tensors.keys() == plain


def test_saving_changes_nothing():
    model, optimizer = make()
    model(torch.ones(1, 3)).sum().backward()
    state = state_of(model, optimizer)
    assert not optimizer.state and model[0].weight.grad is not None
    assert not any(key.startswith("optim/") for key in state.tensors)
    assert "lr" in state.plain["groups"][0] and state.plain["class"] == "AdamW"


def test_the_step_count_and_the_moments_come_back():
    model, optimizer = make()
    for _ in range(3):
        step(model, optimizer)
    other, fresh = make()
    load(state_of(model, optimizer), other, fresh)
    for param, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(param, twin)
        assert fresh.state[twin]["step"] == 3.0 and fresh.state[twin]["step"].dtype == torch.float32
        assert torch.equal(fresh.state[twin]["exp_avg"], optimizer.state[param]["exp_avg"])


def test_pending_gradients_are_dropped():
    saved = state_of(*step(*make(torch.optim.SGD)))
    model, optimizer = make(torch.optim.SGD)
    model(torch.ones(1, 3)).sum().backward()
    load(saved, model, optimizer)
    assert all(param.grad is None for param in model.parameters())


def test_a_load_that_fails_leaves_the_learning_rate():
    def broken(targets):
        raise UserError("unreadable")

    saved = state_of(*step(*make()))
    model, optimizer = make()
    with pytest.raises(UserError, match="unreadable"):
        load_state(model, optimizer, saved=saved.tensors, plain=saved.plain, fill=broken)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_state_of_nothing_empties_a_used_optimizer():
    saved = state_of(*make())
    model, optimizer = step(*make())
    load(saved, model, optimizer)
    assert not optimizer.state_dict()["state"]


def test_a_learning_rate_in_a_tensor_stays_one():
    model, optimizer = make(capturable=False)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.3)
    saved = state_of(model, optimizer)
    assert saved.plain["groups"][0]["lr"] == torch.tensor(0.3).item()
    other, fresh = make()
    fresh.param_groups[0]["lr"] = torch.tensor(0.7, dtype=torch.float64)
    load(saved, other, fresh)
    rate = fresh.param_groups[0]["lr"]
    assert rate.dtype == torch.float64 and rate.item() == torch.tensor(0.3).item()


def test_how_the_machine_computes_is_not_taken_over():
    saved = state_of(*step(*make(foreach=True)))
    model, optimizer = make(foreach=False)
    load(saved, model, optimizer)
    assert optimizer.param_groups[0]["foreach"] is False


class Counting(torch.optim.Optimizer):
    """Keeps whole numbers and plain values beside a float parameter; gets them back `exact` or not."""

    def __init__(self, params, lr, *, exact=True):
        super().__init__(params, {"lr": lr})
        self.exact = exact

    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            state["signs"] = state.get("signs", torch.zeros(2, dtype=torch.uint8)) + 1
            state["calls"] = state.get("calls", 0) + 1

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        params = self.param_groups[0]["params"]
        for number, entries in state_dict["state"].items() if self.exact else ():
            self.state[params[number]].update(entries)


def test_state_keeps_its_dtype_and_plain_numbers():
    model, optimizer = make(Counting)
    for _ in range(3):
        step(model, optimizer)
    other, fresh = make(Counting)
    load(state_of(model, optimizer), other, fresh)
    state = fresh.state[other[0].weight]
    assert torch.equal(state["signs"], torch.full((2,), 3, dtype=torch.uint8)) and state["calls"] == 3


def test_an_optimizer_that_casts_its_state_is_found_out():
    saved = state_of(*step(*make(Counting)))
    with pytest.raises(UserError, match="did not take its state back: .*uint8 .*float32 now"):
        load(saved, *make(Counting, exact=False))


def test_another_optimizer_is_refused():
    with pytest.raises(UserError, match="holds the state of AdamW, the run uses SGD; set optim.name back"):
        load(state_of(*step(*make())), *make(torch.optim.SGD))


def test_another_model_is_refused():
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(UserError, match=r"does not fit the model: 2 only in the checkpoint \(model/1.bias"):
        load(state_of(*step(*make())), model, None)


def test_other_groups_are_refused():
    saved = state_of(*step(*make()))
    model, _ = make()
    with pytest.raises(UserError, match="does not fit the optimizer's parameters: 2 only in the checkpoint"):
        load(saved, model, torch.optim.AdamW(model[0].parameters()))
    model, optimizer = make()
    split = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[1].parameters()}])
    load(saved, model, split)  # each of the two lies within the one
    with pytest.raises(UserError, match="were not in one group"):
        load(state_of(model, split), model, optimizer)


def test_what_cannot_be_saved_is_named():
    model, _ = make()
    with pytest.raises(UserError, match=r"parameter 0 of shape \(1,\) does not belong to the model"):
        state_of(model, torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
    model, optimizer = step(*make())
    optimizer.state[model[0].weight]["basis"] = {"q": torch.zeros(1)}
    with pytest.raises(UserError, match="its state 'basis' of 0.weight is a dict"):
        state_of(model, optimizer)
    model, optimizer = make()
    optimizer.state["shared"] = {"x": 1}
    with pytest.raises(UserError, match="keeps the state 'shared' beside its parameters"):
        state_of(model, optimizer)
    model[0].__class__ = type("Talkative", (nn.Linear,), {"get_extra_state": lambda self: {"a": 1}})
    with pytest.raises(UserError, match="0._extra_state is a dict, not a tensor"):
        state_of(model, optimizer)
