"""Q-APOLLO: APOLLO's step on weights stored in int8, with every promise that APOLLO keeps."""

import copy
import io
import logging
import math

import pytest
import torch
from torch import nn

from hardy.ops.philox import key_for
from hardy.ops.quantize import dequantize, quantize, whole
from hardy.ops.updates import Rounding
from hardy.optim.int8 import dequantize_model, quantize_model
from hardy.optim.int8_linear import Int8Linear, VirtualWeight
from hardy.optim.optimizers import APOLLO, MINI_SCALE, QAPOLLO
from hardy.optim.state_bytes import state_bytes

GROUP = 16
SETTINGS = [
    pytest.param({"rank": 4}, id="channel"),
    pytest.param({"rank": 1, "scale_type": "tensor"}, id="mini"),
    pytest.param({"rank": 4, "proj": "rademacher", "limiter": "corrected", "weight_decay": 0.1}, id="decay"),
]


class Net(nn.Module):
    """A wide and two tall matrices in int8 with a short last group, and a norm and biases beside them."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(40, 24)
        self.norm = nn.LayerNorm(24)
        self.down = nn.Linear(24, 40, bias=False)
        self.more = nn.Linear(24, 40, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for param in (self.up.weight, self.up.bias, self.down.weight, self.more.weight):
                param.copy_(0.2 * torch.randn(param.shape, generator=generator))

    def forward(self, x):
        hidden = torch.tanh(self.norm(self.up(x)))
        return self.down(hidden) + self.more(hidden.square())


def int8_net(dtype=torch.float32):
    net = Net().to(dtype)
    quantize_model(net, group=GROUP)
    return net


def groups(net):
    """Matrices by the optimizer's own rule, the rest by AdamW."""
    named = list(net.named_parameters())
    return [
        {"params": [(name, p) for name, p in named if p.ndim == 2]},
        {"params": [(name, p) for name, p in named if p.ndim < 2], "kind": "adamw"},
    ]


def make(net, cls=QAPOLLO, **settings):
    return cls(groups(net), **{"lr": 0.02, **settings})


def backward(net, step):
    generator = torch.Generator().manual_seed(100 + step % 4)
    x = torch.randn(16, 40, generator=generator).to(next(net.parameters()).dtype)
    loss = (net(x).float() - 0.3 * x.float()).square().mean()
    loss.backward()
    return loss.item()


def train(net, optimizer, steps):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        losses.append(backward(net, step))
        optimizer.step()
    return losses


def stored(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def state_of(optimizer):
    return [
        {key: value.clone() for key, value in optimizer.state[param].items()}
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def equal(a, b):
    if isinstance(a, list):
        return all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# ---- The step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_is_that_of_apollo_on_the_dequantized_weights_within_one_quantization_step(settings):
    net = int8_net()
    dense = copy.deepcopy(net)
    dequantize_model(dense)
    alpha = {"scale": MINI_SCALE} if settings["rank"] == 1 else {}
    optimizer, twin = make(net, **settings), make(dense, APOLLO, **settings, **alpha)
    train(net, optimizer, range(1))
    train(dense, twin, range(1))
    for name in ("up", "down", "more"):
        layer, weight = getattr(net, name), getattr(dense, name).weight.detach()
        scale = layer.scale.repeat_interleave(GROUP, 1)[:, : layer.in_features]
        off = (dequantize(layer.matrix(), dtype=torch.float32) - weight) / scale
        assert off.abs().max() < 1.001
        assert off.abs().mean() > 0.05, "stochastic rounding leaves its mark"
        key = key_for(0, f"{name}.weight", purpose="hardy.q8.v1")
        how = Rounding(mode="stochastic", key=key, step=torch.tensor(1), place=whole(weight.shape))
        same = quantize(weight, group=GROUP, rounding=how).q == layer.q
        assert same.float().mean() > 0.99, "its bits follow name and step; a last bit may turn a code"
    # Gradients of the first step are equal bits, so everything but the int8 weights is.
    assert equal(state_of(optimizer), state_of(twin))
    assert torch.equal(net.norm.weight, dense.norm.weight) and torch.equal(net.up.bias, dense.up.bias)


@pytest.mark.parametrize("settings", SETTINGS)
def test_training_falls_as_far_as_with_dense_weights(settings):
    net, dense = int8_net(), Net()
    alpha = {"scale": MINI_SCALE} if settings["rank"] == 1 else {}
    losses = train(net, make(net, lr=0.01, **settings), range(60))
    of_dense = train(dense, make(dense, APOLLO, lr=0.01, **settings, **alpha), range(60))
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    assert sum(losses[-4:]) == pytest.approx(sum(of_dense[-4:]), rel=0.05)


def test_rounding_to_nearest_loses_small_steps():
    def steps_walked(mode):
        """Return how far the codes walked from the zero point, which itself may move by one."""
        net = int8_net()
        matrices = []
        for _ in range(2):
            matrix = net.up.matrix()
            zero = matrix.zero_point.int().repeat_interleave(GROUP, 1)[:, : net.up.in_features]
            matrices.append(matrix.q.int() - zero)
            train(net, make(net, lr=1e-5, rank=4, bf16_update=mode), range(5))
        return (matrices[1] - matrices[0]).abs().sum().item()

    assert steps_walked("nearest") == 0 < steps_walked("stochastic")


def test_replicas_are_equal_whatever_else_is_random():
    nets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        nets.append(int8_net())
        train(nets[-1], make(nets[-1], rank=4), range(4))
    assert equal(stored(nets[0]), stored(nets[1]))
    other = int8_net()
    train(other, make(other, rank=4, seed=1), range(4))
    assert not torch.equal(other.up.q, nets[0].up.q)


def test_gradients_are_only_read():
    net = int8_net()
    optimizer = make(net, rank=4)
    backward(net, 0)
    before = [p.grad.clone() for p in net.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True))


def test_bf16_modules_have_bf16_gradients_and_fp32_state():
    net = int8_net(torch.bfloat16)
    optimizer = make(net, rank=4)
    losses = train(net, optimizer, range(30))
    assert net.up.weight.grad.dtype == torch.bfloat16 and losses[-1] < losses[0]
    state = optimizer.state[net.up.weight]
    assert state["exp_avg"].dtype == torch.float32 and "rest" not in state


@pytest.mark.parametrize("settings", SETTINGS)
def test_state_is_that_of_apollo(settings):
    net = int8_net()
    optimizer = make(net, **settings)
    train(net, optimizer, range(1))
    for layer in (net.up, net.down, net.more):
        held = sum(value.nbytes for value in optimizer.state[layer.weight].values())
        assert held == state_bytes("apollo", (layer.out_features, layer.in_features), settings=settings)


# ---- Steps that must not happen ----------------------------------------------------------------------------


def test_a_zero_gradient_at_rate_zero_makes_the_state_and_changes_nothing():
    net = int8_net()
    optimizer = make(net, rank=4)
    before = stored(net)
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert equal(before, stored(net)) and optimizer.state[net.up.weight]["step"] == 0
    assert [group["calls"] for group in optimizer.param_groups] == [0, 0]
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    other = int8_net()
    assert train(net, optimizer, range(3)) == train(other, make(other, rank=4), range(3))
    assert equal(stored(net), stored(other))


@pytest.mark.parametrize("fault", [0.0, math.nan, math.inf])
def test_a_gradient_of_zero_or_nan_leaves_the_weight_and_its_state_alone(fault):
    net = int8_net()
    optimizer = make(net, rank=4, weight_decay=0.1)
    train(net, optimizer, range(2))
    optimizer.zero_grad()
    backward(net, 2)
    if fault == 0:
        net.up.weight.grad.zero_()
    else:
        net.up.weight.grad[3, 5] = fault
    before, state = stored(net), {k: v.clone() for k, v in optimizer.state[net.up.weight].items()}
    optimizer.step()
    after = stored(net)
    assert all(torch.equal(before[f"up.{key}"], after[f"up.{key}"]) for key in ("q", "scale", "zero_point"))
    assert equal(state, optimizer.state[net.up.weight])
    assert not torch.equal(before["down.q"], after["down.q"]) and net.down.scale.isfinite().all()


def test_found_inf_changes_nothing_and_grad_scale_divides():
    net, scaled = int8_net(), int8_net()
    optimizer, other = make(net, rank=4), make(scaled, rank=4)
    for step in range(3):
        for model, opt in ((net, optimizer), (scaled, other)):
            opt.zero_grad()
            backward(model, step)
        for param in scaled.parameters():
            param.grad.mul_(1024.0)
        before = stored(scaled)
        other.step(found_inf=torch.ones(()), grad_scale=torch.tensor(1024.0))
        assert equal(before, stored(scaled))
        for group in other.param_groups:
            group["calls"] -= 1  # a step that was left out counts as a call
        other.step(grad_scale=torch.tensor(1024.0))
        optimizer.step()
    assert equal(stored(net), stored(scaled))


def test_a_missing_gradient_leaves_the_weight_alone():
    net = int8_net()
    optimizer = make(net, rank=4)
    backward(net, 0)
    net.up.weight.grad = None
    before = stored(net)
    optimizer.step()
    assert torch.equal(before["up.q"], net.up.q) and not torch.equal(before["down.q"], net.down.q)


def test_a_step_does_not_wait_for_the_device(monkeypatch):
    net = int8_net()
    optimizer = make(net, rank=4)
    train(net, optimizer, range(1))
    backward(net, 1)

    def refuse(*args, **kwargs):
        raise AssertionError("a value was read")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    optimizer.step()


# ---- Going on, release, copies -----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
def test_stopped_and_loaded_it_goes_on_bit_for_bit(settings):
    """The projection changes at call 4; the checkpoint stands before it."""
    net = int8_net()
    optimizer = make(net, update_proj_gap=4, **settings)
    train(net, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    wanted = train(net, optimizer, range(3, 8))
    saved = torch.load(file, weights_only=True)
    assert not any(isinstance(value, VirtualWeight) for value in saved["model"].values())
    other = int8_net()
    train(other, make(other, lr=0.5, **settings), range(1))  # what was there before must not matter
    other.load_state_dict(saved["model"])
    resumed = make(other, update_proj_gap=4, **settings)
    resumed.load_state_dict(saved["optimizer"])
    assert train(other, resumed, range(3, 8)) == wanted
    assert equal(stored(net), stored(other)) and equal(state_of(optimizer), state_of(resumed))


@pytest.mark.parametrize("settings", SETTINGS)
def test_released_gradients_give_the_same_bits(settings):
    net, released = int8_net(), int8_net()
    optimizer, other = make(net, **settings), make(released, **settings)
    other.enable_release(released)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(x, 0.9) for x in (optimizer, other)]
    for step in range(6):
        optimizer.zero_grad()
        assert backward(net, step) == backward(released, step)
        assert all(param.grad is None for param in released.parameters())
        optimizer.step()
        other.step()
        for schedule in schedules:
            schedule.step()
    assert equal(stored(net), stored(released)) and equal(state_of(optimizer), state_of(other))


def test_the_step_updates_inside_the_backward_pass_with_release():
    net = int8_net()
    optimizer = make(net, rank=4)
    optimizer.enable_release(net)
    before = stored(net)
    backward(net, 0)
    assert not torch.equal(before["up.q"], net.up.q)
    after = stored(net)
    optimizer.step()
    assert equal(after, stored(net))


def test_a_copy_of_model_and_optimizer_goes_on_alone():
    net = int8_net()
    optimizer = make(net, rank=4)
    train(net, optimizer, range(2))
    other, its_optimizer = copy.deepcopy((net, optimizer))
    assert train(other, its_optimizer, range(2, 5)) == train(net, optimizer, range(2, 5))
    assert equal(stored(net), stored(other)) and net.up.q.data_ptr() != other.up.q.data_ptr()


def test_a_model_cast_after_the_optimizer_was_built_goes_on():
    net = int8_net()
    optimizer = make(net, rank=4)
    train(net, optimizer, range(2))
    net.bfloat16()
    losses = train(net, optimizer, range(2, 12))
    assert net.up.weight.grad.dtype == torch.bfloat16 and losses[-1] < losses[0]


# ---- Groups, warnings, errors ------------------------------------------------------------------------------


def test_rank_one_by_tensor_is_mini():
    net = int8_net()
    assert make(net).param_groups[0]["scale"] == 1.0 and make(net).param_groups[0]["rank"] == 256
    assert make(net, rank=1, scale_type="tensor").param_groups[0]["scale"] == MINI_SCALE
    assert make(net, rank=1, scale_type="tensor", scale_squared=4.0).param_groups[0]["scale"] == 2.0


def test_int8_and_plain_matrices_share_a_group():
    net = Net()
    quantize_model(net.requires_grad_(True), vocab_size=24)  # up counts as a head and stays dense
    assert isinstance(net.down, Int8Linear) and type(net.up) is nn.Linear
    losses = train(net, make(net, lr=0.01, rank=4), range(40))
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"kind": "adamw"}, "up.weight has an int8 weight, which a 'adamw' group cannot update"),
        ({"kind": "smmf"}, "up.weight has an int8 weight, which a 'smmf' group cannot update"),
        ({"bf16_update": "kahan"}, "the int8 weight up.weight has no use"),
    ],
)
def test_groups_that_cannot_update_int8_weights_are_refused(settings, text):
    net = int8_net()
    optimizer = QAPOLLO([{"params": [("up.weight", net.up.weight)], **settings}], rank=4)
    with pytest.raises(ValueError, match=text):
        optimizer.materialize_state()


def test_a_model_that_is_not_in_int8_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        make(int8_net())
        assert not caplog.records
        make(Net())
    assert "no int8 weight, so it saves no weight memory; call hardy.optim.int8.quantize_model" in caplog.text
