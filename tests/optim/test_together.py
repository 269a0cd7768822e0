import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from hardy.optim.optimizers import SMMF, AdaptiveAdamW
from hardy.optim.together import Together
from hardy.train.state import load_state, state_of


def make_model(dtype=torch.float32):
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def split(model):
    """Return the names and parameters that are matrices, and the others."""
    named = list(model.named_parameters())
    return [x for x in named if x[1].ndim == 2], [x for x in named if x[1].ndim != 2]


def parts_of(model, rest=torch.optim.AdamW):
    matrices, others = split(model)
    return torch.optim.Muon(matrices, lr=0.02), rest(others, lr=0.01)


def together(model, rest=torch.optim.AdamW):
    return Together(parts_of(model, rest))


def backward(model, step):
    generator = torch.Generator().manual_seed(100 + step)
    weight = next(model.parameters())
    x = torch.randn(4, 5, generator=generator).to(weight.dtype)
    model.zero_grad(set_to_none=True)
    loss = model(x).square().mean()
    loss.backward()
    return loss


def train(model, *optimizers, steps):
    for step in steps:
        backward(model, step)
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_one_step_together_is_a_step_of_each():
    apart, joined = make_model(), make_model()
    expected = train(apart, *parts_of(apart), steps=range(4))
    assert equal(train(joined, together(joined), steps=range(4)), expected)


def test_a_scheduler_changes_every_part():
    model, alone = make_model(), make_model()
    both = together(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(both, lambda step: 0.5**step)
    parts = parts_of(alone)
    others = [torch.optim.lr_scheduler.LambdaLR(part, lambda step: 0.5**step) for part in parts]
    for step in range(3):
        train(model, both, steps=[step])
        train(alone, *parts, steps=[step])
        for each in (scheduler, *others):
            each.step()
    assert [group["lr"] for group in both.param_groups] == [0.02 / 8, 0.01 / 8]
    assert equal(list(model.parameters()), list(alone.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rest", [torch.optim.AdamW, AdaptiveAdamW])
def test_stop_save_load_go_on_gives_the_same_bits_and_dtypes(rest, dtype):
    whole = make_model(dtype)
    straight = together(whole, rest)
    expected = train(whole, straight, steps=range(6))
    model = make_model(dtype)
    optimizer = together(model, rest)
    train(model, optimizer, steps=range(3))
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    again = make_model(dtype)
    second = together(again, rest)
    again.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    assert equal(train(again, second, steps=range(3, 6)), expected)
    dtypes = [
        {k: v.dtype for k, v in optimizer.state[p].items()}
        for optimizer, model in ((straight, whole), (second, again))
        for p in model.parameters()
    ]
    assert dtypes[:4] == dtypes[4:]


def test_a_load_does_not_change_what_is_loaded():
    model = make_model()
    optimizer = together(model)
    train(model, optimizer, steps=range(2))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    other = together(make_model())
    other.load_state_dict(saved)
    train(make_model(), other, steps=[])
    assert saved["param_groups"] == before["param_groups"]
    assert saved["state"].keys() == before["state"].keys() == {0, 1, 2, 3}
    other.param_groups[0]["lr"] = 5.0
    assert saved["param_groups"][0]["lr"] == 0.02


@pytest.mark.parametrize("steps", [0, 3])
def test_a_copy_goes_on_as_the_original_and_apart_from_it(steps):
    model = make_model()
    optimizer = together(model)
    train(model, optimizer, steps=range(steps))
    twin, copied = copy.deepcopy((model, optimizer))
    assert copied.parts[0].param_groups[0] is copied.param_groups[0]
    assert copied.parts[1].state is copied.state
    assert equal(train(twin, copied, steps=range(steps, 6)), train(model, optimizer, steps=range(steps, 6)))


def test_swapped_parameters_are_those_that_move():
    """Accelerate replaces the parameters in the groups after an optimizer was built."""
    model, fresh, expected = make_model(), make_model(), make_model()
    optimizer = together(model)
    by_name = dict(fresh.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [by_name[name] for name in group["param_names"]]
    before = [p.detach().clone() for p in model.parameters()]
    assert equal(train(fresh, optimizer, steps=range(2)), train(expected, together(expected), steps=range(2)))
    assert equal(list(model.parameters()), before)


def test_the_loss_of_a_closure_is_returned_and_it_is_called_once():
    model, expected = make_model(), make_model()
    optimizer = together(model)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(backward(model, 0))
        return calls[-1]

    loss = optimizer.step(closure)
    assert len(calls) == 1 and loss is calls[0]
    assert equal(list(model.parameters()), train(expected, *parts_of(expected), steps=[0]))


@pytest.mark.parametrize("flat", [False, True])
def test_it_passes_through_torchs_distributed_checkpoint(flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = make_model()
    optimizer = together(model, SMMF)
    train(model, optimizer, steps=range(3))
    saved = through_file(get_optimizer_state_dict(model, optimizer, options=options))
    again = copy.deepcopy(model)
    second = together(again, SMMF)
    again.zero_grad(set_to_none=True)
    set_optimizer_state_dict(again, second, saved, options=options)
    assert equal(train(again, second, steps=range(3, 5)), train(model, optimizer, steps=range(3, 5)))


@pytest.mark.parametrize("taken", [0, 3])
def test_it_passes_through_a_checkpoint_of_a_run(taken):
    model = make_model()
    optimizer = together(model)
    train(model, optimizer, steps=range(taken))
    state = state_of(model, optimizer)
    tensors, plain = through_file({"tensors": state.tensors, "plain": state.plain}).values()
    again = make_model()
    train(again, torch.optim.SGD(again.parameters(), lr=0.1), steps=[9])
    second = together(again)

    def fill(targets):
        for key, value in targets.items():
            value.copy_(tensors[key])

    load_state(again, second, saved=tensors, plain=plain, fill=fill)
    steps = range(taken, taken + 3)
    assert equal(train(again, second, steps=steps), train(model, optimizer, steps=steps))


def test_a_gradient_scaler_leaves_the_step_as_it_was_and_skips_an_infinite_one():
    model, expected = make_model(), make_model()
    optimizer = together(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        model.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(100 + step)
        x = torch.randn(4, 5, generator=generator)
        scaler.scale(model(x).square().mean()).backward()
        if step == 1:
            model[2].bias.grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert equal(list(model.parameters()), train(expected, *parts_of(expected), steps=(0, 2)))


def test_defaults_are_what_all_groups_have():
    """So that code that reads back the settings of a group finds each of them."""
    optimizer = together(make_model())
    assert {"lr", "weight_decay"} <= optimizer.defaults.keys()
    assert all(optimizer.defaults.keys() <= group.keys() for group in optimizer.param_groups)
    assert "betas" not in optimizer.defaults and "momentum" not in optimizer.defaults


def test_what_cannot_be_held_together_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="Together needs at least one optimizer, got none"):
        Together([])
    with pytest.raises(ValueError, match="more than one parameter group"):
        Together([torch.optim.AdamW(model.parameters()), torch.optim.SGD(model.parameters())])
    with pytest.raises(
        ValueError, match=r"cannot be added to optimizers held together \(Muon, AdamW\); add it to"
    ):
        together(model).add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_another_number_of_groups_is_refused():
    model = make_model()
    alone = torch.optim.AdamW(model.named_parameters())
    with pytest.raises(ValueError, match=r"the optimizer has .*; build it as for the saved run"):
        together(model).load_state_dict(alone.state_dict())


def test_groups_and_state_put_in_their_place_are_those_that_are_used():
    """Wrappers assign them, as accelerate's wrapper lets one do."""
    model, expected = make_model(), make_model()
    optimizer = together(model)
    optimizer.param_groups = [{**group, "lr": 0.5} for group in optimizer.param_groups]
    optimizer.state = copy.copy(optimizer.state)
    parts = parts_of(expected)
    for part in parts:
        part.param_groups[0]["lr"] = 0.5
    assert equal(train(model, optimizer, steps=range(2)), train(expected, *parts, steps=range(2)))
    assert len(optimizer.state) == 4


def test_what_a_part_adds_to_older_groups_is_kept():
    """SGD of torch fills in settings that a checkpoint of an older release does not have."""
    model = make_model()
    saved = together(model, torch.optim.SGD).state_dict()
    del saved["param_groups"][1]["nesterov"]
    optimizer = together(model, torch.optim.SGD)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[1]["nesterov"] is False
    train(model, optimizer, steps=[0])
