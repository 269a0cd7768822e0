"""Texts with labels for probes: a user's JSONL file, or built-in questions about this machine's Python."""

import ast
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hardy.config import UserError
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
    """Texts and the class of each."""

    texts: list[str]
    labels: list[str]

    def check(self, *, where: str) -> None:
        """Refuse what no probe can be trained and tested on.

        Raises:
            UserError: fewer than two classes, or a class with fewer than two texts.
        """
        counts = Counter(self.labels)
        if len(counts) < 2:
            raise UserError(
                f"{where} has {len(counts)} classes ({', '.join(counts) or 'no text at all'}); a probe "
                f"needs at least two"
            )
        rare = [name for name, count in counts.items() if count < 2]
        if rare:
            raise UserError(
                f"{where}: class {rare[0]!r} has one text, and one is needed to train and one to test; "
                f"give it at least two, or leave it out"
            )


def read_labels(path: Path) -> Examples:
    """Read a file of lines {"text": ..., "label": ...}; empty lines are passed over.

    Raises:
        UserError: it cannot be read, or a line is not as it should be.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels {path} cannot be read: {error}") from None
    pairs = [_pair(line, where=f"{path}:{n}") for n, line in enumerate(lines, start=1) if line.strip()]
    return Examples(texts=[text for text, _ in pairs], labels=[label for _, label in pairs])


def _pair(line: str, *, where: str) -> tuple[str, str]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is no JSON: {error}") from None
    for key in ("text", "label"):
        if not isinstance(found, dict) or key not in found:
            raise UserError(f'{where} has no "{key}"; a line is {{"text": "...", "label": "..."}}')
    if not isinstance(found["text"], str) or not found["text"]:
        raise UserError(f'{where}: "text" must be text that is not empty, got {found["text"]!r}')
    if not isinstance(found["label"], str | int) or found["label"] == "":
        raise UserError(f'{where}: "label" must be text or a whole number, got {found["label"]!r}')
    return found["text"], str(found["label"])


def _module_snippets(documents: Iterable[Document]) -> Iterator[tuple[str, str]]:
    """Yield pieces of source files and the package that each is from."""
    for document in documents:
        parts = document.name.split("/")
        if len(parts) > 2 and parts[1] in MODULES:
            for piece in _pieces(document.text):
                yield piece, parts[1]


def _pieces(text: str) -> Iterator[str]:
    """Yield runs of whole lines of about `SNIPPET_CHARACTERS`."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= SNIPPET_CHARACTERS:
            yield piece[:SNIPPET_CHARACTERS]
            piece = ""


def _docstrings_and_code(documents: Iterable[Document]) -> Iterator[tuple[str, str]]:
    """Yield docstrings, and functions without theirs."""
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
                yield docstring[:SNIPPET_CHARACTERS], "docstring"
            if isinstance(node, ast.ClassDef):
                continue
            code = "\n".join(ast.unparse(inner) for inner in node.body[bool(docstring) :])
            if len(code) >= LEAST_CHARACTERS:
                yield code[:SNIPPET_CHARACTERS], "code"


Task = Callable[[Iterable[Document]], Iterator[tuple[str, str]]]
TASKS: dict[str, tuple[Task, str]] = {
    "module": (_module_snippets, "which package of the standard library a piece of source is from"),
    "docstring": (_docstrings_and_code, "whether a text is a docstring or the code of a function"),
}
"""Built-in questions; nothing is downloaded."""


def built_in(name: str, *, num_examples: int, seed: int, documents: Sequence[Document] = ()) -> Examples:
    """Return about `num_examples` texts of a built-in task, as many of each class.

    Args:
        name: in `TASKS`.
        num_examples: in all.
        seed: of the draw.
        documents: to take texts from; none takes the standard library of the running Python.
    """
    found: dict[str, dict[str, None]] = {}
    for text, label in TASKS[name][0](documents or pydocs_source(packages=[]).read()):
        found.setdefault(label, {})[text] = None  # a text counts once
    share = max(2, num_examples // max(1, len(found)))
    texts: list[str] = []
    labels: list[str] = []
    for label in sorted(found):
        order = numpy_generator_for(seed, "probe", name, label).permutation(len(found[label]))
        all_texts = list(found[label])
        texts += [all_texts[place] for place in order[:share]]
        labels += [label] * min(share, len(order))
    return Examples(texts=texts, labels=labels)
