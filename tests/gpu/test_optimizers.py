"""Whole optimizers on CUDA: as on the CPU, without waits, within their memory, with sweeps that are kept."""

import pytest
import torch
from torch import nn

from hardy.optim import _rule
from hardy.optim.optimizers import APOLLO, SMMF, AdaptiveAdamW, APOLLOMini

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
SHAPES = [(64, 32), (32, 96), (64, 32), (33, 57), (40, 40)]
MAKERS = {
    "adamw": lambda named: AdaptiveAdamW(named, lr=0.01),
    "apollo": lambda named: APOLLO(named, lr=0.01, rank=8, update_proj_gap=3),
    "apollo-svd": lambda named: APOLLO(named, lr=0.01, rank=8, proj="svd", update_proj_gap=3),
    "mini": lambda named: APOLLOMini(named, lr=0.01),
    "smmf": lambda named: SMMF(named, lr=0.01),
}


def weights(device, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [(f"w{i}", nn.Parameter(x.to(device, dtype))) for i, x in enumerate(drawn)]


def give_gradients(named, step):
    generator = torch.Generator().manual_seed(100 + step)
    for _, param in named:
        grad = torch.randn(param.shape, generator=generator).to(param)
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.copy_(grad)


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_is_that_of_the_cpu(name):
    ours, theirs = weights("cuda"), weights("cpu")
    optimizers = MAKERS[name](ours), MAKERS[name](theirs)
    for step in range(7):
        for named, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(named, step)
            optimizer.step()
    for (_, mine), (_, other) in zip(ours, theirs, strict=True):
        assert (mine.cpu() - other).abs().max() < 2e-5 * other.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in MAKERS if name != "apollo-svd"])
def test_no_step_waits_for_the_device_and_gradients_may_move(name, dtype):
    named = weights("cuda", dtype)
    optimizer = MAKERS[name](named)
    give_gradients(named, 0)
    optimizer.step()
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        for _, param in named:
            param.grad = param.grad * 1.0
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["adamw", "apollo", "mini", "smmf"])
def test_sweeps_are_described_once(name, monkeypatch):
    described = []
    sweep = _rule.Bundle.sweep

    def watched(self, name, *buffers, tasks, epoch=0):
        def seen():
            described.append(name)
            return tasks()

        sweep(self, name, *buffers, tasks=seen, epoch=epoch)

    monkeypatch.setattr(_rule.Bundle, "sweep", watched)
    named = weights("cuda", torch.bfloat16)
    optimizer = MAKERS[name](named)
    counts = []
    for step in range(4):
        for _, param in named:
            param.grad = None
        room = torch.empty(1000 * step, device="cuda")  # so that gradients lie elsewhere
        give_gradients(named, step)
        del room
        optimizer.param_groups[0]["calls"] = 0
        described.clear()
        optimizer.step()
        counts.append(len(described))
    assert counts[0] > 0 and not any(counts[1:])


@pytest.mark.parametrize("name", ["adamw", "apollo", "mini", "smmf"])
def test_a_captured_step_does_what_a_call_does(name):
    ours, theirs = weights("cuda", torch.bfloat16), weights("cuda", torch.bfloat16)
    mine, other = MAKERS[name](ours), MAKERS[name](theirs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(2):
            give_gradients(ours, step)
            mine.step()
    torch.cuda.current_stream().wait_stream(side)
    for step in range(2):
        give_gradients(theirs, step)
        other.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine.step()
    mine.param_groups[0]["calls"] -= 1
    for step in range(2, 5):
        other.param_groups[0]["calls"] = 2  # a graph keeps the projections it was captured with
        give_gradients(ours, step)
        give_gradients(theirs, step)
        graph.replay()
        other.step()
    for (_, param), (_, wanted) in zip(ours, theirs, strict=True):
        assert torch.equal(param, wanted)


@pytest.mark.parametrize("name", ["adamw", "apollo", "mini", "smmf"])
def test_temporaries_of_a_step_stay_below_64_mib(name):
    shapes = [(4096, 4096)] * 6 + [(32000, 1024)]
    named = weights("cuda", torch.bfloat16, shapes)
    maker = (lambda named: APOLLO(named, lr=0.01, rank=256)) if name == "apollo" else MAKERS[name]
    optimizer = maker(named)
    give_gradients(named, 0)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before <= 64 << 20
