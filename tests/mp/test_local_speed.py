"""Local updates in real processes: over links that the kernel slows, and beside a replica that sleeps."""

import sys
from pathlib import Path

import pytest

from hardy.distributed.config import ClusterConfig

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import bench_local
from limited_link import why_not


def rates(case):
    """Return steps per second of all replicas, by contender."""
    return {
        contender.name: bench_local.rate(bench_local.measured(case, contender, seed=0))
        for contender in case.contenders
    }


@pytest.mark.skipif(why_not() is not None, reason=f"links cannot be limited here: {why_not()}")
def test_rounds_that_are_rare_pay_on_a_slow_link():
    """A model of 262 kB: each exchange takes 0.8 s, a step next to nothing."""
    found = rates(
        bench_local.Case(
            name="link",
            words="4 Mbit/s",
            width=128,
            layers=4,
            sleep_s=0.0,
            cluster=ClusterConfig(bandwidth_bytes_per_s=0.5e6),
            contenders=(bench_local.synchronous(steps=2), bench_local.edit(every_steps=8, rounds=1)),
            least=(4.0,),
        )
    )
    assert found["EDiT"] > 4 * found["synchronous"]


def test_rounds_by_the_clock_wait_for_nobody_who_sleeps():
    """One of four is three times slower: by steps all make a third, by the clock only it does (2.5 times)."""
    found = rates(
        bench_local.Case(
            name="straggler",
            words="20 ms",
            width=32,
            layers=4,
            sleep_s=0.02,
            cluster=ClusterConfig(slow_factors=(1.0, 1.0, 1.0, 3.0)),
            contenders=(
                bench_local.edit(every_steps=16, rounds=2),
                bench_local.a_edit(every_s=0.32, rounds=5),
            ),
            least=(2.0,),
        )
    )
    assert found["A-EDiT"] > 1.5 * found["EDiT"]
