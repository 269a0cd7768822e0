"""Norms, faults and scaling of lists of gradients; sharded ones are in tests/mp/test_guard.py."""

import math

import pytest
import torch
from torch import nn

from hardy.optim.gradients import nonfinite_flags, scale_gradients, takes_grad_scale, tensor_norms


def with_gradients(*gradients, dtype=torch.float32):
    parameters = []
    for gradient in gradients:
        parameters.append(nn.Parameter(torch.zeros(1 if gradient is None else len(gradient), dtype=dtype)))
        parameters[-1].grad = None if gradient is None else torch.tensor(gradient, dtype=dtype)
    return parameters


def test_each_norm_stands_at_its_place_and_a_missing_gradient_is_zero():
    norms = tensor_norms(with_gradients([3.0, 4.0], None, [0.0], [-2.0]))
    assert norms.tolist() == [5.0, 0.0, 0.0, 2.0]
    assert norms.dtype == torch.float64


def test_narrow_gradients_are_added_up_in_single_precision():
    gradient = torch.full((100_000,), 1 / 256, dtype=torch.bfloat16)
    parameter = nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient
    assert tensor_norms([parameter]).item() == pytest.approx(math.sqrt(100_000) / 256, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_element_is_found_and_spoils_its_norm_alone(bad):
    parameters = with_gradients([1.0, 1.0], [1.0, bad])
    assert nonfinite_flags([p.grad for p in parameters]).tolist() == [False, True]
    assert tensor_norms(parameters).isfinite().tolist() == [True, False]


def test_no_gradients_at_all_is_no_fault():
    assert nonfinite_flags([]).tolist() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scaling_by_one_factor_or_by_each_ones_own(dtype):
    parameters = with_gradients([2.0, 4.0], None, [8.0], dtype=dtype)
    kept = parameters[0].grad
    scale_gradients(parameters, torch.tensor(0.5, dtype=torch.float64))
    assert [p.grad.tolist() for p in parameters if p.grad is not None] == [[1.0, 2.0], [4.0]]
    scale_gradients(parameters, torch.tensor([1.0, 7.0, 0.25], dtype=torch.float64))
    assert [p.grad.tolist() for p in parameters if p.grad is not None] == [[1.0, 2.0], [1.0]]
    assert parameters[0].grad is kept and kept.dtype == dtype


def test_an_optimizer_says_by_its_signature_that_it_scales():
    class Scaling(torch.optim.SGD):
        def step(self, closure=None, *, grad_scale=None, found_inf=None):
            return super().step(closure)

    parameters = with_gradients([1.0])
    assert takes_grad_scale(Scaling(parameters, lr=0.1))
    assert not takes_grad_scale(torch.optim.SGD(parameters, lr=0.1))
    assert not takes_grad_scale(torch.optim.AdamW(parameters, fused=True))  # by attributes, and it overwrites
