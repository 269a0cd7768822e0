"""Costs counted without a model are those of the simulation with models."""

import math
import time

import pytest

from hardy.config import ConfigError
from hardy.distributed.config import CompressionConfig
from hardy.distributed.strategy import BUCKET_BYTES as TRAINED_BUCKET_BYTES
from hardy.train.simulate import prepare_task, train_strategy
from hardy.train.simulate_config import read_config
from hardy.train.simulate_costs import BUCKET_BYTES, Sizes, count_costs, gradient_traffic, sum_traffic
from hardy.train.simulate_strategies import STRATEGIES, entries_of

SMALL = {
    "workers": 4,
    "slow_factors": [1, 1, 1, 3],
    "variation_sigma": 0.3,
    "bandwidth_bytes_per_s": 1e6,
    "latency_s": 0.003,
    "task": {
        "model": "tiny",
        "steps": 8,
        "tokens": 8,
        "source": "synthetic:constant,documents=60,mean=63",
        "evaluate_packs": 1,
        "evaluate_every_steps": 100,
    },
}
SAME = (
    *("virtual_s", "steps", "tokens", "bytes_sent", "idle_share", "exchange_share", "rounds"),
    *("worker_steps", "stopped", "settings"),
)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return prepare_task(read_config(SMALL), cache_dir=tmp_path_factory.mktemp("cache"))


def both(table, task, **cluster):
    config = read_config(SMALL | cluster)
    (entry,) = entries_of([table], config, {})
    return train_strategy(config, entry, task), count_costs(config, entry)


FAIL = [{"kind": "fail", "worker": 1, "at_s": 2.2}]
FAMILY = {
    **{name: {"name": name} for name in STRATEGIES if name != "push_sum"},
    "robust slices": {"name": "robust", "rule": "median", "pre": [], "f": 1},
    "dstar slices": {"name": "dstar", "f": 1, "exchange": "slices", "trusted": {"every_steps": 2}},
    "warm-up": {"name": "local_sgd", "every_steps": 3, "warmup_steps": 4},
    "too few steps": {"name": "a_edit", "every_s": 1.0, "min_steps": 9, "warmup_steps": 0},
    "bf16": {"name": "local_sgd", "every_steps": 5, "compression": {"name": "bf16"}},
    "int8": {"name": "local_sgd", "every_steps": 5, "compression": {"name": "int8"}},
    "topk": {"name": "local_sgd", "every_steps": 5, "compression": {"name": "topk"}},
    "averaged": {"name": "delayed", "every_steps": 5, "inner_state": "average"},
    "in turn": {"name": "streaming_diloco", "every_steps": 6, "fragments": 3, "delay_steps": 1},
    "elastic": {"name": "a_edit", "elastic": True},
}


@pytest.mark.parametrize("name", FAMILY)
def test_they_are_those_of_training(name, task):
    trained, counted = both(FAMILY[name], task)
    for key in SAME:
        assert getattr(trained, key) == getattr(counted, key), key
    assert trained.steps >= (32 if name != "elastic" else 24) and trained.bytes_sent > 0


@pytest.mark.parametrize(
    "name", ["synchronous", "local_sgd", "edit", "a_edit", "elastic edit", "elastic a_edit"]
)
def test_also_where_a_worker_dies(name, task):
    table = {"name": name.removeprefix("elastic ")} | ({"elastic": True} if "elastic" in name else {})
    trained, counted = both(table, task, events=FAIL)
    for key in SAME:
        assert getattr(trained, key) == getattr(counted, key), key
    assert (trained.stopped is None) == ("elastic" in name)


def test_also_where_one_is_slow_for_a_while(task):
    slow = [{"kind": "slow", "worker": 0, "at_s": 1.0, "until_s": 3.0, "factor": 5.0}]
    trained, counted = both({"name": "a_edit"}, task, events=slow)
    assert all(getattr(trained, key) == getattr(counted, key) for key in SAME)
    assert trained.virtual_s != both({"name": "a_edit"}, task)[1].virtual_s


@pytest.mark.parametrize("at_s", [4.0, 7.0])  # while the others look for who is left; between two rounds
def test_one_who_joins_is_sent_nearly_as_much(at_s, task):
    events = [*FAIL, {"kind": "join", "worker": 1, "at_s": at_s}]
    table = {"name": "local_sgd", "every_steps": 2, "elastic": True}
    trained, counted = both(table, task, events=events)
    for key in ("steps", "rounds", "worker_steps", "stopped"):
        assert getattr(trained, key) == getattr(counted, key), key
    assert trained.bytes_sent == pytest.approx(counted.bytes_sent, rel=2e-3)
    assert trained.virtual_s == pytest.approx(counted.virtual_s, rel=2e-3)
    assert counted.worker_steps[1] > both(table, task, events=FAIL)[1].worker_steps[1]


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ({"name": "push_sum"}, "strategy.name='push_sum'"),
        ({"name": "robust", "rule": "centered_clip", "pre": []}, "strategy.rule='centered_clip'"),
        ({"name": "robust", "fastest": {"k": 3}}, "strategy.fastest"),
    ],
)
def test_what_is_not_counted_is_said(table, what, task):
    config = read_config({"workers": 4})
    (entry,) = entries_of([table], config, {})
    with pytest.raises(ConfigError, match=f"costs alone are not counted for {what}; leave out --no-train"):
        count_costs(config, entry)


def test_gradients_travel_in_the_trainers_buckets():
    assert BUCKET_BYTES == TRAINED_BUCKET_BYTES
    million = 10**6
    sent = [traffic.bytes_sent for traffic in gradient_traffic([million] * 8, 2)]
    assert sent == [28 * million, 4 * million]  # the seventh fills a bucket


@pytest.mark.parametrize(("name", "share"), [("none", 1), ("bf16", 1 / 2), ("int8", 1 / 4 + 1 / 256)])
def test_compression_saves_what_it_promises(name, share):
    full = 4 * 2 * 3 / 4 * 10**6
    sent = sum(t.bytes_sent for t in sum_traffic(CompressionConfig(name=name), 10**6, 4))
    assert sent == pytest.approx(full * share, rel=1e-3)


def test_equal_workers_take_what_the_formula_says():
    bandwidth, latency_s, workers, steps = 1e7, 1e-3, 1000, 50
    cluster = {"workers": workers, "bandwidth_bytes_per_s": bandwidth, "latency_s": latency_s}
    config = read_config(cluster | {"task": {"steps": steps}})
    entries = entries_of([{"name": "synchronous"}, {"name": "local_sgd", "every_steps": 10}], config, {})
    synchronous, local = (count_costs(config, entry) for entry in entries)
    size = 4 * sum(Sizes.of(config).parameters)
    ring_s = 2 * (workers - 1) * (size / workers / bandwidth + latency_s)
    control_s = 2 * (workers - 1) * latency_s
    assert synchronous.virtual_s == pytest.approx(steps * (0.5 + ring_s + control_s), rel=1e-4)
    assert synchronous.idle_share == 0 and local.virtual_s < 0.5 * synchronous.virtual_s


def test_the_slowest_of_many_sets_the_pace_of_synchronous_steps():
    """The mean of the largest of N lognormals with sigma s, against exp(s sqrt(2 ln N)) as its bound."""
    config = read_config({"workers": 1000, "variation_sigma": 0.3, "task": {"steps": 100}})
    (entry,) = entries_of([{"name": "synchronous"}], config, {})
    mean_s = count_costs(config, entry).virtual_s / 100
    assert 0.5 * 2 < mean_s < 0.5 * math.exp(0.3 * math.sqrt(2 * math.log(1000)))


def test_many_workers_take_seconds():
    config = read_config({"workers": 4096, "variation_sigma": 0.3, "task": {"steps": 500, "model": "7b"}})
    tables = [{"name": "synchronous"}, {"name": "edit", "every_steps": 128}, {"name": "a_edit"}]
    started_s = time.process_time()
    results = [count_costs(config, entry) for entry in entries_of(tables, config, {})]
    assert time.process_time() - started_s < 10
    assert [result.steps for result in results[:2]] == [4096 * 500] * 2
    assert results[2].steps_per_s > results[0].steps_per_s
