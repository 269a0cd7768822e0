"""Workers as a grid and replicas that come and go, simulated; real processes in `contracts` and `mp`."""

import random

import pytest
import torch

from hardy.clock import VirtualClock
from hardy.distributed import costs
from hardy.distributed.comm import Alone, TorchComm, WorkerLostError, join_world, leave_world
from hardy.distributed.config import ClusterConfig
from hardy.distributed.groups import ExcludedError, FixedGroup, SimGroup, split
from hardy.distributed.simulation import SimWorld
from hardy.distributed.turns import CollectiveMismatchError


def test_alone_is_a_grid_of_one():
    clock = VirtualClock()
    grid = split(Alone(clock=clock), replicas=1, shards=1)
    assert (grid.replica, grid.replicas, grid.shard, grid.shards) == (0, 1, 0, 1)
    assert grid.inner.size == grid.outer.size == 1 and grid.inner.clock is grid.outer.clock is clock


@pytest.mark.parametrize(("replicas", "shards"), [(2, 3), (3, 2), (6, 1), (1, 6)])
def test_sums_over_rows_and_then_columns_are_sums_over_all(replicas, shards):
    def body(comm):
        grid = split(comm, replicas=replicas, shards=shards)
        assert grid.replica * grid.shards + grid.shard == comm.rank
        assert (grid.inner.rank, grid.inner.size) == (grid.shard, shards)
        assert (grid.outer.rank, grid.outer.size) == (grid.replica, replicas)
        row = grid.inner.sum(torch.tensor(float(2**comm.rank)))
        return row.item(), grid.outer.sum(row).item()

    for rank, (row, whole) in enumerate(SimWorld(6).run(body)):
        first = rank // shards * shards
        assert row == sum(2**member for member in range(first, first + shards)) and whole == 63


@pytest.mark.parametrize(("replicas", "shards"), [(2, 2), (0, 6), (-2, -3)])
def test_a_grid_that_does_not_hold_the_workers_is_refused(replicas, shards):
    with pytest.raises(ValueError, match=f"grid of {replicas} replicas x {shards} workers.*must be 6"):
        SimWorld(6).run(lambda comm: split(comm, replicas=replicas, shards=shards))


def test_what_cannot_be_cut_is_refused():
    class Fixed:
        rank, size = 0, 1

    with pytest.raises(TypeError, match="Fixed cannot be cut into groups; give Alone, TorchComm or SimComm"):
        split(Fixed(), replicas=1, shards=1)


def test_replicas_run_on_while_others_meet():
    """Each replica does its own number of steps between two rounds and waits for its own shards only."""

    def body(comm):
        grid = split(comm, replicas=2, shards=2)
        for _ in range(3 + 4 * grid.replica):
            comm.spend(1.0 + grid.shard)
            grid.inner.barrier()
        alone_s = comm.clock.now()
        return alone_s, grid.outer.sum(torch.tensor(1.0)).item(), comm.clock.now()

    assert SimWorld(4).run(body) == [(6.0, 2.0, 14.0)] * 2 + [(14.0, 2.0, 14.0)] * 2


def test_inner_and_outer_links_cost_what_they_cost_and_all_bytes_are_reported():
    fast = costs.Link(bandwidth_bytes_per_s=1e9, latency_s=1e-6)
    cluster = ClusterConfig(bandwidth_bytes_per_s=1e6, latency_s=0.01)
    world = SimWorld(6, cluster=cluster, inner_link=fast)

    def body(comm):
        grid = split(comm, replicas=3, shards=2)
        times_s = [comm.clock.now()]
        for part in (grid.inner, grid.outer):
            part.sum(torch.zeros(1000))
            times_s.append(comm.clock.now() - sum(times_s))
        return times_s[1:], (grid.inner.bytes_sent, grid.outer.bytes_sent, comm.bytes_sent)

    inner, outer = costs.all_reduce(4000, 2), costs.all_reduce(4000, 3)
    for (inner_s, outer_s), counts in world.run(body):
        assert inner_s == fast.seconds(inner)
        assert outer_s == pytest.approx(outer.bytes_sent / 1e6 + outer.hops * 0.01, rel=1e-9)
        assert counts == (inner.bytes_sent, outer.bytes_sent, 0)
    assert {worker.bytes_sent for worker in world.report()} == {inner.bytes_sent + outer.bytes_sent}


def test_a_call_on_the_wrong_communicator_is_a_mismatch_even_among_the_same_workers():
    def body(comm):
        grid = split(comm, replicas=1, shards=2)
        (grid.inner if comm.rank else comm).sum(torch.ones(1))

    with pytest.raises(CollectiveMismatchError, match=r"rank 1: sum of float32\[1\] on cpu in inner group"):
        SimWorld(2).run(body)


def test_groups_that_do_not_agree_on_their_members_are_named():
    def body(comm):
        ranks = [0, 1] if comm.rank == 0 else [1, 2]
        if comm.rank < 2:
            comm.among(ranks, name="pair").barrier()

    with pytest.raises(
        CollectiveMismatchError, match="rank 0: barrier in pair among 0, 1\n  rank 1: barrier"
    ):
        SimWorld(3).run(body)


# ---- Groups whose members change ---------------------------------------------------------------------------


def test_a_fixed_group_is_its_communicator_and_cannot_change(tmp_path):
    def body(comm):
        group = FixedGroup(comm)
        one = torch.tensor([1.0 + comm.rank])
        assert (group.rank, group.size, group.clock) == (comm.rank, comm.size, comm.clock)
        assert (group.generation, group.members, group.is_elastic) == (0, (0, 1, 2), False)
        assert not group.wants_members() and not group.runs_beside
        answers = [
            group.sum(one),
            group.mean(one),
            group.broadcast(one, source=2),
            group.all_gather(one).view(-1),
        ]
        answers.append(group.all_to_all(one.expand(3, 1)).view(-1))
        group.barrier()
        assert group.bytes_sent == comm.bytes_sent > 0
        with pytest.raises(WorkerLostError, match="strategy.elastic is false.*`hardy resume`"):
            group.reform()
        group.close()
        return [answer.tolist() for answer in answers]

    want = [[6.0], [2.0], [3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    assert SimWorld(3).run(body) == [want] * 3
    comm = join_world(rank=0, size=1, init_method=f"file://{tmp_path}/store", device_type="cpu")
    assert isinstance(comm, TorchComm) and FixedGroup(comm).runs_beside
    leave_world()


def rounds(comm, *, founders, shards=1, until_s=12.0, step_s=1.0):
    """Train for a second and meet, as the engine does; return the rounds as (moment, members, sum)."""
    group = SimGroup(comm, founders=founders, shards=shards)
    seen = [("in", round(comm.clock.now(), 3), group.generation, group.members)]
    while comm.clock.now() < until_s:
        comm.spend(step_s)
        while True:
            try:
                rows_N = group.all_gather(torch.tensor([float(group.wants_members()), 1.0]))
                break
            except WorkerLostError:
                group.reform()
        assert group.size == len(group.members) == len(rows_N)
        seen.append((round(comm.clock.now(), 3), group.members))
        if rows_N[:, 0].any() and comm.clock.now() < until_s:
            group.reform()
    group.close()
    return seen


def test_simulated_replicas_die_and_come_while_the_others_go_on():
    world = SimWorld(4, deaths={1: 3.5}, births={3: 6.25})
    first, dead, second, late = world.run(lambda comm: rounds(comm, founders=3))
    assert dead is None and first == second
    moments = dict(item for item in first[1:])
    assert moments[3.0] == (0, 1, 2) and moments[5.0] == (0, 2)  # noticed one second after 4.0, done again
    assert moments[7.0] == (0, 2) and moments[8.05] == (0, 2, 3)
    assert late[0] == (
        "in",
        7.05,
        2,
        (0, 2, 3),
    )  # it asks at 6.25; the round at 7 lets it in; it looks at 7.05
    assert late[1:] == [item for item in first[1:] if item[0] > 7.05]


def test_the_same_deaths_and_births_give_the_same_run():
    cluster = ClusterConfig(bandwidth_bytes_per_s=1e5, latency_s=0.01, variation_sigma=0.3)
    worlds = [
        SimWorld(5, cluster=cluster, deaths={0: 4.2, 3: 4.3}, births={4: 2.0}, detect_s=0.3) for _ in range(2)
    ]
    answers = [world.run(lambda comm: rounds(comm, founders=4)) for world in worlds]
    assert answers[0] == answers[1] and worlds[0].report() == worlds[1].report()
    assert answers[0][1][-1][1] == (1, 2, 4)


@pytest.mark.parametrize("seed", range(20))
def test_whoever_lives_agrees_on_the_members_whatever_the_deaths_and_births(seed):
    draw = random.Random(seed)
    num = draw.randint(2, 7)
    founders = draw.randint(1, num)
    world = SimWorld(
        num,
        cluster=draw.choice([ClusterConfig(), ClusterConfig(latency_s=0.05, variation_sigma=0.4)]),
        births={rank: draw.uniform(0, 8) for rank in range(founders, num)},
        deaths={rank: draw.uniform(0, 11) for rank in range(1, num) if draw.random() < 0.5},
        detect_s=draw.choice([0.0, 0.3, 1.0]),
        seed=seed,
    )
    members_by_moment = {}
    for rank, seen in enumerate(world.run(lambda comm: rounds(comm, founders=founders))):
        for moment_s, members in (seen or [None])[1:]:
            assert rank in members and members_by_moment.setdefault(moment_s, members) == members
    for worker in world.report():
        assert worker.virtual_s == pytest.approx(
            worker.compute_s + worker.transfer_s + worker.idle_s, abs=1e-9
        )


def test_one_that_dies_while_the_others_form_a_group_is_left_out_as_well():
    def body(comm):
        group = SimGroup(comm, founders=4)
        comm.spend([1.0, 9.0, 3.0, 1.0][comm.rank])
        with pytest.raises(WorkerLostError):
            group.barrier()
        group.reform()
        return comm.clock.now(), group.generation, group.members, group.sum(torch.tensor(1.0)).item()

    # 1 dies first; 0 and 3 then wait for 2, who dies before it comes to form the next group.
    world = SimWorld(4, deaths={1: 1.5, 2: 2.75}, detect_s=0.5)
    assert world.run(body) == [(3.25, 1, (0, 3), 2.0), None, None, (3.25, 1, (0, 3), 2.0)]


def test_the_last_replica_is_a_group_of_its_own():
    world = SimWorld(2, deaths={0: 2.5})
    assert world.run(lambda comm: rounds(comm, founders=2))[1][-1] == (12.0, (1,))


def test_a_replica_that_lost_a_worker_is_lost_and_all_shards_agree():
    def body(comm):
        if comm.rank != 3:
            return rounds(comm, founders=3, shards=2)
        group = SimGroup(comm, founders=3, shards=2)
        comm.spend(1.0)
        group.all_gather(torch.zeros(2))
        comm.spend(0.75)
        comm.clock.sleep(3.0)  # its other worker died; it hears of it from whoever it asks
        with pytest.raises(ExcludedError, match="replica 1 lost one of its workers and cannot go on"):
            group.reform()
        comm.die()

    answers = SimWorld(6, deaths={2: 1.5}).run(body)
    assert answers[2] is None and answers[3] is None
    for seen in (answers[0], answers[1], answers[4], answers[5]):
        assert seen[-1][1] == (0, 2) and (1.0, (0, 1, 2)) in seen


def test_nobody_admits_who_comes_too_late():
    def body(comm):
        if comm.rank == 0:
            SimGroup(comm, founders=1).barrier()
            return
        with pytest.raises(WorkerLostError, match="replica 1 asked to join and was not admitted within 5 s"):
            SimGroup(comm, founders=1, timeout_s=5.0)

    SimWorld(2, births={1: 3.0}).run(body)


def test_groups_that_do_not_fit_the_world_are_refused():
    for founders, shards in ((0, 1), (4, 1), (2, 2), (1, 2)):
        with pytest.raises(ValueError, match="do not fit a world of 3 workers"):
            SimWorld(3).run(lambda comm, f=founders, s=shards: SimGroup(comm, founders=f, shards=s))


def test_bytes_are_counted_over_all_generations():
    def body(comm):
        group = SimGroup(comm, founders=3)
        group.sum(torch.zeros(30))
        if comm.rank == 2:
            comm.die()
        with pytest.raises(WorkerLostError):
            group.sum(torch.zeros(30))
        group.reform()
        group.sum(torch.zeros(30))
        return group.bytes_sent

    sent = costs.all_reduce(120, 3).bytes_sent + costs.all_reduce(120, 2).bytes_sent
    assert SimWorld(3).run(body) == [sent, sent, None]
