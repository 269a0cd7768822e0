"""The arithmetic of virtual time equals `SimWorld`, which plays it with threads."""

import numpy as np
import pytest
import torch

from hardy.distributed.comm import WorkerLostError
from hardy.distributed.config import ClusterConfig
from hardy.distributed.costs import Link, all_gather, all_reduce
from hardy.distributed.simulation import SimWorld
from hardy.train.simulate_config import Life, read_config
from hardy.train.simulate_fleet import Fleet, MemberLostError
from hardy.train.simulate_times import StepTimes

LINK = {"bandwidth_bytes_per_s": 1000.0, "latency_s": 0.01}


def programs(num_workers, *, seed, deaths=None):
    """Return the world and the fleet after the same random program of work and meetings."""
    config = read_config({"workers": num_workers, "variation_sigma": 0.5, "task": {"seed": seed}})
    deaths = deaths or {}
    rng = np.random.default_rng(seed)
    acts = rng.integers(0, 3, 30).tolist()
    times = StepTimes(config)

    def body(comm):
        begun = 0
        try:
            for act in acts:
                if act == 0:
                    now_s = comm.clock.now()
                    comm.spend(times.seconds(comm.rank, index=begun, now_s=now_s))
                    begun += 1
                elif act == 1:
                    comm.sum(torch.zeros(25))
                else:
                    comm.all_gather(torch.zeros(7))
        except WorkerLostError:
            return

    world = SimWorld(num_workers, cluster=ClusterConfig(**LINK), deaths=deaths, detect_s=0.7)
    world.run(body)
    lives = [Life(worker=w, death_s=deaths.get(w, float("inf"))) for w in range(num_workers)]
    fleet = Fleet(lives, link=Link(**LINK), times=StepTimes(config), detect_s=0.7)
    everyone = np.arange(num_workers)
    try:
        for act in acts:
            if act == 0:
                fleet.work(everyone)
            else:
                traffic = all_reduce(100, num_workers) if act == 1 else all_gather(28, num_workers)
                fleet.meet(everyone, traffic)
    except MemberLostError:
        pass
    return world.report(), fleet


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_equal_programs_take_the_same_time_to_the_bit(num_workers, seed):
    report, fleet = programs(num_workers, seed=seed)
    assert [w.virtual_s for w in report] == fleet.now_s.tolist()
    assert [w.idle_s for w in report] == fleet.idle_s.tolist()
    assert [w.transfer_s for w in report] == fleet.exchange_s.tolist()
    assert [w.bytes_sent for w in report] == fleet.bytes_sent.tolist()


@pytest.mark.parametrize("death_s", [0.0, 0.3, 1.1, 2.05, 3.0, 4.5])
@pytest.mark.parametrize("others", [{}, {0: 2.2}, {0: 3.1, 3: 2.9}])
def test_deaths_are_noticed_when_they_would_be(death_s, others):
    report, fleet = programs(4, seed=3, deaths={2: death_s, **others})
    assert [w.virtual_s for w in report] == fleet.now_s.tolist()
    assert [w.idle_s for w in report] == pytest.approx(fleet.idle_s.tolist(), abs=1e-12)


def test_survivors_gather_however_many_die_meanwhile():
    lives = [Life(worker=0), Life(worker=1, death_s=4.0), Life(worker=2), Life(worker=3, death_s=1.0)]
    config = read_config({"workers": 4, "step_s": 3.0, "slow_factors": [1, 1, 2]})
    fleet = Fleet(lives, link=Link(), times=StepTimes(config), detect_s=0.5)
    fleet.work(np.arange(4))
    with pytest.raises(MemberLostError):
        fleet.meet(np.arange(4))
    assert fleet.now_s.tolist() == [3.5, 3.5, 6.5, 1.0]  # 1 and 2 notice the death of 3
    # Worker 1 dies at 4 while it waits for 2, and 0 notices at 4.5.
    assert fleet.gather_survivors(np.arange(4)).tolist() == [0, 2]
    assert fleet.now_s.tolist() == [6.5, 4.0, 6.5, 1.0]
    assert fleet.idle_s[0] == pytest.approx(3.5)


def test_one_who_waits_looks_at_its_own_times():
    fleet = Fleet([Life(worker=0)], link=Link(), times=StepTimes(read_config({})), detect_s=1.0)
    fleet.wait_until(0, 1.2, poll_s=0.5)
    assert (fleet.now_s[0], fleet.idle_s[0]) == (1.5, 1.5)
    fleet.wait_until(0, 1.0, poll_s=0.5)
    assert fleet.now_s[0] == 1.5
