import pytest
import torch

from hardy.ops.norm import rms_norm


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(5, 8, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    weight_D = torch.rand(8, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    return x_TD, weight_D


def test_equals_torch_and_its_gradient():
    x_TD, weight_D = inputs(torch.float64)
    expected = torch.nn.functional.rms_norm(x_TD, (8,), weight_D, 1e-6)
    torch.testing.assert_close(rms_norm(x_TD, weight_D, eps=1e-6), expected, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, eps=1e-3), (x_TD, weight_D))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_low_precision_loses_only_the_last_rounding(weight_dtype):
    x_TD, weight_D = inputs(torch.bfloat16)
    exact = torch.nn.functional.rms_norm(x_TD.double(), (8,), weight_D.double(), 1e-6)
    got = rms_norm(x_TD, weight_D.detach().to(weight_dtype).requires_grad_(), eps=1e-6)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=0)
    got.sum().backward()
    assert x_TD.grad.dtype == torch.bfloat16
    assert x_TD.grad.isfinite().all()


def test_a_token_of_zeros_stays_zero_without_nan():
    x_TD, weight_D = torch.zeros(1, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    rms_norm(x_TD, weight_D, eps=1e-6).sum().backward()
    assert x_TD.grad.isfinite().all()
