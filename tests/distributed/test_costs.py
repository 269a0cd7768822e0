"""Ring formulas and the time of simulated work."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardy.distributed import costs
from hardy.distributed.config import ClusterConfig


def ring_all_reduce(num_bytes, num_workers):
    """Play a ring with chunks, and count what each worker sends."""
    chunks = [num_bytes // num_workers] * num_workers
    sent = [0] * num_workers
    hops = 0
    for _phase in ("reduce-scatter", "all-gather"):
        for hop in range(num_workers - 1):
            hops += 1
            for worker in range(num_workers):
                sent[worker] += chunks[(worker - hop) % num_workers]
    return max(sent), hops


@pytest.mark.parametrize("num_workers", [1, 2, 3, 8])
def test_all_reduce_sends_what_a_played_ring_sends(num_workers):
    traffic = costs.all_reduce(240, num_workers)
    assert (traffic.bytes_sent, traffic.hops) == ring_all_reduce(240, num_workers)


@given(num_bytes=st.integers(0, 10**12), num_workers=st.integers(1, 4096))
def test_an_all_reduce_sends_less_than_twice_its_size_and_whole_bytes(num_bytes, num_workers):
    sent = costs.all_reduce(num_bytes, num_workers).bytes_sent
    assert isinstance(sent, int) and sent <= 2 * num_bytes
    assert sent >= 2 * (num_workers - 1) / num_workers * num_bytes * (1 - 1e-12)


def test_alone_nothing_is_sent():
    alone = [costs.all_reduce(8, 1), costs.all_gather(8, 1), costs.broadcast(8, 1), costs.barrier(1)]
    alone.append(costs.all_to_all(8, 1))
    assert all(traffic == costs.Traffic(bytes_sent=0, hops=0) for traffic in alone)


@pytest.mark.parametrize("num_workers", [2, 3, 8])
def test_all_to_all_and_a_gather_of_the_sums_send_what_an_all_reduce_sends(num_workers):
    scattered, gathered = (
        costs.all_to_all(240, num_workers),
        costs.all_gather(240 // num_workers, num_workers),
    )
    both = costs.all_reduce(240, num_workers)
    assert scattered.bytes_sent + gathered.bytes_sent == both.bytes_sent
    assert scattered.hops + gathered.hops == both.hops


def test_a_link_costs_what_it_says_and_nothing_by_default():
    traffic = costs.all_gather(100, 5)
    assert costs.Link(bandwidth_bytes_per_s=1000.0, latency_s=0.25).seconds(traffic) == 0.4 + 1.0
    assert costs.Link().seconds(traffic) == 0.0


def test_impossible_links_are_refused():
    with pytest.raises(ValueError, match="bandwidth_bytes_per_s is above 0, got 0"):
        costs.Link(bandwidth_bytes_per_s=0)
    with pytest.raises(ValueError, match="latency_s is at least 0, got -1"):
        costs.Link(latency_s=-1)


def test_seconds_are_bytes_over_bandwidth_plus_hops():
    traffic = costs.all_gather(100, 5)
    assert traffic.seconds(bandwidth_bytes_per_s=1000.0, latency_s=0.25) == 0.4 + 1.0
    assert traffic.seconds(bandwidth_bytes_per_s=math.inf, latency_s=0.0) == 0.0


def test_varying_work_keeps_its_mean_and_spread():
    cluster = ClusterConfig(variation_sigma=0.3)
    times = [costs.compute_seconds(2.0, cluster, rank=1, index=i, seed=5) for i in range(3000)]
    logs = [math.log(t) for t in times]
    # Five standard errors of 3000 draws.
    assert statistics.mean(times) == pytest.approx(2.0, abs=5 * 2.0 * 0.31 / 3000**0.5)
    assert statistics.stdev(logs) == pytest.approx(0.3, abs=5 * 0.3 / 6000**0.5)


def test_the_time_of_work_depends_on_worker_piece_and_seed_alone():
    cluster = ClusterConfig(variation_sigma=0.3)
    times = {
        costs.compute_seconds(1.0, cluster, rank=r, index=i, seed=s)
        for r in (0, 1)
        for i in (0, 1)
        for s in (0, 1)
    }
    assert len(times) == 8
    assert costs.compute_seconds(1.0, cluster, rank=0, index=0, seed=0) in times


@pytest.mark.parametrize("work_s", [-1.0, math.nan])
def test_impossible_work_is_refused(work_s):
    with pytest.raises(ValueError, match="work takes at least 0 s"):
        costs.compute_seconds(work_s, ClusterConfig(), rank=0, index=0, seed=0)
