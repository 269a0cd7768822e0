"""Sizes of files and functions, a test file for each source file, no drawers."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "hardy"
TESTS = ROOT / "tests"
MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 500, 80, 8
EXEMPT: set[str] = {"__main__.py"}
"""Source files without a test file of their own; this set may only shrink."""
SOURCES = sorted(path for path in SRC.rglob("*.py") if path.name != "__init__.py")


def name_of(path):
    return path.relative_to(SRC).as_posix()


def test_every_source_file_has_its_test_file():
    missing = {
        name_of(path)
        for path in SOURCES
        if not (TESTS / path.relative_to(SRC).parent / f"test_{path.name}").exists()
    }
    assert missing - EXEMPT == set(), "these source files have no test file"
    assert EXEMPT - missing == set(), "these have one now, or are gone: take them out of EXEMPT"


def follows_a_source_file(path):
    """Whether tests/ROOM/test_MODULE.py, or test_MODULE_ASPECT.py, has its src/hardy/ROOM/MODULE.py."""
    words = path.stem.removeprefix("test_").split("_")
    room = SRC / path.relative_to(TESTS).parent
    return any((room / ("_".join(words[:count]) + ".py")).exists() for count in range(1, len(words) + 1))


def test_every_test_file_of_a_room_follows_a_source_file():
    rooms = [TESTS, *(TESTS / path.name for path in SRC.iterdir() if path.is_dir())]
    tests = [path for room in rooms for path in room.glob("test_*.py")]
    assert len(tests) > 10
    assert [str(path) for path in tests if not follows_a_source_file(path)] == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sizes(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES, "split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MOST_FUNCTION_LINES, f"{node.name} has {lines} lines"
            given = [a for a in [*node.args.posonlyargs, *node.args.args] if a.arg not in ("self", "cls")]
            count = len(given) + len(node.args.kwonlyargs)
            assert count <= MOST_PARAMETERS, f"{node.name} takes {count} parameters"


def test_there_are_no_drawers():
    drawers = {"utils", "util", "common", "helpers", "misc"}
    assert [name_of(path) for path in SRC.rglob("*") if path.stem in drawers] == []


def test_every_module_says_what_it_is_for():
    silent = [
        name_of(path) for path in SRC.rglob("*.py") if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_the_citations_are_the_nine_papers():
    cited = re.findall(r"eprint\s*=\s*\{([\d.]+)\}", (ROOT / "CITATION.bib").read_text())
    assert sorted(cited) == [
        f"2412.{n}" for n in ("04718", "05270", "07151", "07210", "07252", "07894", "07971", "08424", "08894")
    ]


def test_the_pinned_versions_cover_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {re.match(r"[\w-]+", line)[0] for line in wanted} <= set(pinned)


def test_make_test_runs_every_test_that_starts_processes():
    line = re.search(r"^PROCESSES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line is not None
    places = [ROOT / word for word in line[1].split()]
    mark = "pytest.mark." + "mp"
    files = [path for path in TESTS.rglob("test_*.py") if mark in path.read_text()]
    assert files and [path for path in files if not any(path.is_relative_to(place) for place in places)] == []
