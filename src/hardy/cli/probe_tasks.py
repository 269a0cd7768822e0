"""Texts with labels for probes: a user's JSONL file, or built-in questions about this machine's Python."""

import ast
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hardy.config import UserError, reason_of
from hardy.data.documents import Document
from hardy.data.pydocs import pydocs_source
from hardy.rng import numpy_generator_for

SNIPPET_CHARACTERS = 400
LEAST_CHARACTERS = 120
MODULES = ("asyncio", "concurrent", "ctypes", "email", "encodings", "html", "http", "importlib", "json") + (
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)
"""Packages of the standard library that every supported Python has."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Texts, and class and group of each; a group stays on one side of the split."""

    texts: list[str]
    labels: list[str]
    groups: list[str]

    def check(self, *, where: str) -> None:
        """Refuse fewer than two classes.

        Raises:
            UserError: so it is.
        """
        names = sorted(set(self.labels))
        if len(names) < 2:
            raise UserError(
                f"{where} has {len(names)} classes ({', '.join(names) or 'no text at all'}); a probe "
                f"needs at least two"
            )


def read_labels(path: Path) -> Examples:
    """Read a file of lines {"text": ..., "label": ..., "group": ...}; empty lines are passed over.

    A line without a group is one of its own; lines of equal text then are one.

    Raises:
        UserError: it cannot be read, or a line is not as it should be.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels {path} cannot be read: {reason_of(error)}") from None
    found = [_read(line, where=f"{path}:{n}") for n, line in enumerate(lines, start=1) if line.strip()]
    return _examples(found)


def _examples(found: Iterable[tuple[str, str, str]]) -> Examples:
    """Return texts, labels and groups in three lists."""
    texts, labels, groups = [list(column) for column in zip(*found, strict=True)] or [[], [], []]
    return Examples(texts=texts, labels=labels, groups=groups)


def _read(line: str, *, where: str) -> tuple[str, str, str]:
    """Return text, label and group of a line."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is no JSON: {error}") from None
    for key in ("text", "label"):
        if not isinstance(found, dict) or key not in found:
            raise UserError(f'{where} has no "{key}"; a line is {{"text": "...", "label": "..."}}')
    text = found["text"]
    if not isinstance(text, str) or not text:
        raise UserError(f'{where}: "text" must be text that is not empty, got {text!r}')
    for key in ("label", "group"):
        value = found.get(key, 0)
        if not isinstance(value, str | int) or value == "":
            raise UserError(f'{where}: "{key}" must be text or a whole number, got {value!r}')
    group = f"group {found['group']}" if "group" in found else f"text {text}"
    return text, str(found["label"]), group


def _module_snippets(documents: Iterable[Document]) -> Iterator[tuple[str, str, str]]:
    """Yield pieces of source files, the package that each is from, and the file."""
    for document in documents:
        parts = document.name.split("/")
        if len(parts) > 2 and parts[1] in MODULES:
            for piece in _pieces(document.text):
                yield piece, parts[1], document.name


def _pieces(text: str) -> Iterator[str]:
    """Yield runs of whole lines of about `SNIPPET_CHARACTERS`."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= SNIPPET_CHARACTERS:
            yield piece[:SNIPPET_CHARACTERS]
            piece = ""


def _docstrings_and_code(documents: Iterable[Document]) -> Iterator[tuple[str, str, str]]:
    """Yield docstrings, and functions without theirs, and the file of each."""
    for document in documents:
        if not document.name.endswith(".py"):
            continue
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                continue
            docstring = ast.get_docstring(node) or ""
            if len(docstring) >= LEAST_CHARACTERS:
                yield docstring[:SNIPPET_CHARACTERS], "docstring", document.name
            if isinstance(node, ast.ClassDef):
                continue
            code = "\n".join(ast.unparse(inner) for inner in node.body[bool(docstring) :])
            if len(code) >= LEAST_CHARACTERS:
                yield code[:SNIPPET_CHARACTERS], "code", document.name


Task = Callable[[Iterable[Document]], Iterator[tuple[str, str, str]]]
TASKS: dict[str, tuple[Task, str]] = {
    "module": (_module_snippets, "which package of the standard library a piece of source is from"),
    "docstring": (_docstrings_and_code, "whether a text is a docstring or the code of a function"),
}
"""Built-in questions; nothing is downloaded."""


def built_in(name: str, *, num_examples: int, seed: int, documents: Sequence[Document] = ()) -> Examples:
    """Return about `num_examples` texts of a built-in task, as many of each class; groups are files.

    Args:
        name: in `TASKS`.
        num_examples: in all.
        seed: of the draw.
        documents: to take texts from; none takes the standard library of the running Python.
    """
    found: dict[str, dict[str, str]] = {}
    for text, label, file in TASKS[name][0](documents or pydocs_source(packages=[]).read()):
        found.setdefault(label, {}).setdefault(text, file)  # a text counts once
    share = max(2, num_examples // max(1, len(found)))
    drawn: list[tuple[str, str, str]] = []
    for label in sorted(found):
        order = numpy_generator_for(seed, "probe", name, label).permutation(len(found[label]))
        all_texts = list(found[label].items())
        texts = [all_texts[place] for place in order]
        drawn += [(text, label, file) for text, file in _of_two_files(texts, share)]
    return _examples(drawn)


def _of_two_files(texts: list[tuple[str, str]], share: int) -> list[tuple[str, str]]:
    """Return the first `share` texts; if they are of one file, the last gives way to one of another."""
    first = texts[:share]
    if len({file for _, file in first}) == 1:
        other = next((pair for pair in texts[share:] if pair[1] != first[0][1]), None)
        first = first if other is None else [*first[:-1], other]
    return first
