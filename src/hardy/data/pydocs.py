"""The corpus that is already there: the sources and documentation of the Python on this machine.

Rules of this source: first the standard library, then installed packages, those hardy needs first; files
named .py .pyi .rst .txt .md of 200 bytes to 400 kB; tests, caches, tables of numbers, exact copies and files
that are not UTF-8 are left out. It differs between machines as far as their installed versions differ.
"""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from hardy.data.documents import Document, Source, fingerprint_of

DEFAULT_LIMIT_BYTES = 32_000_000
SUFFIXES = (".py", ".pyi", ".rst", ".txt", ".md")
PREFERRED_PACKAGES = ("torch", "numpy", "sympy", "matplotlib", "networkx", "rich", "fontTools", "pygments")
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
LEAST_BYTES, MOST_BYTES = 200, 400_000
MOST_DIGITS = 0.25
"""A larger share of digits marks a generated table."""


def pydocs_source(*, stdlib: Path | None = None, packages: Sequence[Path] | None = None) -> Source:
    """Return the source `pydocs`.

    Args:
        stdlib: folder of the standard library; none takes that of the running interpreter.
        packages: folders of installed packages; none takes those of the running interpreter.
    """
    paths = sysconfig.get_paths()
    stdlib = stdlib or Path(paths["stdlib"])
    folders = [Path(paths["purelib"]), Path(paths["platlib"])] if packages is None else packages
    roots = [stdlib, *_package_folders(folders)]
    return Source(read=lambda: _documents(roots), fingerprint=lambda: _fingerprint(roots))


def _package_folders(folders: Sequence[Path]) -> list[Path]:
    """Return the folder of each package: the preferred ones in their order, then the others by name."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.is_dir() and path.name.isidentifier() and path.name not in SKIPPED_FOLDERS:
                found.setdefault(path.name, path)
    rank = {name: place for place, name in enumerate(PREFERRED_PACKAGES)}
    return [found[name] for name in sorted(found, key=lambda name: (rank.get(name, len(rank)), name))]


def _files(root: Path) -> Iterator[tuple[str, Path, int]]:
    """Yield name, path and size in bytes of each candidate below `root`, in sorted order."""
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if name not in SKIPPED_FOLDERS and name[0] != ".")
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(SUFFIXES) and path.is_file():
                size = path.stat().st_size
                if LEAST_BYTES <= size <= MOST_BYTES:
                    yield f"{root.name}/{path.relative_to(root).as_posix()}", path, size


def _documents(roots: Sequence[Path]) -> Iterator[Document]:
    """Yield each file that passes the rules of this source."""
    seen: set[bytes] = set()
    for root in roots:
        for name, path, _ in _files(root):
            contents = path.read_bytes()
            digest = hashlib.blake2b(contents, digest_size=16).digest()
            digits = sum(map(contents.count, b"0123456789"))
            if digest in seen or digits > MOST_DIGITS * len(contents):
                continue
            seen.add(digest)
            try:
                yield Document(name, contents.decode("utf-8"))
            except UnicodeDecodeError:
                continue


def _fingerprint(roots: Sequence[Path]) -> str:
    """Depend on the interpreter's version and on the names and sizes of the files."""
    listing = [(name, size) for root in roots for name, _, size in _files(root)]
    return fingerprint_of("pydocs-1", sys.version_info[:3], listing)
