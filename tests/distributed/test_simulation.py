"""The simulated world: values, times, determinism. What all worlds promise is in `contracts`."""

import pytest
import torch
from torch import nn

from hardy.distributed import costs
from hardy.distributed.comm import PeerLostError, WorkerLostError
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
        (lambda comm, x: comm.all_to_all(x.view(4, 250)), costs.all_to_all(4000, 4)),
    ],
    ids=["sum", "mean", "all_gather", "broadcast", "barrier", "all_to_all"],
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


# ---- Workers that die and come -----------------------------------------------------------------------------


def test_the_others_are_told_of_a_death_and_the_sum_goes_on_among_them():
    world = SimWorld(3, cluster=SLOW_NET, deaths={1: 2.5}, detect_s=0.75)

    def body(comm):
        for step in range(4):
            comm.spend(1.0)
            try:
                comm.sum(noise(comm, step))
            except WorkerLostError as error:
                assert comm.is_lost(1) and not comm.is_lost(0)
                return (
                    str(error),
                    comm.clock.now(),
                    comm.among([0, 2], name="rest").sum(torch.tensor(1.0)).item(),
                )

    first, dead, last = world.run(body)
    text = (
        "simulated worker 0 of 3 could not finish 'sum of float32[1000] on cpu': worker 1 died; form a new "
    )
    assert dead is None and first[0].startswith(text)
    # It dies while it works on its third step; the others arrive at 3 s and two sums, and then notice.
    sums_s = 2 * (costs.all_reduce(4000, 3).bytes_sent / 1e6 + 4 * 0.01)
    assert first[1:] == last[1:] == (pytest.approx(3.75 + sums_s, rel=1e-12), 2.0)
    assert [worker.died_s for worker in world.report()] == [None, 2.5, None]


def test_a_run_with_deaths_and_births_is_the_same_each_time_and_its_times_add_up():
    cluster = ClusterConfig(bandwidth_bytes_per_s=1e6, latency_s=0.01, variation_sigma=0.5)

    def body(comm):
        lost = 0
        for step in range(6):
            comm.spend(1.0)
            comm.clock.sleep(0.1)
            try:
                comm.mean(noise(comm, step))
            except WorkerLostError:
                lost += 1
        return lost, comm.clock.now()

    worlds = [SimWorld(4, cluster=cluster, deaths={2: 7.3}, births={3: 1.7}) for _ in range(2)]
    answers = [world.run(body) for world in worlds]
    assert answers[0] == answers[1] == worlds[0].run(body) and worlds[0].report() == worlds[1].report()
    assert answers[0][2] is None and 0 < answers[0][0][0] < 6
    for worker in worlds[0].report():
        spent_s = worker.compute_s + worker.transfer_s + worker.idle_s
        assert spent_s == pytest.approx(worker.virtual_s, rel=1e-12)
    assert worlds[0].report()[3].idle_s >= 1.7


def test_a_failed_transfer_sends_nothing_and_changes_nothing():
    def body(comm):
        if comm.rank == 1:
            comm.die()
        x = torch.ones(4)
        with pytest.raises(WorkerLostError):
            comm.all_to_all(x.view(2, 2))
        return torch.equal(x, torch.ones(4)), comm.bytes_sent

    world = SimWorld(2, detect_s=0.0)
    assert world.run(body) == [(True, 0), None]
    assert world.report()[1].died_s == 0.0


def test_all_workers_see_one_store():
    def body(comm):
        comm.store.setdefault("seen", []).append(comm.rank)
        comm.barrier()
        return comm.store["seen"]

    world = SimWorld(3)
    assert world.run(body) == world.run(body) == [[0, 1, 2]] * 3  # each run has its own


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"deaths": {3: 1.0}}, "deaths names worker 3, but the world has 3, from 0"),
        ({"births": {-1: 1.0}}, "births names worker -1"),
        ({"births": {0: float("nan")}}, "births of worker 0 is nan s; it must be at least 0 and finite"),
        ({"deaths": {0: -2.0}}, "deaths of worker 0 is -2.0 s"),
        ({"detect_s": -1.0}, "detect_s is at least 0, got -1.0"),
    ],
)
def test_impossible_deaths_and_births_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        SimWorld(3, **settings)


# ---- Mail --------------------------------------------------------------------------------------------------


def test_messages_queue_on_the_link_of_their_sender_and_arrive_after_the_latency():
    world = SimWorld(3, cluster=SLOW_NET)

    def body(comm):
        if comm.rank == 0:
            comm.spend(1.0)
            for receiver in (1, 2):
                comm.post(torch.full((1000,), float(receiver)), to=receiver, tag=receiver)
            return comm.clock.now()
        got = comm.take(torch.empty(1000), source=0, tag=comm.rank)
        return got[0].item(), comm.clock.now()

    first_s, second_s = 1.0 + 0.004 + 0.01, 1.0 + 2 * 0.004 + 0.01
    assert world.run(body) == [1.0, (1.0, pytest.approx(first_s)), (2.0, pytest.approx(second_s))]
    reports = world.report()
    assert [report.bytes_sent for report in reports] == [8000, 0, 0]
    assert [report.idle_s for report in reports] == [0.0, 1.0, 1.0]
    assert [report.transfer_s for report in reports] == pytest.approx([0.0, 0.014, 0.018])


def test_mail_of_one_group_is_not_taken_in_another():
    def body(comm):
        part = comm.divide([[0, 1], [2]])
        if comm.rank == 0:
            part.post(torch.tensor(1.0), to=1, tag=0)
            comm.post(torch.tensor(2.0), to=1, tag=0)
        if comm.rank == 1:
            return [group.take(torch.tensor(0.0), source=0, tag=0).item() for group in (comm, part)]
        return None

    assert SimWorld(3).run(body)[1] == [2.0, 1.0]


def test_inner_and_outer_links_carry_side_by_side():
    inner = costs.Link(bandwidth_bytes_per_s=4e6)

    def body(comm):
        group = comm.divide([[0, 1]], link="inner")
        if comm.rank == 0:
            comm.post(torch.zeros(1000), to=1, tag=0)
            group.post(torch.zeros(1000), to=1, tag=0)
            return None
        group.take(torch.empty(1000), source=0, tag=0)
        fast_s = comm.clock.now()
        comm.take(torch.empty(1000), source=0, tag=0)
        return fast_s, comm.clock.now()

    assert SimWorld(2, cluster=SLOW_NET, inner_link=inner).run(body)[1] == (0.001, 0.014)


def test_mail_with_a_dead_worker_is_lost_and_says_who():
    def body(comm):
        if comm.rank == 1:
            comm.spend(1.0)
            comm.die()
        with pytest.raises(PeerLostError, match="simulated worker 0 of 3 could not .* worker 1: it") as loss:
            comm.take(torch.tensor(0.0), source=1, tag=3)
        told_s = comm.clock.now()
        with pytest.raises(PeerLostError) as second:
            comm.post(torch.tensor(0.0), to=1, tag=3)
        return loss.value.peer, second.value.peer, told_s, comm.bytes_sent

    def one(comm):
        return body(comm) if comm.rank < 2 else None

    assert SimWorld(3, detect_s=0.5).run(one)[0] == (1, 1, 1.5, 0)


def test_a_message_of_another_shape_or_dtype_is_refused():
    def body(comm, like):
        if comm.rank == 0:
            comm.post(torch.zeros(2), to=1, tag=4)
        else:
            comm.take(like, source=0, tag=4)

    text = r"worker 1 expected {} with tag 4 from worker 0, who sent torch.float32 \[2\]"
    for like, told in (
        (torch.zeros(3), r"torch.float32 \[3\]"),
        (torch.ones(2).long(), r"torch.int64 \[2\]"),
    ):
        with pytest.raises(ValueError, match=text.format(told)):
            SimWorld(2).run(lambda comm, like=like: body(comm, like))


def test_mail_that_nobody_posts_ends_the_run():
    def body(comm):
        if comm.rank == 1:
            comm.take(torch.zeros(2), source=0, tag=9)

    with pytest.raises(CollectiveMismatchError, match="rank 1: take of mail with tag 9 from rank 0"):
        SimWorld(2).run(body)
