"""Files that lie on the disk, with a known size and checksum, when the call that writes them returns.

Tensors are written in the safetensors format by our own writer, which writes and hashes in one pass.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hardy.config import UserError

_PIECE_BYTES = 4 * 2**20  # hashed and written while still in the processor's cache

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes a file can hold, by their name in the safetensors format."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The same, the other way round."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a file must look like to be the one that was written."""

    num_bytes: int
    """Its size."""
    blake2b: str
    """BLAKE2b of its contents, 16 bytes, hexadecimal."""


def checksum(data: bytes) -> str:
    """Return the checksum of bytes as `FileRecord.blake2b` gives it."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def record_of(path: Path) -> FileRecord:
    """Return size and checksum of a file as it lies there now."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        return FileRecord(num_bytes=file.tell(), blake2b=digest.hexdigest())


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file from its parts and wait until the disk has it.

    Raises:
        OSError: it exists already, or the disk is full or broken.
    """
    digest, num_bytes = hashlib.blake2b(digest_size=16), 0
    with path.open("xb") as file:
        for part in parts:
            for start in range(0, len(part), _PIECE_BYTES):
                piece = part[start : start + _PIECE_BYTES]
                digest.update(piece)
                num_bytes += file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(num_bytes=num_bytes, blake2b=digest.hexdigest())


def write_json(path: Path, value: Any) -> FileRecord:
    """Write a JSON file; NaN and infinities must have been encoded before (`plain.encode`)."""
    return write_parts(path, [json.dumps(value, allow_nan=False, indent=1).encode()])


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write a safetensors file; tensors of other devices are copied to memory one at a time.

    Raises:
        UserError: a tensor has a dtype that the format does not know.
        OSError: as `write_parts`.
    """
    # Widest elements first, as the safetensors library does: each tensor starts at a multiple of its width.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header, offset = {}, 0
    for name, tensor in ordered.items():
        dtype = dtype_name(tensor.dtype, of=name)
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little")
        yield text
        for tensor in ordered.values():
            yield _bytes_of(tensor)

    return write_parts(path, parts())


def dtype_name(dtype: torch.dtype, *, of: str) -> str:
    """Return the name a dtype has in the file format, or refuse the tensor `of` that has it."""
    if dtype not in DTYPE_NAMES:
        raise UserError(
            f"tensor {of!r} cannot be saved: its dtype is {dtype}; store it as one of {', '.join(DTYPES)}"
        )
    return DTYPE_NAMES[dtype]


def sync_folder(path: Path) -> None:
    """Wait until the disk has the folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the elements as bytes, row by row; a view where the tensor lies so in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
