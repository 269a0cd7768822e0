"""The spool: texts in, texts out."""

import numpy as np
import pytest

from hardy.config import UserError
from hardy.data.documents import Document
from hardy.data.spool import TextSpool


@pytest.fixture
def make_spool(tmp_path):
    spools = []

    def make(*texts):
        spool = TextSpool(tmp_path / f"spool{len(spools)}")
        spools.append(spool)
        for text in texts:
            spool.add(Document("a name", text))
        return spool

    yield make
    for spool in spools:
        spool.__exit__(None, None, None)


def test_texts_come_back_in_any_order_and_empty_ones_are_left_out(make_spool):
    spool = make_spool("one", "", "zwölf", "three")
    assert len(spool) == 3 and spool.num_bytes == 14 and spool.sizes.tolist() == [3, 6, 5]
    assert [spool.text(index) for index in (2, 0, 1)] == ["three", "one", "zwölf"]
    spool.add(Document("later", "four"))
    assert spool.text(3) == "four"


def test_hashes_depend_on_the_text_alone(make_spool):
    first, second = make_spool("a", "b", "a").hashes, make_spool("b", "a").hashes
    assert first[0] == first[2] == second[1] != first[1] == second[0]


def test_half_a_surrogate_pair_is_refused(make_spool):
    with pytest.raises(UserError, match="a name is not valid Unicode: half a surrogate pair at character 2"):
        make_spool("ok\ud800")


@pytest.mark.parametrize(
    ("text", "fraction", "wanted"),
    [
        ("0123456789", 0.2, ["01234567", "89"]),
        ("ääää", 0.4, ["ää", "ää"]),
        ("0123456789", 0.01, ["0123456789"]),
        ("x", 0.5, ["x"]),
    ],
)
def test_a_tail_is_cut_between_characters(make_spool, text, fraction, wanted):
    spool = make_spool("before", text)
    spool.split_last(fraction=fraction)
    assert [spool.text(index) for index in range(len(spool))] == ["before", *wanted]
    assert spool.num_bytes == 6 + len(text.encode())


def test_a_sample_is_spread_over_all_texts(make_spool):
    spool = make_spool("a" * 1000, "b" * 3000, "c" * 9000)
    parts = list(spool.sample(np.array([0, 2]), most_bytes=2000, part_bytes=1000))
    assert len(parts) == 10 and set("".join(parts)) == {"a", "c"}
    assert {len(part) for part in parts} == {200}
    assert "".join(spool.sample(np.array([0]), most_bytes=10**6)) == "a" * 1000
