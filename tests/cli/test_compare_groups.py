"""Runs that differ in their seed alone, as one."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hardy.cli.compare_groups import (
    ABSENT,
    differences,
    estimate,
    estimated,
    grouped,
    t_quantile,
    training_band,
    validation_band,
)
from hardy.cli.compare_runs import STEP, TIME, TOKENS, read_run


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 6, 9, 10, 29, 30, 199, 1000])
def test_the_quantile_is_that_of_scipy(freedom):
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20))
def test_an_estimate_is_the_mean_and_students_interval(values):
    found = estimate(values)
    error = statistics.stdev(values) / len(values) ** 0.5
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, len(values) - 1) * error, abs=1e-6)
    assert found.count == len(values)


def test_a_single_value_has_no_interval():
    assert estimate([2.0]).half_width is None


def read(*folders):
    return [read_run(folder, name=folder.name) for folder in folders]


def test_runs_that_differ_in_seed_paths_and_logs_are_one_group(make_run):
    commits = [{"from_step": 0, "num_workers": 1, "commit": commit} for commit in "ab"]
    runs = read(
        make_run("sgd-1", seed=1, config={"log.progress": "bar"}, starts=commits[:1]),
        make_run("lr", seed=1, config={"optim.lr": 0.5}),
        make_run("sgd-2", seed=2, config={"data.cache_dir": "/there"}, starts=commits[1:]),
    )
    groups = grouped(runs)
    assert [(group.label, [run.name for run in group.runs]) for group in groups] == [
        ("sgd (2 runs)", ["sgd-1", "sgd-2"]),
        ("lr", ["lr"]),
    ]


def test_other_numbers_of_workers_are_another_group(make_run):
    runs = read(*(make_run(f"run{n}", starts=[{"from_step": 0, "num_workers": n}]) for n in (1, 2)))
    groups = grouped(runs)
    assert len(groups) == 2
    assert differences(groups).shared == {"run.num_workers": [1, 2]}


def test_labels_stay_apart(make_run):
    runs = read(*(make_run(f"a-{i}", seed=i % 2, config={"optim.lr": i // 2}) for i in range(4)))
    assert [group.label for group in grouped(runs)] == ["a-0 and 1 more", "a-2 and 1 more"]


def test_a_measure_is_estimated_over_the_runs_that_have_it(make_run):
    lines = [{"step": 1, "loss": 2.0}]
    (group,) = grouped(read(make_run("a", seed=0), make_run("b", seed=1), make_run("c", lines=lines)))
    found = estimated(group, "validation_loss")
    assert (found.mean, found.count) == (2.0, 2)
    assert estimated(group, "bytes_sent") is None


def test_differences_of_all_and_of_one_group_alone(make_run):
    groups = grouped(
        read(
            make_run("a", config={"strategy.name": "synchronous"}),
            make_run("b", config={"strategy.name": "edit", "strategy.every": 8}),
            make_run("c", config={"strategy.name": "dstar", "strategy.f": 1, "optim.lr": 3, "log.x": 1}),
            make_run("d", config={"strategy.name": "edit", "strategy.every": 9, "optim.beta": None}),
        )
    )
    found = differences(groups)
    assert found.shared == {
        "optim.lr": [0.01, 0.01, 3, 0.01],
        "strategy.name": ["synchronous", "edit", "dstar", "edit"],
        "strategy.every": [ABSENT, 8, ABSENT, 9],
    }
    assert found.own == {
        "strategy.f": [ABSENT, ABSENT, 1, ABSENT],
        "optim.beta": [ABSENT, ABSENT, ABSENT, None],
    }


def test_a_band_is_the_mean_where_all_were_evaluated(make_run):
    late = [
        {"step": s, "loss": 9.0 - s, "tokens": 300 * s, "step_time_s": 1.0, "validation_loss": 4.5 - s / 2}
        for s in (3, 4)
    ]
    (group,) = grouped(read(make_run("a", seed=0), make_run("b", seed=1, lines=late)))
    band = validation_band(group)  # at step 4: 1.5 and 2.5
    assert (list(band.line.x[STEP]), list(band.line.y)) == ([4], [2.0])
    assert band.line.x[TOKENS] == [800.0]
    assert band.line.x[TIME] == [2.25]
    assert (band.low[0], band.high[0]) == pytest.approx((2.0 - 12.7062047 * 0.5, 2.0 + 12.7062047 * 0.5))


def test_a_band_of_training_averages_stretches(make_run):
    lines = [[{"step": s, "loss": s + add} for s in range(1, 401)] for add in (0.0, 1.0)]
    (group,) = grouped(read(*(make_run(f"{i}", seed=i, lines=lines[i]) for i in range(2))))
    band = training_band(group)
    assert list(band.line.x[STEP])[:2] == [2, 4]
    assert len(band.line.y) == 200
    assert list(band.line.y)[:2] == [2.0, 4.0]  # (1, 2) and (2, 3); (3, 4) and (4, 5)


def test_one_run_or_nothing_in_common_has_no_band(make_run):
    alone = grouped(read(make_run("a")))[0]
    assert validation_band(alone) is None
    early = [{"step": 1, "loss": 1.0, "validation_loss": 1.0}]
    apart = grouped(read(make_run("b", seed=1), make_run("c", seed=2, lines=early)))[0]
    assert validation_band(apart) is None
