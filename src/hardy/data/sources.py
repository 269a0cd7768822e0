"""Where text comes from: the table of sources, and those that need an optional package.

pydocs                       Python sources and documentation of this machine (`pydocs.py`)
files:PATH[,PATH...]         files, folders, patterns with ** (`files.py`); text, .jsonl, .jsonl.gz, .parquet
hf:NAME[@SUBSET][:SPLIT]     a data set of the Hugging Face hub, or a local path; remote ones are streamed
synthetic:DISTRIBUTION[,...] documents of chosen lengths (`synthetic.py`)
"""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hardy.config import ConfigError, UserError, unknown_name
from hardy.data.config import DataConfig
from hardy.data.documents import Document, Source, file_stamps, fingerprint_of, limited
from hardy.data.files import expand, read_json_lines, read_text, text_of
from hardy.data.pydocs import DEFAULT_LIMIT_BYTES, pydocs_source
from hardy.data.synthetic import synthetic_source

Reader = Callable[[Path, str], Iterator[Document]]


def open_source(config: DataConfig) -> Source:
    """Return the source that `data.source` names, limited to `data.limit_mb`.

    Raises:
        ConfigError: the setting cannot be read.
        UserError: there is nothing to read where it points, or a package is missing.
    """
    kind, _, rest = config.source.partition(":")
    if kind not in SOURCES:
        raise ConfigError(f"data.source={config.source}: " + unknown_name(kind, "source", SOURCES))
    source = SOURCES[kind](rest, config)
    limit_bytes = None if config.limit_mb is None else int(config.limit_mb * 1e6)
    if kind == "pydocs" and limit_bytes is None:
        limit_bytes = DEFAULT_LIMIT_BYTES
    expected = [size for size in (source.expected_bytes, limit_bytes) if size is not None]
    return replace(
        source,
        read=lambda: limited(_readable(source.read()), limit_bytes=limit_bytes),
        fingerprint=lambda: fingerprint_of(source.fingerprint(), limit_bytes),
        expected_bytes=min(expected, default=None),
    )


def documents(config: DataConfig) -> Iterator[Document]:
    """Yield the documents of the configured source, always in the same order."""
    return open_source(config).read()


def fingerprint(config: DataConfig) -> str:
    """Return what changes when the documents may have changed, without reading them."""
    return open_source(config).fingerprint()


def _readable(documents: Iterator[Document]) -> Iterator[Document]:
    """Tell the user about files that cannot be read."""
    try:
        yield from documents
    except OSError as error:
        name = error.filename or "a file"
        raise UserError(f"data.source: {name} cannot be read: {error.strerror or error}") from error


def _pydocs(rest: str, config: DataConfig) -> Source:
    if rest:
        raise ConfigError(
            f"data.source={config.source}: pydocs takes no argument; data.limit_mb sets its size"
        )
    return pydocs_source()


def _files(rest: str, config: DataConfig) -> Source:
    paths = expand(rest, formats=tuple(READERS))
    if any(path.name.endswith(".parquet") for path in paths):
        _package("pyarrow.parquet", extra="parquet", setting=config.source)

    def read() -> Iterator[Document]:
        for path in paths:
            reader = next((READERS[end] for end in READERS if path.name.endswith(end)), read_text)
            yield from reader(path, config.text_field)

    return Source(
        read=read,
        fingerprint=lambda: fingerprint_of("files-1", file_stamps(paths), config.text_field),
        expected_bytes=sum(path.stat().st_size for path in paths),
    )


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    """Yield a document for each row of a Parquet file."""
    parquet = _package("pyarrow.parquet", extra="parquet", setting=f"files:{path}")
    pyarrow = importlib.import_module("pyarrow")
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise UserError(
                    f"{path} has no column {text_field!r} (data.text_field); its columns: {', '.join(names)}"
                )
            number = 0
            for block in table.iter_batches(columns=[text_field], batch_size=1024):
                for row in block.to_pylist():
                    number += 1
                    where = f"{path}, row {number}"
                    yield Document(where, text_of(row, text_field, where=where))
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is no readable Parquet file: {error}") from None


def _hf(rest: str, config: DataConfig) -> Source:
    name, _, split = rest.partition(":")
    if not name:
        raise ConfigError(
            f"data.source={config.source}: write hf:NAME_OR_PATH[:SPLIT], such as hf:roneneldan/TinyStories"
        )
    datasets = _package("datasets", extra="hf", setting=config.source)
    path = Path(name).expanduser()

    def read() -> Iterator[Document]:
        with _explained(config.source):
            for number, row in enumerate(_open_dataset(datasets, name, split=split), start=1):
                where = f"{config.source}, row {number}"
                yield Document(where, text_of(row, config.text_field, where=where))

    def stamp() -> str:
        # What a remote data set holds is not looked up, so that a prepared corpus opens without network.
        files = [Path(folder, file) for folder, _, names in os.walk(path) for file in names]
        known = file_stamps(files or [path]) if path.exists() else []
        return fingerprint_of("hf-1", name, split, known, config.text_field)

    return Source(read=read, fingerprint=stamp)


def _open_dataset(datasets: Any, name: str, *, split: str) -> Any:
    """Open a saved data set, a local folder of files, or a remote data set as a stream."""
    path = Path(name).expanduser()
    if (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(path))[split or "train"]
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        if split:
            raise UserError(
                f"data.source=hf:{name}:{split}: {path} was saved without splits; leave out :{split}"
            )
        return datasets.load_from_disk(str(path))
    if path.exists():
        return datasets.load_dataset(str(path), split=split or "train")
    dataset, _, subset = name.partition("@")
    return datasets.load_dataset(dataset, subset or None, split=split or "train", streaming=True)


@contextmanager
def _explained(setting: str) -> Iterator[None]:
    """Turn the many errors of `datasets` into one that names the setting; ours pass."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"data.source={setting} cannot be read: {type(error).__name__}: {error}; "
            "check name, subset (hf:NAME@SUBSET:SPLIT), split and network"
        ) from error


def _package(module: str, *, extra: str, setting: str) -> Any:
    """Import an optional package, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"data.source={setting} needs the package {module.split('.')[0]}: pip install 'hardy[{extra}]'"
        ) from error


SOURCES: dict[str, Callable[[str, DataConfig], Source]] = {
    "pydocs": _pydocs,
    "files": _files,
    "hf": _hf,
    "synthetic": lambda rest, config: synthetic_source(rest, setting=config.source),
}

READERS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".parquet": _read_parquet,
}
"""Readers by the end of the file's name; every other file is text."""
