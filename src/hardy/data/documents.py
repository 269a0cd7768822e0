"""What every source of text gives: documents to read, and a cheap fingerprint to recognise them by."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Document:
    """One text."""

    name: str
    """Where it came from, for messages: a path, or a path and a line."""
    text: str
    """The text itself."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A place that documents are read from."""

    read: Callable[[], Iterator[Document]]
    """Yields the documents, always in the same order."""
    fingerprint: Callable[[], str]
    """Changes when the documents may have changed; reads no contents."""
    expected_bytes: int | None = None
    """About how many bytes `read` will go through; none where nobody knows."""


def fingerprint_of(*parts: object) -> str:
    """Return 32 hexadecimal digits that depend on the `repr` of plain values alone.

    Example:
        >>> fingerprint_of("a", 1) == fingerprint_of("a", 1) != fingerprint_of("a", 2)
        True
    """
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def file_stamps(paths: list[Path]) -> list[tuple[str, int, int]]:
    """Return path, size in bytes and time of change of each file, by which a changed file is noticed."""
    stamps = [(path, path.stat()) for path in sorted(paths)]
    return [(path.as_posix(), stamp.st_size, stamp.st_mtime_ns) for path, stamp in stamps]


def limited(documents: Iterator[Document], *, limit_bytes: int | None) -> Iterator[Document]:
    """Stop after `limit_bytes` of text; the document that crosses the limit is cut there.

    Example:
        >>> [document.text for document in limited(iter([Document("a", "12345")] * 3), limit_bytes=7)]
        ['12345', '12']
    """
    left = limit_bytes
    for document in documents:
        if left is None:
            yield document
            continue
        # A character has at most four bytes, so most documents need no encoding to be let through.
        size = len(document.text) if document.text.isascii() else len(_encoded(document.text))
        if size >= left:
            yield Document(document.name, _encoded(document.text)[:left].decode("utf-8", errors="ignore"))
            return
        left -= size
        yield document


def _encoded(text: str) -> bytes:
    # Half a surrogate pair is refused later, where the document is stored, with its name.
    return text.encode("utf-8", errors="replace")
