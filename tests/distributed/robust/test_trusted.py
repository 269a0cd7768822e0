"""The trusted gradient: beside the step's own, kept between steps."""

import pytest
import torch
from torch import nn

from hardy.distributed.robust.trusted import TrustedGradient


def model_and_draw():
    model, drawn = nn.Linear(2, 1, bias=True), []

    def draw(number):
        drawn.append(number)
        (model(torch.ones(1, 2)) * (number + 1)).sum().backward()

    return model, draw, drawn


def test_the_gradient_of_the_step_stays_what_it_was():
    model, draw, drawn = model_and_draw()
    model(torch.full((1, 2), 5.0)).sum().backward()
    held = [param.grad for param in model.parameters()]
    before = [grad.clone() for grad in held]
    found = TrustedGradient(list(model.parameters()), draw).at(3).parts
    assert drawn == [3] and [grad.tolist() for grad in found] == [[[4.0, 4.0]], [4.0]]
    assert all(param.grad is grad for param, grad in zip(model.parameters(), held, strict=True))
    assert all(torch.equal(grad, old) for grad, old in zip(held, before, strict=True))


def test_a_failure_gives_the_gradients_back():
    model, _, _ = model_and_draw()
    model(torch.ones(1, 2)).sum().backward()
    held = [param.grad for param in model.parameters()]

    def fail(_number):
        raise RuntimeError("no text")

    with pytest.raises(RuntimeError, match="no text"):
        TrustedGradient(list(model.parameters()), fail).at(0)
    assert all(param.grad is grad for param, grad in zip(model.parameters(), held, strict=True))


def test_one_gradient_serves_several_steps():
    model, draw, drawn = model_and_draw()
    trusted = TrustedGradient(list(model.parameters()), draw, every_steps=3)
    found = [[part.clone() for part in trusted.at(step).parts] for step in range(7)]
    assert drawn == [0, 1, 2]
    assert [step[1].item() for step in found] == [1, 1, 1, 2, 2, 2, 3]
    assert torch.equal(trusted.kept[1], found[-1][1])


def test_a_parameter_without_gradient_counts_as_zeros():
    used, unused = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2))
    trusted = TrustedGradient([used, unused], lambda number: used.sum().backward())
    assert [part.tolist() for part in trusted.at(0).parts] == [[1.0], [0.0, 0.0]]
    assert unused.grad is None
