"""Numbers and tables as text."""

import pytest

from hardy.optim.table_text import aligned, bytes_text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_100_000, "2.1 MB"), (53.9e9, "53.90 GB")],
)
def test_bytes_in_powers_of_ten(size, text):
    assert bytes_text(size) == text


def test_words_stand_left_and_numbers_right():
    rows = [("name", "kind", "bytes"), ("a", "long kind", "5"), ("longer", "b", "1,234")]
    assert aligned(rows, words=2).split("\n") == [
        "name    kind       bytes",
        "a       long kind      5",
        "longer  b          1,234",
    ]


def test_rows_of_different_length_are_refused():
    with pytest.raises(ValueError):
        aligned([("a", "b"), ("c",)], words=1)
