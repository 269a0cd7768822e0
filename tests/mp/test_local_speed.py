"""Local updates in real processes: over links that the kernel slows, and beside a replica that sleeps."""

import sys
from pathlib import Path

import pytest

from hardy.distributed.config import ClusterConfig

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import bench_local
from limited_link import why_not


def rates(*contenders, width, sleep_s, cluster):
    """Return steps per second of all replicas, by contender."""
    case = bench_local.Case(
        name="test",
        words="",
        width=width,
        layers=4,
        sleep_s=sleep_s,
        cluster=cluster,
        contenders=contenders,
        least=(None,),
    )
    return [bench_local.rate(bench_local.measured(case, contender, seed=0)) for contender in contenders]


@pytest.mark.skipif(why_not() is not None, reason=f"links cannot be limited here: {why_not()}")
def test_rounds_that_are_rare_pay_on_a_slow_link():
    """A model of 262 kB at 4 Mbit/s: each exchange takes 0.8 s, a step next to nothing."""
    synchronous, edit = rates(
        bench_local.synchronous(steps=2),
        bench_local.edit(every_steps=8, rounds=1),
        width=128,
        sleep_s=0.0,
        cluster=ClusterConfig(bandwidth_bytes_per_s=0.5e6),
    )
    assert edit > 4 * synchronous


def test_rounds_by_the_clock_wait_for_nobody_who_sleeps():
    """One of four is three times slower: by steps all make a third, by the clock only it does (2.5 times)."""
    by_steps, by_the_clock = rates(
        bench_local.edit(every_steps=16, rounds=2),
        bench_local.a_edit(every_s=0.32, rounds=5),
        width=32,
        sleep_s=0.02,
        cluster=ClusterConfig(slow_factors=(1.0, 1.0, 1.0, 3.0)),
    )
    assert by_the_clock > 1.5 * by_steps
