"""The guard on CUDA: no step waits for the device, and a CUDA graph can hold it with the optimizer."""

import pytest
import torch
from torch import nn

from hardy.optim.config import GuardConfig
from hardy.optim.gradients import tensor_norms
from hardy.optim.guard import GradGuard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]


def problem(history, device="cuda"):
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(64, 32, generator=generator).to(device)) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    config = GuardConfig(history=history, history_warmup_steps=2)
    guard = GradGuard(config, max_norm=1.0, num_tensors=3, device=device)
    capturable = device == "cuda"
    return weights, guard, torch.optim.AdamW(weights, lr=0.1, fused=True, capturable=capturable)


def step(weights, guard, optimizer):
    norms = tensor_norms(weights)
    verdict = guard.update(norms if guard.history == "tensor" else torch.linalg.vector_norm(norms))
    optimizer.grad_scale, optimizer.found_inf = verdict.grad_scale, verdict.found_inf
    optimizer.step()


def gradients(index):
    generator = torch.Generator().manual_seed(100 + index)
    grads = [torch.randn(64, 32, generator=generator).cuda() for _ in range(3)]
    if index == 4:
        grads[1][0, 0] = torch.nan
    return grads


def load(weights, index):
    for weight, grad in zip(weights, gradients(index), strict=True):
        weight.grad.copy_(grad)


@pytest.mark.parametrize("history", ["global", "zscore", "tensor"])
def test_no_step_waits_for_the_device(history):
    weights, guard, optimizer = problem(history)
    other_weights, other, other_optimizer = problem(history, "cpu")
    for index in range(6):
        load(weights, index)
        load(other_weights, index)
        if index:  # torch's optimizer makes its state in the first
            torch.cuda.set_sync_debug_mode("error")
        try:
            step(weights, guard, optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        step(other_weights, other, other_optimizer)
    assert guard.check() == other.check() and guard.check().n_skipped == 1


@pytest.mark.parametrize("history", ["global", "zscore", "tensor"])
def test_a_captured_graph_does_what_the_calls_do(history):
    weights, guard, optimizer = problem(history)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(weights, guard, optimizer)  # zero gradients: builds the optimizer's state, teaches nothing
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(weights, guard, optimizer)
    plain, other, theirs = problem(history)
    for _ in range(2):
        step(plain, other, theirs)
    for index in range(8):
        load(weights, index)
        graph.replay()
        load(plain, index)
        step(plain, other, theirs)
    assert other.check().n_skipped == guard.check().n_skipped == 1
    for ours, wanted in zip(weights, plain, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
