"""What every low-memory optimizer promises about a step; a new one is a line of the table in conftest.py.

State and checkpoints are in test_low_memory_state.py, costs in test_low_memory_cost.py, large and small
numbers in test_low_memory_range.py. Promises that need workers are kept in tests/mp.
"""

import copy
import math

import pytest
import torch
from torch import nn

ROUNDING = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-8},
}
"""How far weights may be apart after three steps whose sums were taken in another order."""


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def weights(net):
    return [param.detach().clone() for param in net.parameters()]


def state_of(optimizer):
    """Return copies of all state tensors, by parameter and key."""
    return [
        {key: value.clone() for key, value in optimizer.state[param].items()}
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def same_state(a, b):
    return all(
        x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
        for x, y in zip(a, b, strict=True)
    )


def zero_gradients(net):
    for param in net.parameters():
        param.grad = torch.zeros_like(param)


def empty_step(net, optimizer):
    """Step as torch's distributed checkpoint does before it loads: zero gradients at rate 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0) if isinstance(group["lr"], torch.Tensor) else 0.0
    zero_gradients(net)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def close(a, b, **tolerance):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def test_the_same_start_gives_the_same_bits(low_memory):
    net = low_memory.net()
    assert equal(low_memory.train(net, low_memory.make(net), range(5)), low_memory.trained(range(5)))


def test_the_ambient_seed_changes_nothing(low_memory):
    torch.manual_seed(int(torch.initial_seed()) + 1)
    net = low_memory.net()
    assert equal(low_memory.train(net, low_memory.make(net), range(5)), low_memory.trained(range(5)))


def test_gradients_are_read_only(low_memory):
    net = low_memory.net()
    optimizer = low_memory.make(net)
    for step in range(2):
        low_memory.backward(net, step)
        before = [param.grad.clone() for param in net.parameters()]
        optimizer.step(grad_scale=torch.tensor(3.0), found_inf=torch.tensor(0.0))
        assert equal([param.grad for param in net.parameters()], before)


def test_every_parameter_moves(low_memory):
    net = low_memory.net()
    before = weights(net)
    after = low_memory.train(net, low_memory.make(net, lr=0.3), range(3))
    assert not any(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert all(weight.isfinite().all() for weight in after)


def test_a_closure_has_gradients_and_its_loss_is_returned(low_memory):
    plain = low_memory.trained(range(3))
    net = low_memory.net()
    optimizer = low_memory.make(net)
    for step in range(3):
        loss = optimizer.step(lambda step=step: low_memory.backward(net, step))
        assert loss.requires_grad and loss.ndim == 0
    assert equal(weights(net), plain)


def test_two_groups_take_their_own_settings(low_memory):
    net, still = low_memory.net(), ("tall", "vector")
    groups = [{"params": [(n, p) for n, p in net.named_parameters() if n not in still and n != "scalar"]}]
    groups += [{"params": [("tall", net.tall)], "lr": 0.0}]
    groups += [{"params": [("vector", net.vector), ("scalar", net.scalar)], "kind": "adamw", "lr": 0.0}]
    before = dict(copy.deepcopy(net).named_parameters())
    optimizer = low_memory.cls(groups, **{"lr": 0.3, **low_memory.settings})
    low_memory.train(net, optimizer, range(3))
    for name, param in net.named_parameters():
        assert torch.equal(param, before[name]) == (name in (*still, "scalar")), name


def test_a_parameter_without_gradient_is_left_alone(low_memory):
    net = low_memory.net()
    optimizer = low_memory.make(net)
    low_memory.train(net, optimizer, range(2))
    low_memory.backward(net, 2)
    states = copy.deepcopy({name: optimizer.state[param] for name, param in net.named_parameters()})
    before = copy.deepcopy(net)
    for name in ("tall", "experts", "vector"):
        getattr(net, name).grad = None
    optimizer.step()
    for name, param in net.named_parameters():
        left_out = name in ("tall", "experts", "vector")
        assert same_state([optimizer.state[param]], [states[name]]) == left_out, name
        assert not left_out or torch.equal(param, getattr(before, name)), name


def test_a_first_step_without_any_gradient_makes_all_state(low_memory):
    net = low_memory.net()
    optimizer = low_memory.make(net)
    before = weights(net)
    optimizer.step()
    assert equal(weights(net), before)
    assert len(optimizer.state) == len(before)


@pytest.mark.parametrize("number", [float, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize("taken", [0, 3], ids=["first", "later"])
def test_zero_gradients_at_rate_zero_change_nothing(low_memory, number, taken):
    nets = [low_memory.net(), low_memory.net()]
    ours, untouched = optimizers = [low_memory.make(net, lr=number(0.02)) for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        low_memory.train(net, optimizer, range(taken))
    untouched.materialize_state()
    empty_step(nets[0], ours)
    assert equal(weights(nets[0]), weights(nets[1]))
    if taken == 0 or number is float:
        assert [g["calls"] for g in ours.param_groups] == [g["calls"] for g in untouched.param_groups]
    for old, new in zip(state_of(untouched), state_of(ours), strict=True):
        for key in old:  # a basis is random until there is a gradient
            assert torch.equal(old[key], new[key]) or (key, taken) == ("basis", 0), key


@pytest.mark.parametrize("number", [float, torch.tensor], ids=["number", "tensor"])
def test_a_first_step_that_only_makes_state_does_not_change_training(low_memory, number):
    plain = low_memory.trained(range(5), lr=number(0.02))
    net = low_memory.net()
    optimizer = low_memory.make(net, lr=number(0.02))
    empty_step(net, optimizer)
    assert equal(low_memory.train(net, optimizer, range(5)), plain)


def test_a_warm_up_that_starts_at_zero_counts_its_first_step(low_memory):
    net = low_memory.net()
    optimizer = low_memory.make(net, lr=0.0)
    before = weights(net)
    low_memory.train(net, optimizer, range(1))
    assert equal(weights(net), before)
    assert all((entries["step"] == 1).all() for entries in state_of(optimizer))
    assert {group["calls"] for group in optimizer.param_groups} == {1}


@pytest.mark.parametrize("taken", [0, 3], ids=["first", "later"])
def test_a_zero_gradient_does_no_harm(low_memory, taken):
    """Step sizes afterwards are those of training: the released APOLLO takes 1,850 steps to recover."""
    nets = [low_memory.net(), low_memory.net()]
    ours, _ = optimizers = [low_memory.make(net, weight_decay=0.0) for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        low_memory.train(net, optimizer, range(taken))
    states = copy.deepcopy(
        {name: ours.state[param] for name, param in nets[0].named_parameters() if ours.state}
    )
    before = copy.deepcopy(nets[0])
    zero_gradients(nets[0])
    ours.step()
    for name in {n for g in ours.param_groups if g.get("zero_grad") == "skip" for n in g["param_names"]}:
        param = getattr(nets[0], name)
        assert torch.equal(param, getattr(before, name))
        if name in states and "basis" not in states[name]:
            assert same_state([ours.state[param]], [states[name]])
    before = [weights(net) for net in nets]
    after = [
        low_memory.train(net, opt, range(taken, taken + 1)) for net, opt in zip(nets, optimizers, strict=True)
    ]
    assert all(weight.isfinite().all() for weight in after[0])
    for old, new, usual_old, usual_new in zip(before[0], after[0], before[1], after[1], strict=True):
        assert (new - old).norm() > 0.2 * (usual_new - usual_old).norm()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_does_what_is_documented(low_memory, bad):
    net = low_memory.net()
    optimizer = low_memory.make(net)
    low_memory.train(net, optimizer, range(2))
    low_memory.backward(net, 2)
    for name in ("tall", "vector", "wide"):
        getattr(net, name).grad.view(-1)[1] = bad
    states = copy.deepcopy({name: optimizer.state[param] for name, param in net.named_parameters()})
    before = copy.deepcopy(net)
    optimizer.step()
    for group in optimizer.param_groups:
        for name in {"tall", "vector", "wide"} & set(group["param_names"]):
            param = getattr(net, name)
            if group["kind"] == "apollo" or group["nonfinite"] == "skip":
                assert torch.equal(param, getattr(before, name))
                assert same_state([optimizer.state[param]], [states[name]])
            else:
                assert not param.isfinite().all()
    assert not torch.equal(net.experts, before.experts) and net.experts.isfinite().all()


def test_found_inf_changes_nothing(low_memory):
    net = low_memory.net()
    optimizer = low_memory.make(net)
    low_memory.train(net, optimizer, range(3))  # the next call refreshes projections
    low_memory.backward(net, 3)
    net.tall.grad[0, 0], net.vector.grad[1] = math.inf, math.nan
    before, states = weights(net), state_of(optimizer)
    optimizer.step(found_inf=torch.tensor(1.0), grad_scale=torch.tensor(2.0))
    assert equal(weights(net), before)
    assert same_state(state_of(optimizer), states)


def test_found_inf_in_the_first_step_leaves_an_ordinary_second_one(low_memory):
    net = low_memory.net()
    optimizer = low_memory.make(net)
    before = weights(net)
    low_memory.backward(net, 0)
    optimizer.step(found_inf=torch.tensor(1.0))
    assert equal(weights(net), before)
    low_memory.train(net, optimizer, range(1))
    assert not any(torch.equal(x, y) for x, y in zip(before, weights(net), strict=True) if x.ndim > 1)
    assert all((entries["step"] == 1).all() for entries in state_of(optimizer))


@pytest.mark.parametrize("scale", [4.0, 1 / 1024], ids=str)
def test_grad_scale_divides_the_gradients(low_memory, scale):
    """Powers of two round nothing, so the bits are those of unscaled gradients."""
    plain = low_memory.trained(range(4))
    net = low_memory.net()
    optimizer = low_memory.make(net)
    for step in range(4):
        low_memory.backward(net, step)
        for param in net.parameters():
            param.grad.mul_(scale)
        optimizer.step(grad_scale=torch.tensor(scale))
    exact = low_memory.settings.get("proj") != "svd"  # eigenvectors of a scaled matrix differ by rounding
    close(weights(net), plain, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


def test_a_gradient_scaler_drives_it(low_memory):
    plain = low_memory.trained(range(3))
    net = low_memory.net()
    optimizer = low_memory.make(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    done = 0
    for turn in range(4):
        spoiled = turn == 1
        low_memory.backward(net, done)
        for param in net.parameters():
            param.grad.mul_(scaler.scale(torch.tensor(1.0)))
        if spoiled:
            net.wide.grad[0, 0] = math.inf
        before = weights(net)
        scaler.step(optimizer)
        scaler.update()
        assert equal(weights(net), before) == spoiled
        done += not spoiled
        if spoiled:
            for group in optimizer.param_groups:
                group["calls"] -= 1  # a skipped call counts towards the next projection
    exact = low_memory.settings.get("proj") != "svd"  # eigenvectors of a scaled matrix differ by rounding
    close(weights(net), plain, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
    assert scaler.get_scale() == 4.0


def test_a_rate_in_a_tensor_is_the_rate(low_memory):
    rate = 0.03125  # the same in fp32
    close(low_memory.trained(range(4), lr=torch.tensor(rate)), low_memory.trained(range(4), lr=rate))


@pytest.mark.parametrize("number", [float, torch.tensor], ids=["number", "tensor"])
def test_a_scheduler_changes_the_rate(low_memory, number):
    net = low_memory.net()
    optimizer = low_memory.make(net, lr=number(0.02))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.5, 0.0][min(step, 2)])
    moved = []
    for step in range(3):
        before = weights(net)
        low_memory.train(net, optimizer, range(step, step + 1))
        moved.append(max(float((x - y).norm()) for x, y in zip(weights(net), before, strict=True)))
        schedule.step()
    assert moved[0] > moved[2] == 0.0 and moved[1] > 0.0


def test_frozen_and_tied_parameters(low_memory):
    net = low_memory.net()
    net.tied = net.wide
    net.experts.requires_grad_(False)
    before = copy.deepcopy(net)
    optimizer = low_memory.make(net)
    assert sorted(n for g in optimizer.param_groups for n in g["param_names"]) == sorted(
        before.state_dict().keys() - {"tied"}
    )
    low_memory.train(net, optimizer, range(3))
    assert torch.equal(net.experts, before.experts)
    assert net.tied is net.wide and not torch.equal(net.wide, before.wide)
    assert len(optimizer.state) == 5 and net.experts not in optimizer.state  # what is frozen costs nothing
    net.experts.requires_grad_(True)
    optimizer.load_state_dict(optimizer.state_dict())  # saved frozen, loaded trained
    low_memory.train(net, optimizer, range(3, 4))
    assert not torch.equal(net.experts, before.experts) and len(optimizer.state) == 6


def test_empty_groups_are_allowed(low_memory):
    net = low_memory.net()
    optimizer = low_memory.make(net)
    optimizer.add_param_group({"params": []})
    assert equal(low_memory.train(net, optimizer, range(3)), low_memory.trained(range(3)))


def test_parameters_swapped_before_the_first_step(low_memory):
    """accelerate's FSDP2 path first puts stubs into the groups, then loads, then puts new parameters in."""
    net = low_memory.net()
    optimizer = low_memory.make(net)
    real = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(torch.empty(0)) for _ in group["params"]]
    optimizer.load_state_dict(optimizer.state_dict())
    new = copy.deepcopy(net)
    new_of = dict(zip(net.parameters(), new.parameters(), strict=True))
    for group, params in zip(optimizer.param_groups, real, strict=True):
        group["params"] = [new_of[param] for param in params]
    assert equal(low_memory.train(new, optimizer, range(3)), low_memory.trained(range(3)))


def test_parameters_that_are_not_contiguous(low_memory):
    net = low_memory.net()
    net.filters.data = net.filters.data.to(memory_format=torch.channels_last)
    net.tall.data = net.tall.data.t().contiguous().t()
    low_memory.train(net, low_memory.make(net), range(3))
    assert net.tall.stride() == (1, 12)
    # a basis by SVD enlarges what other strides round otherwise: on some processors to 8e-4
    wider = {"rtol": 0.02, "atol": 0.002} if "svd" in str(low_memory) else ROUNDING[low_memory.dtype]
    close(weights(net), low_memory.trained(range(3)), **wider)


@pytest.mark.parametrize("entry", ["adamw", "apollo, kahan", "smmf, bf16, skip", "mixed"])
def test_a_compiled_training_step(low_memory_named, entry):
    low_memory = low_memory_named(entry)
    net = low_memory.net()
    optimizer = low_memory.make(net)

    @torch.compile(backend="aot_eager")
    def train_step(x, image):
        optimizer.zero_grad()
        net(x, image).backward()
        optimizer.step()

    for step in range(3):
        train_step(*low_memory.batch(step))
    close(weights(net), low_memory.trained(range(3)), **ROUNDING[low_memory.dtype])
