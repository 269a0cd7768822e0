"""Records: there and back exactly, and what is refused."""

import pytest
import torch

from hardy.distributed.gossip.message import SIZE, Flag, Record, RefusedError, run_id

RECORD = Record(
    run=run_id("settings"),
    generation=3,
    sender=2**31,
    round=2**40,
    weights_round=2**40,
    share=1 / 3,
    mass=0.1 + 0.2,
    flags=Flag.LATE | Flag.MORE,
)


def test_a_record_comes_back_bit_for_bit():
    data = RECORD.pack()
    assert data.dtype == torch.uint8 and data.shape == (SIZE,) and SIZE == 56
    assert Record.parse(data) == RECORD


@pytest.mark.parametrize("place", [0, 3, 4])
def test_other_bytes_at_the_head_are_no_record(place):
    data = RECORD.pack()
    data[place] += 1
    with pytest.raises(RefusedError, match="no record of version 1"):
        Record.parse(data)


def test_records_of_another_length_are_none():
    with pytest.raises(RefusedError, match=f"a record has {SIZE} bytes, got {SIZE - 1}"):
        Record.parse(RECORD.pack()[:-1])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"run": 1}, "belongs to another run"),
        ({"generation": 2}, "from replica 2147483648 of generation 2, expected was replica"),
        ({"sender": 1}, "from replica 1 of generation 3"),
        ({"share": 1.5}, "its share 1.5 or mass"),
        ({"share": float("nan")}, "cannot be"),
        ({"mass": -0.1}, "mass -0.1 cannot be"),
        ({"mass": float("inf")}, "mass inf cannot be"),
    ],
)
def test_records_that_do_not_belong_here_are_refused(changes, text):
    expected = {"run": RECORD.run, "generation": RECORD.generation, "sender": RECORD.sender}
    RECORD.check(**expected)
    with pytest.raises(RefusedError, match=text):
        Record(**{**vars(RECORD), **changes}).check(**expected)


def test_runs_with_other_settings_have_other_names():
    assert run_id("a") != run_id("b") and 0 <= run_id("a") < 2**64
