"""What the documentation shows works: links resolve, Python runs, TOML parses, commands are understood.

```python blocks run, all of one page in one namespace; ```toml blocks parse as a run; `hardy ...` lines of
```sh blocks are checked without being run: `hardy train` by --dry-run, other verbs by their parser. A block
whose fence says `not-run` after the language is left out.
"""

import contextlib
import io
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from hardy.cli.main import VERBS, main, parse
from hardy.cli.settings import resolve

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/*/README.md")]
    if path.is_file()
)
FENCE = re.compile(r"^```(?P<language>\w+)(?P<marks>[^\n]*)\n(?P<body>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path, language):
    found = FENCE.finditer(path.read_text(encoding="utf-8"))
    return [m["body"] for m in found if m["language"] == language and "not-run" not in m["marks"]]


def commands(block):
    """Return the words of each `hardy` line; a trailing backslash goes on in the next line."""
    lines = block.replace("\\\n", " ").splitlines()
    split = [shlex.split(line.strip().removeprefix("$ "), comments=True) for line in lines]
    return [words[1:] for words in split if words and words[0] == "hardy"]


def check_command(words, folder):
    if words[0] == "train":
        assert main([*words, *([] if "--dry-run" in words else ["--dry-run"])]) == 0
    else:
        assert words[0] in VERBS
        parse(words)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_relative_links_resolve(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    broken = [
        link
        for link in LINK.findall(text)
        if not re.match(r"[a-z]+:|#", link) and not (path.parent / link.split("#")[0]).exists()
    ]
    assert broken == []


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_python_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks(path, "python"):
            exec(compile(block, str(path), "exec"), namespace)


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p, "toml")], ids=name_of)
def test_toml_blocks_are_runs(path, tmp_path):
    for block in blocks(path, "toml"):
        tomllib.loads(block)
        (tmp_path / "run.toml").write_text(block, encoding="utf-8")
        resolve(str(tmp_path / "run.toml"))


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p, "sh")], ids=name_of)
def test_commands_are_understood(path, tmp_path, monkeypatch, capsys):
    shown = [block for language in ("toml",) for block in blocks(path, language)]
    monkeypatch.chdir(tmp_path)
    for words in [words for block in blocks(path, "sh") for words in commands(block)]:
        for word in words:
            if word.endswith(".toml") and shown:
                (tmp_path / word).write_text(shown[0], encoding="utf-8")
        check_command(words, tmp_path)


def test_a_fence_is_found_with_its_language_and_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na = 1\n```\ntext\n```python not-run\nb\n```\n```sh\n$ hardy train \\\n tiny  # c\n```\n"
    )
    assert blocks(page, "python") == ["a = 1\n"]
    assert [words for block in blocks(page, "sh") for words in commands(block)] == [["train", "tiny"]]


def test_a_wrong_command_is_noticed(tmp_path):
    with pytest.raises(Exception, match="there is no option '--jsn'"):
        check_command(["doctor", "--jsn"], tmp_path)
