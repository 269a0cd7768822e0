"""Files: what a setting means, and what is wrong with a file."""

import gzip
import json
import logging

import pytest

from hardy.config import UserError
from hardy.data.files import expand, read_json_lines, read_text

FORMATS = (".jsonl", ".parquet")


def names(folder, patterns):
    return [path.relative_to(folder).as_posix() for path in expand(patterns, formats=FORMATS)]


@pytest.fixture
def folder(write_files):
    return write_files(
        {"a.txt": "a", "deep/er/b.md": "b", "deep/c.jsonl": "{}", "d.bin": "d", ".hidden/e.txt": "e"}
    )


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("{}", ["a.txt", "deep/c.jsonl", "deep/er/b.md"]),
        ("{}/a.txt", ["a.txt"]),
        ("{}/d.bin", ["d.bin"]),
        ("{}/*.txt", ["a.txt"]),
        ("{}/**/*", ["a.txt", "d.bin", "deep/c.jsonl", "deep/er/b.md"]),
        ("{}/deep/**/*.md, {}/*.txt,{}/a.txt", ["a.txt", "deep/er/b.md"]),
    ],
)
def test_paths_folders_and_patterns(folder, pattern, wanted):
    assert names(folder, pattern.replace("{}", str(folder))) == wanted


def test_what_a_folder_leaves_out_is_logged(folder, caplog):
    with caplog.at_level(logging.INFO):
        expand(str(folder), formats=FORMATS)
    assert "1 files whose ending is not known as text are left out" in caplog.text


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("{}/*.rst", r"data.source=files:.*no file matches '.*/\*.rst'"),
        ("{}/b.txt", "there is no file or folder '.*/b.txt'; did you mean '.*a.txt'"),
        ("nowhere/at/all", r"there is no file or folder 'nowhere/at/all' \(looked from "),
        ("{}/empty", "no text file is in the folder .*/empty"),
        ("", "there is no file or folder ''"),
    ],
)
def test_nothing_there_is_said(folder, pattern, said):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=said):
        expand(pattern.replace("{}", str(folder)), formats=FORMATS)


def test_a_text_file_is_one_document_without_its_mark(write_files):
    folder = write_files({"a.txt": "\ufeffgrüße\r\n"})
    (document,) = read_text(folder / "a.txt", "text")
    assert (document.name, document.text) == (str(folder / "a.txt"), "grüße\r\n")


def test_wrong_utf8_names_file_and_offset(write_files):
    folder = write_files({"a.txt": b"abc\xffdef", "b.jsonl": b'{"text": "ok"}\n{"text": "\xe9"}\n'})
    with pytest.raises(UserError, match="a.txt is not UTF-8: byte 0xff at offset 3; convert it"):
        list(read_text(folder / "a.txt", "text"))
    with pytest.raises(UserError, match="b.jsonl is not UTF-8: byte 0xe9 at offset 25; convert it"):
        list(read_json_lines(folder / "b.jsonl", "text"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_each_json_line_is_a_document(write_files, name):
    lines = "\n".join(
        ["", json.dumps({"text": "one"}), "  ", json.dumps({"text": "zwölf", "id": 2})]
    ).encode()
    folder = write_files({name: gzip.compress(lines) if name.endswith("gz") else lines})
    found = [(document.name, document.text) for document in read_json_lines(folder / name, "text")]
    assert found == [(f"{folder / name}, line 2", "one"), (f"{folder / name}, line 4", "zwölf")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": ', "a.jsonl, line 2 is not JSON: Expecting value at column 10"),
        ('["text"]', "a.jsonl, line 2 holds list, not an object with a field 'text'"),
        ('{"body": "x", "id": 1}', r"line 2 has no field 'text' \(data.text_field\); its fields: body, id"),
        (
            '{"text": 3, "body": "x"}',
            r"line 2: field 'text' \(data.text_field\) holds int, not text; .* body",
        ),
        ('{"text": null}', "holds NoneType, not text; fields with text: none"),
    ],
)
def test_a_bad_json_line_names_file_line_and_fields(write_files, line, said):
    folder = write_files({"a.jsonl": '{"text": "fine"}\n' + line + "\n"})
    with pytest.raises(UserError, match=said):
        list(read_json_lines(folder / "a.jsonl", "text"))


def test_a_cut_off_archive_is_said(write_files):
    folder = write_files(
        {"a.jsonl.gz": gzip.compress(b'{"text": "fine"}\n' * 99)[:-9], "b.jsonl.gz": b"plain"}
    )
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        with pytest.raises(UserError, match=f"{name} is damaged or incomplete"):
            list(read_json_lines(folder / name, "text"))
