"""Int8 weights under DDP: gradients are averaged like any others, and replicas keep equal bits."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hardy._compat import accepts
from hardy.optim.int8 import quantize_model
from hardy.optim.optimizers import QAPOLLO

pytestmark = pytest.mark.mp

STEPS = 5
SEND_BUFFERS = (
    "forward_sync_buffers"
    if accepts(DistributedDataParallel, "forward_sync_buffers")
    else "broadcast_buffers"
)
"""torch 2.13 renamed it."""


def make_model():
    model = nn.Sequential(nn.Linear(40, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 40, bias=False))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in (model[0].weight, model[0].bias, model[3].weight):
            param.copy_(0.2 * torch.randn(param.shape, generator=generator))
    quantize_model(model, group=16)
    return model


def fit(model, inner, x):
    named = list(inner.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim == 2]},
        {"params": [(n, p) for n, p in named if p.ndim < 2], "kind": "adamw"},
    ]
    optimizer = QAPOLLO(groups, lr=0.02, rank=4)
    losses = []
    for step in range(STEPS):
        batch = x(step)
        loss = (model(batch) - 0.3 * batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {key: value.clone() for key, value in inner.state_dict().items()}


def whole_batch(step):
    return torch.randn(16, 40, generator=torch.Generator().manual_seed(100 + step))


@pytest.mark.parametrize("sends_weights", [False, True])
def test_replicas_stay_equal_and_follow_the_run_of_one_worker(run_workers, sends_weights):
    alone, weights = fit((model := make_model()), model, whole_batch)

    def body(comm):
        torch.manual_seed(comm.rank)  # what else is random must not matter
        inner = make_model()
        model = DistributedDataParallel(inner, init_sync=False, **{SEND_BUFFERS: sends_weights})
        return fit(model, inner, lambda step: whole_batch(step)[comm.rank :: 2])

    (losses, first), (other_losses, second) = run_workers(body)
    assert first.keys() == second.keys() == weights.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    # The first gradient is that of the whole batch up to rounding, so few codes come out differently.
    mean = [(a + b) / 2 for a, b in zip(losses, other_losses, strict=True)]
    assert mean == pytest.approx(alone, rel=1e-3)
    far = (first["0.q"].int() - weights["0.q"].int()).abs()
    assert (far > 1).float().mean() < 0.01 and losses[-1] < losses[0]


def test_ddp_cannot_send_a_virtual_weight(run_workers):
    def body(comm):
        with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
            DistributedDataParallel(make_model())

    run_workers(body)
