"""How long simulated steps take."""

import numpy as np

from hardy.distributed.config import ClusterConfig
from hardy.distributed.costs import compute_seconds
from hardy.train.simulate_config import read_config
from hardy.train.simulate_times import StepTimes


def times_of(**settings):
    return StepTimes(read_config({"workers": 3, "step_s": 0.5, **settings}))


def test_without_variation_they_are_those_of_the_simulated_world():
    cluster = ClusterConfig(slow_factors=(1.0, 3.0))
    times = times_of(slow_factors=[1.0, 3.0])
    for worker in range(3):
        expected = compute_seconds(0.5, cluster, rank=worker, index=7, seed=0)
        assert times.seconds(worker, index=7, now_s=1.0) == expected


def test_the_variation_is_lognormal_around_the_mean():
    times = times_of(variation_sigma=0.4)
    indices = np.arange(60_000)
    seconds = times.seconds_of(np.zeros(60_000, dtype=np.int64), indices, np.zeros(60_000))
    assert abs(seconds.mean() / 0.5 - 1) < 0.01
    assert abs(np.log(seconds).std() - 0.4) < 0.01


def test_a_draw_depends_on_seed_worker_and_index_alone():
    many = times_of(variation_sigma=0.4).seconds_of(np.array([2, 0, 1]), np.array([300, 5, 0]), np.zeros(3))
    again = times_of(variation_sigma=0.4)
    assert [again.seconds(w, index=i, now_s=9.0) for w, i in ((2, 300), (0, 5), (1, 0))] == many.tolist()
    assert len(set(many.tolist())) == 3
    more = times_of(workers=9, variation_sigma=0.4)
    assert more.seconds(2, index=300, now_s=0.0) == many[0]
    assert times_of(variation_sigma=0.4, task={"seed": 1}).seconds(2, index=300, now_s=0.0) != many[0]


def test_events_make_steps_longer_that_begin_within():
    slow = {"kind": "slow", "worker": 1, "at_s": 2.0, "until_s": 4.0, "factor": 3.0}
    times = times_of(events=[slow])
    assert [times.seconds(1, index=0, now_s=s) for s in (1.9, 2.0, 3.9, 4.0)] == [0.5, 1.5, 1.5, 0.5]
    assert times.seconds(0, index=0, now_s=3.0) == 0.5


def test_what_was_forgotten_is_not_what_follows():
    times, whole = (times_of(variation_sigma=0.4) for _ in range(2))
    for index in range(1000):
        times.forget(index)
        assert times.seconds(0, index=index, now_s=0.0) == whole.seconds(0, index=index, now_s=0.0)
    assert len(times._blocks) == 1
