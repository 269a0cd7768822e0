"""The log of elections and its way back."""

import json

import pytest

from hardy.config import UserError
from hardy.distributed.robust.election_log import Elected, ElectionLog, read_log


def test_a_log_comes_back_and_holds_what_was_counted(tmp_path):
    path = tmp_path / "elections.jsonl"
    log = ElectionLog(path)
    log.write(Elected(step=3, elected=(0, 4), offsets_s={4: 0.1, 0: 0.25}, attempts=2, late=1))
    log.write(Elected(step=4, elected=(1,)))
    assert read_log(path) == {3: (0, 4), 4: (1,)}
    line = json.loads(path.read_text().splitlines()[0])
    assert line["offsets_s"] == {"4": 0.1, "0": 0.25} and line["attempts"] == 2 and line["late"] == 1


def test_a_full_disk_ends_the_log_and_not_the_run(tmp_path, caplog):
    log = ElectionLog(tmp_path)  # a folder cannot be written, as a full disk cannot
    log.write(Elected(step=7, elected=(0,)))
    log.write(Elected(step=8, elected=(0,)))
    assert caplog.text.count("the log of elections ends before step 7, and cannot be replayed") == 1


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "{}",
        '{"step": -1, "elected": [0]}',
        '{"step": 1, "elected": []}',
        '{"step": 1, "elected": [0, 0]}',
    ]
    + ['{"step": true, "elected": [0]}', '{"step": 1, "elected": ["0"]}', '{"step": 1, "elected": 3}', "[1]"],
)
def test_what_is_no_log_is_refused_with_its_line(tmp_path, text):
    path = tmp_path / "elections.jsonl"
    path.write_text('{"step": 0, "elected": [0]}\n' + text + "\n")
    with pytest.raises(UserError, match=r"line 2 of .*elections.jsonl is no line of a log of elections"):
        read_log(path)


def test_a_log_that_is_missing_or_binary_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"the log of elections .*none.jsonl: No such file or directory$"):
        read_log(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read the log of elections"):
        read_log(tmp_path / "binary")
