"""The simulated world: values, times, determinism. What all worlds promise is in `contracts`."""

import pytest
import torch
from torch import nn

from hardy.distributed import costs
from hardy.distributed.config import ClusterConfig
from hardy.distributed.simulation import SimWorld
from hardy.distributed.turns import CollectiveMismatchError
from hardy.rng import generator_for

SLOW_NET = ClusterConfig(bandwidth_bytes_per_s=1e6, latency_s=0.01)


def noise(comm, step=0, size=1000):
    return torch.randn(size, generator=generator_for(0, "noise", comm.rank, step))


def test_values_are_added_in_rank_order_bit_for_bit():
    values = [torch.randn(1000, generator=generator_for(0, "noise", rank, 0)) for rank in range(7)]
    want = values[0].clone()
    for value in values[1:]:
        want += value
    for got in SimWorld(7).run(lambda comm: comm.sum(noise(comm))):
        assert torch.equal(got, want)
    for got in SimWorld(7).run(lambda comm: comm.mean(noise(comm))):
        assert torch.equal(got, want / 7)


def test_the_same_run_again_gives_the_same_bits_and_times():
    cluster = ClusterConfig(bandwidth_bytes_per_s=1e6, latency_s=0.01, variation_sigma=0.5)

    def body(comm):
        x = noise(comm)
        for _ in range(5):
            comm.spend(1.0)
            x = x + comm.mean(x)
        return x

    worlds = [SimWorld(5, cluster=cluster, seed=3) for _ in range(2)]
    first, second = [world.run(body) for world in worlds]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert worlds[0].report() == worlds[1].report()
    again = worlds[0].run(body)
    assert torch.equal(again[0], first[0]) and worlds[0].report() == worlds[1].report()
    other = SimWorld(5, cluster=cluster, seed=4)
    other.run(body)
    assert other.report() != worlds[0].report()


def test_nothing_is_drawn_from_the_global_generator():
    before = torch.get_rng_state()
    SimWorld(3, cluster=ClusterConfig(variation_sigma=0.5)).run(lambda comm: comm.spend(1.0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("call", "traffic"),
    [
        (lambda comm, x: comm.sum(x), costs.all_reduce(4000, 4)),
        (lambda comm, x: comm.mean(x), costs.all_reduce(4000, 4)),
        (lambda comm, x: comm.all_gather(x), costs.all_gather(4000, 4)),
        (lambda comm, x: comm.broadcast(x, source=2), costs.broadcast(4000, 4)),
        (lambda comm, x: comm.barrier(), costs.barrier(4)),
    ],
    ids=["sum", "mean", "all_gather", "broadcast", "barrier"],
)
def test_each_collective_takes_what_its_ring_takes(call, traffic):
    world = SimWorld(4, cluster=SLOW_NET)
    world.run(lambda comm: call(comm, noise(comm)))
    for worker in world.report():
        assert worker.virtual_s == worker.transfer_s == traffic.bytes_sent / 1e6 + traffic.hops * 0.01
        assert worker.bytes_sent == traffic.bytes_sent and worker.idle_s == 0.0


def test_the_report_adds_up():
    cluster = ClusterConfig(
        bandwidth_bytes_per_s=1e6, latency_s=0.01, slow_factors=(1.0, 2.5), variation_sigma=0.2
    )
    world = SimWorld(4, cluster=cluster)

    def body(comm):
        for _ in range(6):
            comm.spend(0.5)
            comm.clock.sleep(0.1 * comm.rank)
            comm.mean(noise(comm))
        return comm.clock.now()

    ends_s = world.run(body)
    for worker, end_s in zip(world.report(), ends_s, strict=True):
        assert worker.virtual_s == end_s == ends_s[0]
        assert worker.compute_s + worker.transfer_s + worker.idle_s == pytest.approx(end_s, rel=1e-12)


def test_before_a_run_there_is_nothing_to_report():
    assert SimWorld(2).report() == []


def test_sleepers_let_others_catch_up():
    order = []

    def body(comm):
        for _ in range(3):
            order.append((comm.clock.now(), comm.rank))
            comm.clock.sleep(1.0 + comm.rank)

    SimWorld(3).run(body)
    assert order == sorted(order)


def test_each_worker_trains_its_own_model_with_autograd():
    def body(comm):
        model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(model.weight, float(comm.rank))
        for _ in range(3):
            loss = (model(torch.ones(1, 3, dtype=torch.float64)) - 1).square().sum()
            (grad,) = torch.autograd.grad(loss, [model.weight])
            comm.barrier()
            with torch.no_grad():
                model.weight -= 0.1 * grad
        return model.weight.detach()

    for rank, weight in enumerate(SimWorld(4).run(body)):
        want = float(rank)
        for _ in range(3):
            want -= 0.1 * 2 * (3 * want - 1)
        torch.testing.assert_close(weight, torch.full((1, 3), want, dtype=torch.float64))


@pytest.mark.parametrize(
    ("odd_call", "text"),
    [
        (
            lambda comm: comm.sum(torch.ones(3)),
            r"rank 0, 2: sum of float32\[2\] on cpu\n  rank 1: sum of float32\[3\]",
        ),
        (lambda comm: comm.sum(torch.ones(2).double()), r"rank 1: sum of float64\[2\] on cpu"),
        (lambda comm: comm.mean(torch.ones(2)), r"rank 1: mean of float32\[2\] on cpu"),
        (lambda comm: comm.broadcast(torch.ones(2), source=1), r"rank 1: broadcast from 1 of float32\[2\]"),
        (lambda comm: comm.barrier(), r"rank 1: barrier"),
        (lambda comm: None, r"rank 1: has ended"),
    ],
    ids=["shape", "dtype", "method", "source", "barrier", "ended"],
)
def test_calls_that_do_not_match_are_named(odd_call, text):
    def body(comm):
        return odd_call(comm) if comm.rank == 1 else comm.sum(torch.ones(2))

    with pytest.raises(CollectiveMismatchError, match=text):
        SimWorld(3).run(body)


def test_a_world_works_again_after_a_failure():
    world = SimWorld(2)

    def fail(comm):
        raise RuntimeError("once")

    with pytest.raises(RuntimeError, match="once"):
        world.run(fail)
    assert world.run(lambda comm: comm.sum(torch.ones(())).item()) == [2.0, 2.0]


def test_impossible_worlds_are_refused():
    with pytest.raises(ValueError, match="at least one worker, got 0"):
        SimWorld(0)
    with pytest.raises(ValueError, match="cluster.slow_factors lists 3 workers, but the world has 2"):
        SimWorld(2, cluster=ClusterConfig(slow_factors=(1.0, 2.0, 3.0)))
