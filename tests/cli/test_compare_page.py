"""The sections of a comparison's page."""

import pytest

from hardy.cli.compare_groups import grouped
from hardy.cli.compare_page import MEAN_KINDS, MOST_EVENTS, sections_of
from hardy.cli.compare_runs import read_run
from hardy.cli.page import Bars, Table, Text
from hardy.cli.page_curves import Curves


@pytest.fixture
def sections(make_run):
    sent = [
        {
            "step": s,
            "loss": 1.0 / s,
            "bytes_sent": 2_000_000 * s,
            "peak_memory_mb": 5.0,
            "flagged_replicas": [1] * (s == 3),
        }
        for s in range(1, 5)
    ]
    names = ("plain-0", "plain-1", "edit", "third")
    configs = [{}, {}, {"strategy.every": 8}, {"optim.lr": 9}]
    folders = [
        make_run(name, seed=i % 2, config=config, lines=sent if name == "edit" else None)
        for i, (name, config) in enumerate(zip(names, configs, strict=True))
    ]
    runs = [read_run(folder, name=folder.name) for folder in folders]
    return {section.title: section for section in sections_of(grouped(runs), ["beware"])}


def test_what_stands_on_the_page_in_which_order(sections):
    assert list(sections) == [
        *("Read this first", "Summary", "Loss", "Peak memory (MB)", "Sent per worker (MB)", "Anomalies"),
        *("Settings that differ", "Settings that one group alone has (1)"),
    ]
    assert sections["Read this first"].is_warning


def test_each_run_has_its_curves_and_each_group_its_means(sections):
    loss = sections["Loss"]
    assert isinstance(loss, Curves)
    assert [(curve.name, curve.group, curve.kind) for curve in loss.curves] == [
        ("plain-0", "plain (2 runs)", "training"),
        ("plain-0", "plain (2 runs)", "validation"),
        ("plain-1", "plain (2 runs)", "training"),
        ("plain-1", "plain (2 runs)", "validation"),
        ("plain (2 runs)", "plain (2 runs)", MEAN_KINDS[0]),
        ("plain (2 runs)", "plain (2 runs)", MEAN_KINDS[1]),
        ("edit", "edit", "training"),
        ("third", "third", "training"),
        ("third", "third", "validation"),
    ]
    assert [curve.style for curve in loss.curves[:2]] == ["line", "dots"]
    assert all((curve.low is not None) == (curve.kind in MEAN_KINDS) for curve in loss.curves)
    assert loss.axes == ["step", "tokens", "time (s)"]
    assert "Bands are 95 % intervals" in loss.note
    assert loss.off == MEAN_KINDS[1:]


def test_what_went_wrong_stands_in_the_table_and_on_the_curve(sections):
    table = sections["Anomalies"]
    assert isinstance(table, Table)
    assert table.rows == [("edit", "3", "replica 1 left out of a round", "1")]
    (mark,) = next(curve for curve in sections["Loss"].curves if curve.name == "edit").marks
    assert (mark.x["step"], mark.text) == (3, "step 3: replica 1 left out of a round")


def test_bars_have_the_colour_of_their_group(sections):
    bars = sections["Sent per worker (MB)"]
    assert isinstance(bars, Bars)
    assert [(bar.label, bar.value, bar.text, bar.colour) for bar in bars.bars] == [("edit", 8e6, "8.00", 1)]


def test_settings_that_differ(sections):
    assert sections["Settings that differ"].rows == [["optim.lr", "0.01", "0.01", "9"]]
    assert sections["Settings that one group alone has (1)"].rows == [("edit", "strategy.every", "8")]


def test_a_single_run_has_a_page_too(make_run):
    sections = sections_of(grouped([read_run(make_run("a"), name="a")]), [])
    assert [section.title for section in sections] == ["Summary", "Loss", "Anomalies", "Settings that differ"]
    assert isinstance(sections[2], Text)
    assert sections[3].paragraphs == ["There is one group of runs."]


def test_a_run_that_goes_wrong_all_the_time_does_not_flood_the_page(make_run):
    steps = range(1, 6001)
    lines = [{"step": s, "loss": 1.0, "removed_workers": [0] * (s % 40 == 0)} for s in steps]
    run = read_run(make_run("a", lines=lines), name="a")
    assert [(event.when(), event.times) for event in run.events] == [("40 to 6,000", 150)]
    apart = [{"step": s * 1000, "loss": 1.0, "warning": str(s)} for s in range(1, 151)]
    run = read_run(make_run("b", lines=apart), name="b")
    sections = {section.title: section for section in sections_of(grouped([run]), [])}
    assert len(sections["Anomalies"].rows) == MOST_EVENTS
    assert "50 further ones are not listed (at most 100 a run)" in sections["Anomalies"].note


def test_runs_without_a_step_leave_the_curves_out(make_run):
    titles = [s.title for s in sections_of(grouped([read_run(make_run("a", lines=[]), name="a")]), [])]
    assert "Loss" not in titles
