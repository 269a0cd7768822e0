"""Laws of the worlds: simulated data parallel is the full batch; simulated time is exactly predictable."""

import time

import pytest
import torch
from torch import nn

from hardy.distributed import costs
from hardy.distributed.comm import Alone
from hardy.distributed.config import ClusterConfig
from hardy.distributed.simulation import SimWorld
from hardy.distributed.strategy import Synchronous
from hardy.rng import generator_for

BATCH = 12


def data(step):
    draw = generator_for(0, "data", step)
    return (torch.randn(BATCH, cols, generator=draw, dtype=torch.float64) for cols in (5, 2))


def train(comm, *, num_steps=10, make_optimizer=torch.optim.AdamW):
    """Train on this worker's rows of each batch; return the losses of the whole batch and the weights."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            draw = generator_for(0, "weights", number)
            param.copy_(torch.randn(param.shape, generator=draw, dtype=torch.float64) / 3)
    optimizer = make_optimizer(model.parameters(), lr=0.05)
    strategy, losses = Synchronous(model, comm), []
    for step in range(num_steps):
        inputs, targets = data(step)
        rows = slice(comm.rank, None, comm.size)
        loss = (model(inputs[rows]) - targets[rows]).square().sum()
        (loss * (comm.size / BATCH)).backward()
        strategy.reduce_gradients()
        losses.append(comm.sum(loss.detach()).item() / BATCH)
        optimizer.step()
        optimizer.zero_grad()
    return losses, torch.cat([param.detach().flatten() for param in model.parameters()])


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("num_workers", [1, 3, 4])
def test_synchronous_workers_are_the_full_batch(num_workers, make_optimizer):
    want_losses, want_weights = train(Alone(), make_optimizer=make_optimizer)
    answers = SimWorld(num_workers).run(lambda comm: train(comm, make_optimizer=make_optimizer))
    for losses, weights in answers:
        assert losses == pytest.approx(want_losses, rel=1e-12)
        torch.testing.assert_close(weights, want_weights, rtol=0, atol=1e-12)
        assert torch.equal(weights, answers[0][1])
    assert want_losses[-1] < want_losses[0]


def test_a_step_with_a_straggler_takes_the_stragglers_work_and_one_collective():
    cluster = ClusterConfig(bandwidth_bytes_per_s=1e6, latency_s=0.001, slow_factors=(1.0, 1.0, 3.0))
    world = SimWorld(4, cluster=cluster)

    def body(comm):
        comm.spend(0.25)
        comm.mean(torch.zeros(1000))

    world.run(body)
    collective_s = costs.all_reduce(4000, 4).seconds(bandwidth_bytes_per_s=1e6, latency_s=0.001)
    straggler = world.report()[2]
    assert straggler.virtual_s == 0.75 + collective_s and straggler.idle_s == 0.0
    for worker in world.report()[:2] + world.report()[3:]:
        assert worker.virtual_s == straggler.virtual_s
        assert (worker.compute_s, worker.idle_s, worker.transfer_s) == (0.25, 0.5, collective_s)


def test_many_workers_cost_little_real_time():
    def body(comm):
        for _ in range(200):
            comm.sum(torch.ones(4))
        return comm.bytes_sent

    started_s = time.perf_counter()
    assert SimWorld(64).run(body) == [200 * costs.all_reduce(16, 64).bytes_sent] * 64
    assert time.perf_counter() - started_s < 5.0
