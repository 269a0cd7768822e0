"""What needs one process only; several processes are in `mp/test_sharded.py`."""

import math

import pytest
import torch
from torch import nn

from hardy.config import ConfigError
from hardy.distributed.comm import Alone
from hardy.distributed.sharded import (
    accumulating,
    averages_in_backward,
    clip_gradients,
    gather_full,
    grad_norm,
    parallelize,
    place,
)
from hardy.distributed.simulation import SimWorld

PLAIN = dict(unit_names=(), device_type="cpu", precision="fp32")


def with_gradients(*values, dtype=torch.float32):
    parameters = [nn.Parameter(torch.zeros(2, dtype=dtype)) for _ in values]
    for param, value in zip(parameters, values, strict=True):
        param.grad = None if value is None else torch.tensor(value, dtype=dtype)
    return parameters


def test_alone_and_in_simulation_the_model_stays_as_it_is():
    model = nn.Linear(2, 2)
    assert parallelize(model, Alone(), replicas=1, shards=1, **PLAIN) is model
    assert all(SimWorld(3).run(lambda comm: parallelize(model, comm, replicas=3, shards=1, **PLAIN) is model))
    assert not averages_in_backward(model)


def test_simulated_workers_cannot_share_a_model():
    with pytest.raises(ConfigError, match="strategy.mesh.shards is 2, but simulated workers cannot share"):
        SimWorld(2).run(lambda comm: parallelize(nn.Linear(2, 2), comm, replicas=1, shards=2, **PLAIN))


def test_a_mesh_of_another_size_is_refused():
    with pytest.raises(ValueError, match="a mesh of 2 x 2 does not hold 1 workers"):
        parallelize(nn.Linear(2, 2), Alone(), replicas=2, shards=2, **PLAIN)


def test_a_plain_model_accumulates_as_ever():
    model = nn.Linear(1, 1)
    for last in (False, True):
        with accumulating(model, last=last):
            model(torch.ones(1)).sum().backward()
    assert model.weight.grad.item() == 2.0


def test_place_and_gather_of_a_plain_parameter():
    param = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    full = torch.arange(6.0).reshape(2, 3)
    place(param, full)
    assert torch.equal(gather_full(param), full.bfloat16()) and not gather_full(param).requires_grad
    assert param.requires_grad


def test_the_norm_covers_all_gradients_and_skips_missing_ones():
    norm = grad_norm(with_gradients([3.0, 0.0], None, [0.0, 4.0]))
    assert (norm.item(), norm.shape, norm.dtype) == (5.0, (), torch.float64)
    assert grad_norm(with_gradients(None)).item() == 0.0


def test_the_norm_of_narrow_gradients_is_added_up_in_fp32():
    param = nn.Parameter(torch.zeros(10_000, dtype=torch.bfloat16))
    param.grad = torch.full_like(param, 0.125)
    mixed = [param, *with_gradients([3.0, 4.0], dtype=torch.float64)]
    assert grad_norm(mixed).item() == pytest.approx(math.sqrt(10_000 / 64 + 25), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_norm_shows_what_is_not_finite(bad):
    assert not math.isfinite(grad_norm(with_gradients([1.0, bad], [1.0, 1.0])).item())


def test_scaling_acts_on_every_gradient_in_place():
    parameters = with_gradients([2.0, 4.0], None, [6.0, 8.0])
    before = [param.grad for param in parameters]
    clip_gradients(parameters, norm=torch.tensor(2.0, dtype=torch.float64), clip_norm=1.0 + 5e-7)  # times 0.5
    assert parameters[0].grad is before[0] and parameters[0].grad.dtype == torch.float32
    assert [p.grad.tolist() for p in (parameters[0], parameters[2])] == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(("clip_norm", "left"), [(1.0, 1.0), (10.0, 5.0)])
def test_clipping_leaves_at_most_the_limit(clip_norm, left):
    parameters = with_gradients([3.0, 0.0], [0.0, 4.0])
    assert grad_norm(parameters).item() == 5.0
    clip_gradients(parameters, norm=grad_norm(parameters), clip_norm=clip_norm)
    assert grad_norm(parameters).item() == pytest.approx(left, rel=1e-6)


def test_clipping_is_what_torch_does():
    draws = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = (with_gradients(*draws[0].tolist(), dtype=torch.float64) for _ in range(2))
    norm = grad_norm(ours)
    clip_gradients(ours, norm=norm, clip_norm=0.7)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, 0.7), rtol=1e-14, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-14, atol=0)
