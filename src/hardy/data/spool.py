"""A corpus on its way to the store: texts end to end in one file, so each is read from its source once."""

import hashlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from hardy.config import UserError
from hardy.data.documents import Document


class TextSpool:
    """Texts in a file, with a hash and 16 bytes of memory for each."""

    def __init__(self, path: Path) -> None:
        """Make the file; the caller removes it."""
        self._file = path.open("w+b")
        self._ends = array("q")
        self._hashes = array("Q")

    def __enter__(self) -> "TextSpool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return self._ends[-1] if self._ends else 0

    @property
    def sizes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of each text."""
        return np.diff(np.array(self._ends, dtype=np.int64), prepend=0)

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """A 64-bit hash of each text."""
        return np.array(self._hashes, dtype=np.uint64)

    def add(self, document: Document) -> None:
        """Append a text; an empty one is left out.

        Raises:
            UserError: the text holds half a surrogate pair, which no encoding can write.
        """
        try:
            contents = document.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{document.name} is not valid Unicode: half a surrogate pair at character {error.start}; "
                "repair the text or leave it out of data.source"
            ) from None
        if contents:
            self._append(contents)

    def split_last(self, *, fraction: float) -> None:
        """Cut the last text in two, the second with about `fraction` of its bytes, between characters."""
        contents = self._bytes(len(self) - 1)
        cut = len(contents) - round(len(contents) * fraction)
        while 0 < cut < len(contents) and contents[cut] & 0xC0 == 0x80:
            cut -= 1
        if 0 < cut < len(contents):
            self._ends.pop()
            self._hashes.pop()
            self._file.seek(self.num_bytes)
            for part in (contents[:cut], contents[cut:]):
                self._append(part)

    def text(self, index: int) -> str:
        """Return one text."""
        return self._bytes(index).decode("utf-8")

    def sample(
        self, indices: NDArray[np.int64], *, most_bytes: int, part_bytes: int = 65536
    ) -> Iterator[str]:
        """Yield about `most_bytes` of the texts at `indices`, in parts spread evenly over them."""
        sizes = self.sizes[indices]
        keep = min(1.0, most_bytes / max(1, int(sizes.sum())))
        for index in indices.tolist():
            contents = self._bytes(index)
            for start in range(0, len(contents), part_bytes):
                part = contents[start : start + part_bytes]
                yield part[: max(1, round(len(part) * keep))].decode("utf-8", errors="ignore")

    def _append(self, contents: bytes) -> None:
        self._file.write(contents)
        self._ends.append(self.num_bytes + len(contents))
        digest = hashlib.blake2b(contents, digest_size=8).digest()
        self._hashes.append(int.from_bytes(digest, "big"))

    def _bytes(self, index: int) -> bytes:
        begin = self._ends[index - 1] if index else 0
        self._file.seek(begin)
        contents = self._file.read(self._ends[index] - begin)
        self._file.seek(self.num_bytes)
        return contents
