"""Documents, fingerprints and the limit."""

import os

import pytest

from hardy.data.documents import Document, file_stamps, fingerprint_of, limited


def texts(documents):
    return [document.text for document in documents]


@pytest.mark.parametrize(
    ("limit_bytes", "wanted"),
    [
        (None, ["abc", "déf", "ghi"]),
        (100, ["abc", "déf", "ghi"]),
        (10, ["abc", "déf", "ghi"]),
        (7, ["abc", "déf"]),
        (5, ["abc", "d"]),
        (4, ["abc", "d"]),
        (3, ["abc"]),
    ],
)
def test_the_limit_counts_bytes_and_never_cuts_a_character(limit_bytes, wanted):
    given = [Document(name, text) for name, text in (("a", "abc"), ("b", "déf"), ("c", "ghi"))]
    assert texts(limited(iter(given), limit_bytes=limit_bytes)) == wanted


def test_the_limit_reads_no_further_than_needed():
    def endless():
        while True:
            yield Document("again", "0123456789")

    assert len(texts(limited(endless(), limit_bytes=95))) == 10


def test_stamps_notice_another_size_and_another_time(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = file_stamps([path])
    assert first == file_stamps([path]) == [(path.as_posix(), 3, path.stat().st_mtime_ns)]
    os.utime(path, ns=(0, 0))
    assert file_stamps([path]) != first


def test_fingerprints_tell_types_apart():
    assert len({fingerprint_of(1), fingerprint_of("1"), fingerprint_of(1, 1), fingerprint_of((1, 1))}) == 4
