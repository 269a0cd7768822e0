"""JSON that every parser takes."""

import json
import math
from pathlib import Path

from hardy.cli.output import plain, print_json


def test_numbers_that_json_cannot_hold_become_null(capsys):
    print_json({"a": math.nan, "b": [math.inf, 1.5], "c": {"d": (Path("x"), "é", None, True)}})
    text = capsys.readouterr().out
    assert json.loads(text, parse_constant=lambda word: pytest_fail(word)) == {
        "a": None,
        "b": [None, 1.5],
        "c": {"d": ["x", "é", None, True]},
    }


def pytest_fail(word):
    raise AssertionError(f"{word} is no JSON")


def test_plain_leaves_what_json_holds():
    assert plain({1: "a", "b": 2.5}) == {"1": "a", "b": 2.5}
