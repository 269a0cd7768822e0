"""What a worker sends: gradients as they are, momentum, zeros for what has none."""

import math

import torch
from torch import nn

from hardy.distributed.comm import Alone
from hardy.distributed.robust.sender import Sender
from hardy.distributed.robust.trusted import TrustedGradient


def model_with_gradients(value=1.0):
    model = nn.Linear(2, 1)
    model.weight.grad = torch.full_like(model.weight, value)
    return model


def test_without_momentum_it_sends_the_gradients_themselves_and_zeros_for_none():
    model = model_with_gradients()
    grads, sent, trusted = Sender(model, inner=Alone()).prepare(0)
    assert trusted is None and sent is grads
    assert grads[0].data_ptr() == model.weight.grad.data_ptr() and grads[1].tolist() == [0.0]


def test_momentum_leaves_the_gradients_alone():
    model = model_with_gradients(4.0)
    sender = Sender(model, inner=Alone(), momentum=0.75)
    first, second = sender.prepare(0), sender.prepare(1)
    assert [part.flatten()[0].item() for part in (first.sent[0], second.sent[0])] == [1.0, 1.75]
    assert model.weight.grad.flatten().tolist() == [4.0, 4.0]


def test_a_gradient_that_is_not_finite_is_sent_so_and_not_remembered():
    model = model_with_gradients(4.0)
    sender = Sender(model, inner=Alone(), momentum=0.75)
    sender.prepare(0)
    model.weight.grad = torch.tensor([[math.inf, 1.0]])
    assert not any(part.isfinite().any() for part in sender.prepare(1).sent)
    model.weight.grad = torch.full_like(model.weight, 4.0)
    assert sender.prepare(2).sent[0].flatten().tolist() == [1.75, 1.75]


def test_bf16_gradients_are_sent_in_bf16_and_remembered_in_fp32():
    model = model_with_gradients().to(torch.bfloat16)
    model.weight.grad = torch.full_like(model.weight, 1.0)
    sender = Sender(model, inner=Alone(), momentum=0.999)
    for step in range(3):
        sent = sender.prepare(step).sent
    state = sender.state()
    assert sent[0].dtype == torch.bfloat16 and state["momentum/weight"].dtype == torch.float32
    torch.testing.assert_close(state["momentum/weight"][0, 0], torch.tensor(1 - 0.999**3))


def test_state_comes_back():
    model = model_with_gradients()
    draw = lambda number: model(torch.ones(1, 2)).sum().backward()  # noqa: E731
    make = lambda: Sender(  # noqa: E731
        model,
        inner=Alone(),
        momentum=0.5,
        trusted=TrustedGradient(list(model.parameters()), draw, every_steps=3),
    )
    one, other = make(), make()
    one.prepare(0)
    saved = {key: value.clone() for key, value in one.state().items()}
    other.load(saved)
    assert {key: value.tolist() for key, value in other.state().items()} == {
        "momentum/weight": [[0.5, 0.5]],
        "momentum/bias": [0.0],
        "trusted/weight": [[1.0, 1.0]],
        "trusted/bias": [1.0],
    }
