"""Documents from files: which files a setting means, and the readers of text and of JSON lines."""

import difflib
import glob
import gzip
import json
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hardy.config import UserError
from hardy.data.documents import Document

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .org .log .csv .tsv .py .pyi .ipynb .c .h .cc .cpp .hpp .cu .cuh .rs .go .java"
    " .kt .scala .js .jsx .ts .tsx .rb .php .pl .lua .swift .r .jl .m .hs .ml .lisp .el .sh .sql .html .css"
    " .xml .yaml .yml .toml .ini .cfg .json".split()
)
"""What counts as plain text in a folder; a file given by name or pattern is taken whatever its ending."""


def expand(patterns: str, *, formats: tuple[str, ...]) -> list[Path]:
    """Return the files that comma-separated paths, folders and patterns mean, sorted, each once.

    Args:
        patterns: the setting after `files:`; `**` in a pattern goes through folders.
        formats: endings of files with a reader of their own, looked for in folders beside plain text.

    Raises:
        UserError: a path does not exist, or a folder or pattern yields no file.
    """
    found: set[Path] = set()
    for pattern in (part.strip() for part in patterns.split(",")):
        path = Path(pattern).expanduser()
        if pattern and path.is_dir():
            matches = _files_below(path, formats)
            if not matches:
                raise UserError(f"data.source=files:{patterns}: no text file is in the folder {path}")
        elif pattern and path.exists():
            matches = [path]
        elif glob.has_magic(pattern):
            matches = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
            if not matches:
                raise UserError(
                    f"data.source=files:{patterns}: no file matches {pattern!r} (in {Path.cwd()})"
                )
        else:
            raise UserError(
                f"data.source=files:{patterns}: there is no file or folder {pattern!r}{_near(path)}"
            )
        found.update(matches)
    return sorted(found)


def read_text(path: Path, text_field: str) -> Iterator[Document]:
    """Yield the one document a text file is; it must be UTF-8. `text_field` says nothing here."""
    del text_field
    yield Document(str(path), decoded(path.read_bytes(), path=path).removeprefix("\ufeff"))


def read_json_lines(path: Path, text_field: str) -> Iterator[Document]:
    """Yield a document for each line of a .jsonl or .jsonl.gz file; empty lines are passed over.

    Raises:
        UserError: a line is no JSON object, or its field `text_field` is missing or no text.
    """
    offset = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                text = decoded(line, path=path, offset=offset).removeprefix("\ufeff")
                offset += len(line)
                if text.strip():
                    where = f"{path}, line {number}"
                    yield Document(
                        where, text_of(_parsed(text.rstrip("\r\n"), where), text_field, where=where)
                    )
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(
                f"{path} is damaged or incomplete: {error}; fetch or compress it again"
            ) from error


def text_of(row: Any, text_field: str, *, where: str) -> str:
    """Return the text of a row, or raise UserError naming the fields there are."""
    if not isinstance(row, dict):
        raise UserError(f"{where} holds {type(row).__name__}, not an object with a field {text_field!r}")
    if text_field not in row:
        fields = ", ".join(map(str, row)) or "none"
        raise UserError(f"{where} has no field {text_field!r} (data.text_field); its fields: {fields}")
    text = row[text_field]
    if not isinstance(text, str):
        fields = ", ".join(str(name) for name, value in row.items() if isinstance(value, str)) or "none"
        raise UserError(
            f"{where}: field {text_field!r} (data.text_field) holds {type(text).__name__}, not text; "
            f"fields with text: {fields}"
        )
    return text


def decoded(contents: bytes, *, path: Path, offset: int = 0) -> str:
    """Decode UTF-8, or raise UserError naming the file and the offset of the first wrong byte in it."""
    try:
        return contents.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: byte 0x{contents[error.start]:02x} at offset {offset + error.start}; "
            "convert it (iconv -f LATIN1 -t UTF-8) or leave it out of data.source"
        ) from None


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None


def _files_below(folder: Path, formats: tuple[str, ...]) -> list[Path]:
    """Return the files with text below a folder; hidden ones are passed over."""
    found: list[Path] = []
    others = 0
    for parent, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            wanted = path.suffix.lower() in TEXT_SUFFIXES or path.name.endswith(formats)
            if wanted and path.is_file():
                found.append(path)
            else:
                others += 1
    if others:
        logger.info("%s: %d files whose ending is not known as text are left out", folder, others)
    return found


def _near(path: Path) -> str:
    """Return a hint at the name that was probably meant."""
    folder = path.parent
    close = difflib.get_close_matches(path.name, os.listdir(folder), n=1) if folder.is_dir() else []
    return f"; did you mean {str(folder / close[0])!r}?" if close else f" (looked from {Path.cwd()})"
