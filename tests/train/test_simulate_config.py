"""Clusters as files say them: what is refused, and who lives when."""

import math
import subprocess
import sys

import pytest

from hardy.config import ConfigError
from hardy.train.simulate_config import (
    MODELS,
    EventConfig,
    SimulationConfig,
    TaskConfig,
    lives_of,
    read_config,
)


def event(kind, at_s, worker=0, **more):
    return {"kind": kind, "at_s": at_s, "worker": worker, **more}


def test_slow_factors_are_a_list_or_a_table():
    table = read_config({"workers": 4, "slow_factors": {"2": 3.0}})
    assert table.slow_factors == read_config({"workers": 4, "slow_factors": [1, 1, 3]}).slow_factors


def test_bandwidth_has_two_units():
    assert read_config({"bandwidth_mbit_per_s": 100}).bandwidth == 12.5e6
    assert read_config({"bandwidth_bytes_per_s": 5}).bandwidth == 5
    assert read_config({}).bandwidth is None


def test_the_small_models_have_the_sizes_that_are_promised():
    from hardy.model.presets import count_parameters

    sizes = {name: count_parameters(TaskConfig(model=name).shape()) for name in MODELS}
    assert 0.09e6 < sizes["tiny"] < 0.13e6 and 0.9e6 < sizes["1m_wide"] < 1.1e6


def test_a_worker_that_comes_back_has_a_life_of_its_own():
    events = [event("fail", 3), event("join", 5), event("fail", 7), event("fail", 4, 1)]
    config = read_config({"workers": 3, "events": events})
    lives = lives_of(config, with_joins=True)
    assert [(life.worker, life.birth_s, life.death_s) for life in lives] == [
        (0, 0, 3),
        (1, 0, 4),
        (2, 0, math.inf),
        (0, 5, 7),
    ]
    assert lives_of(config, with_joins=False) == lives[:3]


def test_an_event_covers_steps_that_begin_before_it_ends():
    slow = EventConfig(kind="slow", at_s=2.0, until_s=3.0, worker=0, factor=2.0)
    assert [slow.covers(s) for s in (1.9, 2.0, 2.9, 3.0)] == [False, True, True, False]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"workrs": 3}, "there is no setting 'workrs'; did you mean 'workers'"),
        ({"workers": 0}, "workers must be a whole number at least 1, got 0"),
        ({"step_s": -1.0}, "step_s must be a number above 0, got -1.0"),
        ({"task": {"stps": 3}}, "there is no setting 'task.stps'; did you mean 'task.steps'"),
        ({"task": {"model": "tny"}}, "task.model: there is no model 'tny'; did you mean 'tiny'"),
        ({"task": {"tokens": 4096}}, "data.document_tokens=4096 is longer than model.context_tokens=2048"),
        ({"workers": 2, "slow_factors": [1, 1, 2]}, "slow_factors lists 3 workers, but workers=2"),
        (
            {"workers": 2, "slow_factors": {"2": 3}},
            "slow_factors.2 names no worker: they are numbered from 0",
        ),
        ({"slow_factors": {"x": 3}}, "slow_factors.x names no worker"),
        ({"slow_factors": [0.0]}, "slow_factors must be a list of a number above 0, got [0.0]"),
        (
            {"bandwidth_bytes_per_s": 1, "bandwidth_mbit_per_s": 1},
            "bandwidth_bytes_per_s=1 and bandwidth_mbit_per_s=1 say the same thing twice; leave one out",
        ),
        ({"events": {"at_s": 1}}, "events must be a list of tables, [[events]] in TOML"),
        ({"events": [{"kind": "fail", "worker": 0}]}, "events[0].at_s is required"),
        (
            {"events": [event("fial", 1)]},
            "events[0].kind must be one of fail, join, slow, corrupt, got 'fial'",
        ),
        ({"events": [event("fail", -1)]}, "events[0].at_s must be a number at least 0, got -1"),
        (
            {"events": [event("fail", 1, 4)]},
            "events[0].worker=4 does not exist: workers=4, counted from 0; name",
        ),
        ({"events": [event("fail", 1, factor=2.0)]}, "events[0].factor means nothing for kind='fail'"),
        ({"events": [event("slow", 1)]}, "events[0].factor=None must be above 0 and finite for kind='slow'"),
        (
            {"events": [event("slow", 2, factor=2.0, until_s=2.0)]},
            "events[0].until_s=2 must be after at_s=2",
        ),
        ({"events": [event("join", 1)]}, "events[0] lets worker 0 join at at_s=1, but it never left then"),
        (
            {"events": [event("join", 1), event("fail", 2)]},
            "events[0] lets worker 0 join at at_s=1, but it never left then; let it fail before",
        ),
        (
            {"events": [event("fail", 1), event("join", 2), event("join", 3)]},
            "events[2] lets worker 0 join at at_s=3, but it is there then",
        ),
        (
            {"events": [event("fail", 1), event("fail", 2)]},
            "events[1] lets worker 0 fail at at_s=2, but it has already failed then; let it join before",
        ),
        (
            {"events": [event("fail", 1), event("join", 1)]},
            "events[1] lets worker 0 fail and join both at at_s=1",
        ),
        (
            {"workers": 2, "events": [event("fail", 1), event("fail", 2, 1)]},
            "events[1] fails the last of workers=2 at at_s=2, and then nobody is left",
        ),
    ],
)
def test_what_cannot_be(data, text):
    with pytest.raises(ConfigError) as refused:
        read_config(data)
    assert text in str(refused.value)


def test_a_worker_that_came_back_in_time_keeps_the_cluster_alive():
    events = [event("fail", 1), event("join", 2), event("fail", 3, 1)]
    assert len(read_config({"workers": 2, "events": events}).events) == 3


def test_it_needs_no_torch():
    code = (
        "import sys, hardy.train.simulate_config, hardy.train.simulate_strategies\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_default_costs_nothing_but_steps():
    config = SimulationConfig()
    assert (config.bandwidth, config.latency_s, config.events) == (None, 0.0, ())
