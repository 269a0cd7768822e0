"""Sizes of files and functions, a test file for each source file, no drawers."""

import ast
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


def test_every_test_file_of_a_room_follows_a_source_file():
    rooms = {path.name for path in SRC.iterdir() if path.is_dir()}
    tests = [path for room in rooms for path in (TESTS / room).glob("test_*.py")] + list(
        TESTS.glob("test_*.py")
    )
    assert len(tests) > 10
    strays = [
        path.relative_to(TESTS).as_posix()
        for path in tests
        if not (SRC / path.relative_to(TESTS).parent / path.name.removeprefix("test_")).exists()
    ]
    assert strays == []


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
