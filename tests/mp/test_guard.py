"""The guard on real processes: shards count once, one bad element stops all, every layout clips alike."""

import math

import pytest
import torch
from torch import nn

from hardy.distributed.comm import Alone
from hardy.distributed.sharded import gather_full, grad_norm, parallelize, place
from hardy.distributed.strategy import Synchronous
from hardy.ops.packed import DocumentLayout, PackedBatch
from hardy.optim.config import GuardConfig
from hardy.optim.gradients import tensor_norms
from hardy.optim.guard import GradGuard
from hardy.rng import generator_for
from hardy.train.step import Worker, train_step

pytestmark = pytest.mark.mp

VOCABULARY, WIDTH = 11, 5  # nothing divisible by two: uneven shards, and an empty one of the scale
STEPS = 6
LAYOUTS = pytest.mark.parametrize(
    ("replicas", "shards"), [(2, 1), (1, 2), (1, 3), (2, 2)], ids=["ddp", "fsdp-2", "fsdp-3", "hsdp"]
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.map = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.map(self.scale * x))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block()])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens_T, layout, labels_T):
        return nn.functional.cross_entropy(
            self.head(self.blocks[0](self.embedding(tokens_T))), labels_T, reduction="sum"
        )


def build(comm, *, replicas, shards):
    model = Toy().double()
    for name, parameter in model.named_parameters():
        place(parameter, torch.randn(parameter.shape, generator=generator_for(0, name), dtype=torch.float64))
    return parallelize(
        model,
        comm,
        replicas=replicas,
        shards=shards,
        unit_names=["blocks.0"],
        device_type="cpu",
        precision="fp32",
    )


def batch_of(step, comm):
    """This worker's part of twelve tokens; every third batch is one token repeated, a steep one."""
    draw = generator_for(1, step)
    tokens = torch.randint(VOCABULARY, (2, 12), generator=draw) if step % 3 else torch.full((2, 12), 4)
    mine = tokens[:, comm.rank :: comm.size]
    length = mine.shape[1]
    layout = DocumentLayout.from_lengths([length])
    return PackedBatch(tokens_T=mine[0], labels_T=mine[1], layout=layout, num_targets=length)


def worker_of(comm, model, *, history="tensor"):
    parameters = list(model.parameters())
    config = GuardConfig(history=history, history_warmup_steps=1, history_factor=1.0)
    return Worker(
        model=model,
        optimizer=torch.optim.SGD(parameters, lr=0.1),
        strategy=Synchronous(model, comm),
        comm=comm,
        device=torch.device("cpu"),
        guard=GradGuard(config, max_norm=0.9, num_tensors=len(parameters)),
    )


def train(comm, *, replicas=1, shards=1, history):
    model = build(comm, replicas=replicas, shards=shards)
    worker = worker_of(comm, model, history=history)
    results = [
        train_step(worker, [batch_of(step, comm)], num_targets=12, lr=0.1, wants_stop=False)
        for step in range(STEPS)
    ]
    averages = [value for key, value in worker.guard.state_dict().items() if key.startswith("average")]
    numbers = [(r.grad_norm, r.clipped, r.applied) for r in results]
    return numbers, averages, torch.cat([gather_full(p).flatten() for p in model.parameters()])


@pytest.mark.parametrize("history", ["global", "tensor"])
@LAYOUTS
def test_every_layout_clips_alike(run_workers, replicas, shards, history):
    numbers, averages, weights = train(Alone(), history=history)
    assert sum(clipped for _, clipped, _ in numbers) > 2

    def body(comm):
        return train(comm, replicas=replicas, shards=shards, history=history)

    for got_numbers, got_averages, got_weights in run_workers(body, size=replicas * shards):
        assert [n[1:] for n in got_numbers] == [n[1:] for n in numbers]
        assert [n[0] for n in got_numbers] == pytest.approx([n[0] for n in numbers], rel=1e-10)
        torch.testing.assert_close(got_averages, averages, rtol=1e-10, atol=0)
        torch.testing.assert_close(got_weights, weights, rtol=0, atol=1e-10)


def backward(comm, model):
    batch = batch_of(1, comm)
    (model(batch.tokens_T, batch.layout, batch.labels_T) * (comm.size / 12)).backward()


@LAYOUTS
def test_norms_of_shards_are_the_norms_of_the_whole(run_workers, replicas, shards):
    def body(comm, replicas=replicas, shards=shards):
        model = build(comm, replicas=replicas, shards=shards)
        backward(comm, model)
        parameters = list(model.parameters())
        return tensor_norms(parameters), grad_norm(parameters)

    norms, norm = body(Alone(), replicas=1, shards=1)
    torch.testing.assert_close(torch.linalg.vector_norm(norms), norm, rtol=1e-14, atol=0)
    for got, got_norm in run_workers(body, size=replicas * shards):
        torch.testing.assert_close(got, norms, rtol=1e-12, atol=0)
        torch.testing.assert_close(got_norm, norm, rtol=1e-12, atol=0)


@pytest.mark.parametrize("history", ["global", "tensor"])
def test_one_bad_element_of_one_shard_leaves_the_step_out_everywhere(run_workers, history):
    class Broken(Synchronous):
        """A machine whose memory fails after the gradients were reduced."""

        def reduce_gradients(self):
            super().reduce_gradients()
            if self.comm.rank == 1:
                self.model.head.weight.grad.to_local()[0, 0] = math.nan

    def body(comm):
        model = build(comm, replicas=1, shards=2)
        worker = worker_of(comm, model, history=history)
        train_step(worker, [batch_of(1, comm)], num_targets=12, lr=0.1, wants_stop=False)
        before = torch.cat([gather_full(p).flatten() for p in model.parameters()])
        kept = [v.clone() for k, v in worker.guard.state_dict().items() if k.startswith(("average", "count"))]
        worker.strategy = Broken(model, comm)
        worker.strategy.model, worker.strategy.comm = model, comm
        result = train_step(worker, [batch_of(2, comm)], num_targets=12, lr=0.1, wants_stop=False)
        now = [v for k, v in worker.guard.state_dict().items() if k.startswith(("average", "count"))]
        same = torch.equal(before, torch.cat([gather_full(p).flatten() for p in model.parameters()]))
        same = same and all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
        return result.applied, result.left_out_for, same, worker.guard.check().n_skipped

    wanted = (False, "NaN or Inf in the gradient of head.weight on worker 1", True, 1)
    assert run_workers(body) == [wanted] * 2
