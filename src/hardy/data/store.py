"""Tokenised documents on disk: written once and whole, checked when opened, memory-mapped.

A store is a folder of three files: `tokens.bin` (all documents end to end, uint16 while the vocabulary
allows, else uint32), `offsets.npy` (int64, where each document begins, and the end of the last) and
`meta.json` (counts, sizes and checksums). A stored document is [begin_id, its tokens].
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hardy.config import UserError, reason_of

FORMAT = 1
FILES = ("offsets.npy", "tokens.bin")
AUTO_CHECK_BYTES = 10**9
"""Larger files have only their size checked unless asked for more."""
Verify = Literal["sizes", "auto", "all"]


class DamagedStoreError(Exception):
    """What is on disk is not what was written."""


class TokenStore:
    """Tokenised documents, memory-mapped for reading."""

    def __init__(self, folder: Path, *, verify: Verify = "auto") -> None:
        """Open a store.

        Args:
            folder: what a `StoreWriter` wrote.
            verify: whether contents are compared with their checksums: never, up to 1 GB per file, or
            always. Sizes always are.

        Raises:
            DamagedStoreError: a file is missing, or its size or contents differ from what was written.
        """
        meta = _read_meta(folder)
        try:
            _check_files(folder, meta, verify=verify)
            self.checksum: str = hashlib.blake2b(
                json.dumps(meta["files"], sort_keys=True).encode(), digest_size=16
            ).hexdigest()
            """Depends on the tokens and the borders of the documents alone."""
            self.num_bytes: int = meta["num_bytes"]
            """UTF-8 bytes of the texts."""
            dtype = np.dtype(meta["dtype"])
            self.offsets: NDArray[np.int64] = np.load(folder / "offsets.npy", allow_pickle=False)
            """Where each document begins in `tokens`, and the end of the last."""
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise DamagedStoreError(f"{folder} cannot be read: {error}") from error
        self.folder = folder
        path = folder / "tokens.bin"
        # An empty file cannot be mapped.
        empty = path.stat().st_size == 0
        self.tokens: NDArray[Any] = np.empty(0, dtype) if empty else np.memmap(path, dtype=dtype, mode="r")
        """All documents end to end."""

    @property
    def num_documents(self) -> int:
        """Documents in the store."""
        return self.offsets.size - 1

    @property
    def num_tokens(self) -> int:
        """Stored tokens, the begin of each document included; as many as there are targets."""
        return int(self.offsets[-1])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Stored tokens of each document."""
        return np.diff(self.offsets)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per target; 0 for an empty store."""
        return self.num_bytes / self.num_tokens if self.num_tokens else 0.0

    def document(self, index: int) -> NDArray[Any]:
        """Return the stored tokens of one document, begin included."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class StoreWriter:
    """Writes a store document by document; it is complete after `close`."""

    def __init__(self, folder: Path, *, vocab_size: int, begin_id: int) -> None:
        """Make the folder and start."""
        folder.mkdir(parents=True)
        self._folder = folder
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._begin = np.array([begin_id], dtype=self._dtype)
        self._lengths: list[NDArray[np.int64]] = []
        self._num_bytes = 0
        self._file = (folder / "tokens.bin").open("wb")

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._file.close()

    def append(self, documents: Sequence[NDArray[Any]], *, num_bytes: int) -> None:
        """Write documents, each as its tokens without begin; `num_bytes` is the size of their texts."""
        if not documents:
            return
        parts = [part for document in documents for part in (self._begin, document)]
        self._file.write(np.concatenate(parts, dtype=self._dtype, casting="unsafe").tobytes())
        self._lengths.append(np.array([document.size + 1 for document in documents], dtype=np.int64))
        self._num_bytes += num_bytes

    def close(self) -> None:
        """Write the borders and the checksums."""
        self._file.close()
        np.save(
            self._folder / "offsets.npy", np.cumsum(np.concatenate([np.zeros(1, np.int64), *self._lengths]))
        )
        meta = {
            "format": FORMAT,
            "dtype": self._dtype.str,
            "num_bytes": self._num_bytes,
            "files": {
                name: {
                    "size": (self._folder / name).stat().st_size,
                    "blake2b": _checksum(self._folder / name),
                }
                for name in FILES
            },
        }
        (self._folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yield a folder to fill beside `target`, and rename it to `target` when the block ends without an error.

    So a half-written `target` is never seen. When another process has made `target` meanwhile, that one
    stays.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    temporary = target.parent / f".{target.name}-{uuid.uuid4().hex}"
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"the cache folder {target.parent} cannot be made: {error.strerror}; set data.cache_dir to a "
                "folder that can be written"
            ) from error
        try:
            yield temporary
            for path in [*temporary.rglob("*"), temporary]:
                _sync(path)
            _rename_unless_taken(temporary, target)
            _sync(target.parent)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise _disk_full(temporary, target.parent) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_unless_taken(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _disk_full(temporary: Path, folder: Path) -> UserError:
    """Remove what was written and say what there is and what was needed."""
    written = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
    shutil.rmtree(temporary, ignore_errors=True)
    free = shutil.disk_usage(folder).free
    return UserError(
        f"the disk of the cache folder {folder} is full: preparing the corpus needs more than "
        f"{written / 1e6:.1f} MB and {free / 1e6:.1f} MB are free; make room, set "
        "data.cache_dir to another disk or lower data.limit_mb"
    )


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedStoreError(f"{folder / 'meta.json'} cannot be read: {reason_of(error)}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DamagedStoreError(f"{folder / 'meta.json'} is of another format")
    return meta


def _check_files(folder: Path, meta: dict[str, Any], *, verify: Verify) -> None:
    for name in FILES:
        path, wanted = folder / name, meta["files"][name]
        size = path.stat().st_size
        if size != wanted["size"]:
            raise DamagedStoreError(f"{path} has {size} bytes instead of {wanted['size']}")
        check = verify == "all" or (verify == "auto" and size <= AUTO_CHECK_BYTES)
        if check and _checksum(path) != wanted["blake2b"]:
            raise DamagedStoreError(f"{path} does not have the contents that were written")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
