"""Plain values come back equal from strict JSON, anything else is refused by its path."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as some

from hardy.config import UserError
from hardy.train.plain import decode, encode

LEAVES = some.none() | some.booleans() | some.integers() | some.floats() | some.text()
VALUES = some.recursive(
    LEAVES,
    lambda inner: (
        some.lists(inner) | some.lists(inner).map(tuple) | some.dictionaries(some.text(max_size=5), inner)
    ),
    max_leaves=10,
)


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return a == b


@given(VALUES)
def test_everything_comes_back_as_it_was(value):
    text = json.dumps(encode(value), allow_nan=False)
    assert same(decode(json.loads(text)), value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [0, {2: 1}]}, r"plain\.a\[1\] cannot be saved: its key 2 is not a free string"),
        ({"__float__": 1}, "its key '__float__' is not a free string; rename the key"),
        (
            {"a": (1j,)},
            r"plain\.a\[0\] cannot be saved: it is a builtins.complex; a checkpoint keeps numbers",
        ),
        ({"a": {1}}, r"plain\.a cannot be saved: it is a builtins.set"),
    ],
)
def test_refusals_name_the_place(value, text):
    with pytest.raises(UserError, match=text):
        encode(value)
