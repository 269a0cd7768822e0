"""Which points of curves a page carries, and how."""

import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardy.cli.page_curves import (
    MOST_POINTS,
    TABLE_ROWS,
    Curve,
    Curves,
    Mark,
    curves_html,
    decimals_of,
    embedded_json,
    encode,
    kept_points,
    thinned,
)


def curve(y, *, name="a", **more):
    return Curve(name=name, group="g", kind="training", x={"step": list(range(1, len(y) + 1))}, y=y, **more)


def decoded(packed):
    """Undo `encode`, as data.js does; that one is tried in test_page_browser.py."""
    values, total = [], 0
    for item in packed["steps"].split(",") if packed["steps"] else []:
        word, _, times = item.partition("*")
        for _ in range(int(times or 1)):
            total += 0 if word == "_" else int(word)
            values.append(None if word == "_" else total / 10 ** packed["decimals"])
    return values


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=30), st.integers(0, 6))
def test_numbers_come_back_to_the_last_decimal(values, decimals):
    back = decoded(encode(values, decimals=decimals))
    assert [value is None for value in back] == [value is None for value in values]
    off = [abs(a - b) for a, b in zip(back, values, strict=True) if b is not None]
    assert max(off, default=0) <= 0.5 * 10**-decimals + 1e-9


def test_even_steps_take_no_room():
    assert encode(range(1, 10_001), decimals=0) == {"decimals": 0, "steps": "1*10000"}
    assert encode([None, None, 2.0, 2.0], decimals=0)["steps"] == "_*2,2,0"
    assert encode([], decimals=0)["steps"] == ""


def test_numbers_keep_what_a_reader_can_see():
    assert decimals_of([2.0, 2.5, 5.25], relative=True) == 4  # a ten-thousandth of the span
    assert decimals_of([0.0123, 9.5], relative=True) == 5  # a thousandth of the smallest
    assert decimals_of([0.0123, 9.5], relative=False) == 4
    assert decimals_of([0.0, 86_400.5], relative=False) == 0
    assert decimals_of([1e-30, 9.5], relative=True) == 12  # no more than a double holds
    assert decimals_of([None, 7.0], relative=True) == decimals_of([], relative=True) == 0
    assert decimals_of([2.5, 2.5], relative=False) > 0


@given(st.lists(st.one_of(st.none(), st.floats(-100, 100)), min_size=1, max_size=300), st.integers(2, 60))
def test_thinning_keeps_the_ends_and_the_extremes(y, most):
    kept = kept_points(y, most=most)
    assert kept == sorted(set(kept))
    assert {0, len(y) - 1} <= set(kept)
    assert len(kept) <= most + 2
    finite = [value for value in y if value is not None]
    if finite:
        shown = [y[index] for index in kept if y[index] is not None]
        assert (min(shown), max(shown)) == (min(finite), max(finite))


def test_a_single_spike_survives():
    y = [1.0] * 100_000
    y[71_234] = 9.0
    assert 71_234 in kept_points(y, most=2000)


def test_a_gap_stays_a_gap():
    y = [1.0] * 50 + [None] * 50 + [2.0] * 50
    assert any(y[index] is None for index in kept_points(y, most=30))


def test_short_curves_stay_whole_and_long_ones_share_what_is_left():
    random.seed(1)
    curves = [curve([random.random() for _ in range(length)]) for length in (100, 5000, 9000)]
    kept = thinned(curves, most_points=6100)
    assert kept[0] is curves[0]
    assert [len(some.y) for some in kept[1:]] == pytest.approx([3000, 3000], rel=0.05)
    assert all(len(some.x["step"]) == len(some.y) for some in kept)
    assert thinned(curves, most_points=14_100) == curves
    assert len(thinned(curves * 20, most_points=100)[1].y) == pytest.approx(500, rel=0.05)  # not to nothing


def test_thinning_takes_bands_and_marks_along():
    y = [float(i % 7) for i in range(2000)]
    band = curve(y, low=[v - 1 for v in y], high=[v + 1 for v in y], marks=[Mark(x={"step": 3}, text="m")])
    (kept,) = thinned([band], most_points=600)
    assert len(kept.y) < 700
    assert all(
        low == v - 1 and high == v + 1 for low, v, high in zip(kept.low, kept.y, kept.high, strict=True)
    )
    assert kept.marks == band.marks


def test_a_curve_with_other_places_than_values_is_our_fault():
    wrong = Curve(name="a", group="g", kind="k", x={"step": [1, 2]}, y=[1.0])
    with pytest.raises(ValueError, match="curve 'a' \\(k\\) has not as many places as values"):
        thinned([wrong])


def section(*curves):
    return Curves(
        title="Loss", curves=curves, axes=["step"], y_label="nats", off=["training"], note="Of two."
    )


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="c1">(.*?)</script>', page)[1])


def test_a_section_holds_its_data():
    told = curve([2.5, None, 1.0, float("nan")], marks=[Mark(x={"step": 2}, text="left out")])
    data = data_of(curves_html(section(told), name="c1"))
    assert (data["axes"], data["yLabel"], data["title"], data["off"]) == (
        ["step"],
        "nats",
        "Loss",
        ["training"],
    )
    (there,) = data["curves"]
    assert decoded(there["y"]) == [2.5, None, 1.0, None]
    assert decoded(there["x"]["step"]) == [1, 2, 3, 4]
    assert (there["low"], there["style"]) == (None, "line")
    assert there["marks"] == [{"x": {"step": 2}, "text": "left out"}]


def test_a_page_says_how_many_points_it_holds():
    whole = curves_html(section(curve([1.0, 2.0])), name="c1")
    assert "Of two. All 2 points are here, rounded; a screenful shows up to 2,000 of a curve" in whole
    long = curves_html(section(curve([1.5, 2.0, 3.0] * MOST_POINTS)), name="c1")
    assert re.search(r"Of two\. 1[01]\d,\d{3} of 330,000 points are here, rounded: of each stretch", long)


def test_without_javascript_there_is_a_table():
    page = curves_html(section(curve([1.0, None, *range(98)])), name="c1")
    table = re.search(r"<noscript>(.*)</noscript>", page)[1]
    cells = re.findall(r'<td class="word">training</td><td>([\d,]+)</td><td>([\d.-]+)</td>', table)
    assert len(cells) == TABLE_ROWS
    assert (cells[0], cells[-1]) == (("1", "1"), ("100", "97"))


def test_json_inside_a_page_cannot_end_its_element():
    text = embedded_json({"<!--<script>": "</script>&\u2028"})
    assert not re.search(r"[<>&\u2028]", text)
    assert json.loads(text) == {"<!--<script>": "</script>&\u2028"}
