"""Strategies with real models on a virtual clock."""

import dataclasses

import pytest
import torch

from hardy.config import ConfigError, UserError
from hardy.train.simulate import prepare_task, train_strategy
from hardy.train.simulate_config import read_config
from hardy.train.simulate_strategies import entries_of

TASK = {
    "model": "tiny",
    "steps": 12,
    "tokens": 16,
    "source": "synthetic:constant,documents=100,mean=63",
    "evaluate_packs": 4,
    "evaluate_every_steps": 3,
}


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def play(cache_dir):
    """Simulate one strategy on a cluster of three workers and return what came of it."""

    def play(table, *, task=None, changes=None, **cluster):
        config = read_config({"workers": 3, **cluster, "task": TASK | (task or {})})
        (entry,) = entries_of([table], config, changes or {})
        return train_strategy(config, entry, prepare_task(config, cache_dir=cache_dir))

    return play


@pytest.mark.parametrize("name", ["synchronous", "edit", "a_edit"])
def test_two_runs_are_equal(name, play):
    cluster = {"variation_sigma": 0.4, "bandwidth_bytes_per_s": 1e6, "latency_s": 0.01}
    events = [{"kind": "corrupt", "worker": 1, "at_s": 2.0, "until_s": 6.0}]
    one, other = (play({"name": name}, events=events, **cluster) for _ in range(2))
    assert one == other
    assert play({"name": name}, events=events, **cluster, task={"seed": 1}) != one


def test_the_loss_falls_and_the_curve_says_how(play):
    result = play({"name": "local_sgd", "every_steps": 4}, bandwidth_bytes_per_s=1e6)
    curve = result.curve
    assert [point.steps for point in curve] == [0, 9, 18, 27, 36]
    assert curve[0].validation_loss > 5 and result.validation_loss < 4.8
    assert result.validation_loss == curve[-1].validation_loss and 0 < result.accuracy < 1
    for attribute in ("virtual_s", "tokens", "bytes_sent", "rounds"):
        values = [getattr(point, attribute) for point in curve]
        assert values == sorted(values) and values[0] < values[-1] == getattr(result, attribute)
    assert result.rounds == 3 and -1 <= result.drift_cosine <= 1
    assert curve[0].train_loss is None and curve[-1].train_loss < curve[1].train_loss


def test_momenta_of_workers_leave_the_optimizer_none_of_its_own(play):
    table = {"name": "robust", "rule": "mean", "f": 0, "pre": [], "worker_momentum": 0.9}
    twice, once = (play(table, task={"beta1": beta1}).validation_loss for beta1 in (0.9, 0.0))
    own = play({"name": "synchronous"}, task={"beta1": 0.0}).validation_loss
    assert len({twice, once, own}) == 3


def test_one_worker_alone_learns_the_same_whatever_the_strategy(play):
    together, apart = (
        play(table, workers=1) for table in ({"name": "synchronous"}, {"name": "local_sgd", "every_steps": 4})
    )
    assert together.validation_loss == pytest.approx(apart.validation_loss, abs=1e-3)
    assert together.bytes_sent == apart.bytes_sent == 0 and together.virtual_s == apart.virtual_s == 6.0


def test_a_edit_does_twice_the_steps_of_edit_beside_one_slow_worker(play):
    cluster = {"workers": 4, "slow_factors": {"3": 3.0}, "task": {"steps": 32}}
    tables = {"name": "edit", "every_steps": 8}, {"name": "a_edit", "every_s": 4.0}
    edit, timed = (play(table, changes={"warmup_steps": 0}, **cluster) for table in tables)
    assert timed.steps_per_s >= 2 * edit.steps_per_s
    assert timed.idle_share < 0.3 < edit.idle_share
    assert timed.worker_steps[3] < 0.5 * timed.worker_steps[0]


def test_a_death_stops_those_who_need_everyone(play):
    events = [{"kind": "fail", "worker": 2, "at_s": 3.2}]
    for name in ("synchronous", "local_sgd"):
        result = play({"name": name}, events=events, detect_s=0.5)
        assert result.stopped is not None and result.worker_steps[2] == 6
    assert result.validation_loss > 0
    result = play({"name": "synchronous"}, events=events, detect_s=0.5)
    assert result.virtual_s == 4.0  # step 7 would have met at 3.5


def test_elastic_replicas_go_on_and_take_back_one_who_returns(play):
    table = {"name": "local_sgd", "every_steps": 2, "elastic": True}
    fail = {"kind": "fail", "worker": 2, "at_s": 3.2}
    join = {"kind": "join", "worker": 2, "at_s": 5.9}
    alone, back = play(table, events=[fail]), play(table, events=[fail, join])
    assert alone.stopped is None and alone.worker_steps == [12, 12, 6]
    assert back.stopped is None and back.worker_steps[:2] == [12, 12] and 6 < back.worker_steps[2] < 12
    assert max(back.validation_loss, alone.validation_loss) < 4.8
    late = play(table, events=[fail, join | {"at_s": 1000.0}])
    assert (late.worker_steps, late.virtual_s) == (alone.worker_steps, alone.virtual_s)


@pytest.mark.parametrize("factor", [None, -1.0])
def test_a_corrupt_worker_spoils_what_all_learn(factor, play):
    spoils = {"kind": "corrupt", "worker": 0, "at_s": 1.0}
    event = spoils if factor is None else spoils | {"factor": factor}
    whole, spoiled = (play({"name": "synchronous"}, events=events) for events in ([], [event]))
    assert spoiled.validation_loss > whole.validation_loss + 0.02
    assert spoiled.virtual_s == whole.virtual_s
    over = play({"name": "synchronous"}, events=[event | {"until_s": 1.1}])
    assert over.validation_loss < spoiled.validation_loss


def test_who_is_left_out_is_counted_by_worker(play):
    anomaly = {"name": "ztest", "warmup_rounds": 1, "delta": 1e-9, "relative_floor": 0.0}
    result = play({"name": "edit", "every_steps": 2, "anomaly": anomaly})
    assert result.flagged == sum(result.flagged_workers.values()) > 0
    assert set(result.flagged_workers) <= {"0", "1", "2"}
    assert result.curve[-1].flagged == result.flagged


def test_the_number_of_threads_is_put_back(play):
    before = torch.get_num_threads()
    play({"name": "synchronous"}, task={"steps": 1})
    assert torch.get_num_threads() == before


def test_what_does_not_fit_is_refused(cache_dir):
    with pytest.raises(ConfigError, match=r"workers=500 replicas of task.model=130m \(\d.* would take about"):
        prepare_task(read_config({"workers": 500, "task": TASK | {"model": "130m"}}), cache_dir=cache_dir)
    short = TASK | {"source": "synthetic:constant,documents=2,mean=15"}
    with pytest.raises(UserError, match="data.source gives"):
        prepare_task(read_config({"workers": 50, "task": short}), cache_dir=cache_dir)


def test_points_are_plain(play):
    result = play({"name": "synchronous"}, task={"steps": 5})
    assert dataclasses.asdict(result.curve[0]) == result.plain()["curve"][0]
