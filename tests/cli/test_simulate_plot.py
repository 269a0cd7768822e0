"""Loss against virtual time."""

import math

import pytest

from hardy.cli.simulate_plot import chart, draw_curves
from hardy.config import UserError
from hardy.train.simulate_result import Point, StrategyResult


def result(label, points):
    numbers = {
        "steps": 1,
        "tokens": 1,
        "train_loss": None,
        "accuracy": 0.0,
        "bytes_sent": 0,
        "idle_share": 0.0,
    }
    more = {"exchange_share": 0.0, "rounds": 0, "flagged": 0, "drift_cosine": None}
    curve = [Point(virtual_s=s, validation_loss=loss, **numbers, **more) for s, loss in points]
    whole = {"virtual_s": 1.0, "steps": 1, "tokens": 1, "bytes_sent": 0, "idle_share": 0.0, "rounds": 0}
    return StrategyResult(
        label=label, settings={}, exchange_share=0.0, worker_steps=[1], curve=curve, **whole
    )


def test_a_chart_has_each_point_in_its_place():
    results = [result("one", [(0, 3.0), (10, 1.0)]), result("two", [(0, 3.0), (5, 2.0)])]
    assert list(chart(results, width=11, height=3)) == [
        "3.00 |a",
        "     |     b",
        "1.00 |          a",
        "     +-----------",
        "      0    10.0 s",
        "a one  b two",
    ]


def test_what_is_not_finite_is_left_out_of_the_chart():
    assert list(chart([result("none", [])])) == []
    assert list(chart([result("nan", [(0, math.nan)])])) == []
    lines = list(chart([result("one", [(0, 2.0), (1, math.nan)])], width=5, height=2))
    assert lines[0] == "2.00 |a" and "a" not in lines[1]


def test_the_picture_is_written_or_refused(tmp_path):
    results = [result("one", [(0, 3.0), (10, math.nan)])]
    assert draw_curves(results, tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="png could not be written: No such file or directory$"):
        draw_curves(results, tmp_path / "missing" / "c.png")
