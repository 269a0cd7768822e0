"""Tokenizers: plain bytes, byte-pair encoding, and any `tokenizer.json`.

All save a `tokenizer.json` with a `tokenizer_config.json` beside it, which Hugging Face tools read too.
Text never becomes a special token: the words `<|document|>` in a document are encoded as the text they are.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hardy.config import ConfigError, UserError, unknown_name
from hardy.data.documents import fingerprint_of

DOCUMENT_TOKEN = "<|document|>"
"""Begins and ends a document in the tokenizers made here."""
LONG_TEXT_CHARACTERS = 500_000
"""Longer texts are encoded in parts where that gives the same tokens, to use all cores and bound memory."""
CHARACTERS_AT_ONCE = 4_000_000
KNOWN_BEGINS = (DOCUMENT_TOKEN, "<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "[CLS]")
KNOWN_ENDS = (DOCUMENT_TOKEN, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        ...

    @property
    def begin_id(self) -> int:
        """Token that stands before every document."""
        ...

    @property
    def end_id(self) -> int:
        """What the last token of a document predicts."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give equal tokens."""
        ...

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, without begin and end."""
        ...

    def encode_arrays(self, texts: list[str]) -> list[NDArray[Any]]:
        """Return what `encode` does as arrays of unsigned integers, which is faster."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens; special tokens and broken characters do not fail."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(folder)` reads."""
        ...


class BytesTokenizer:
    """One token per UTF-8 byte, and `<|document|>` as token 256.

    Example:
        >>> BytesTokenizer().encode(["hé"]), BytesTokenizer().decode([104, 195, 169, 256])
        ([[104, 195, 169]], 'hé')
    """

    vocab_size = 257
    begin_id = 256
    end_id = 256
    fingerprint = fingerprint_of("bytes-1")

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the bytes of each text."""
        return [list(text.encode("utf-8")) for text in texts]

    def encode_arrays(self, texts: list[str]) -> list[NDArray[Any]]:
        """Return the bytes of each text as arrays."""
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; bytes that are no UTF-8 become the replacement character."""
        return bytes(token for token in map(int, ids) if token < 256).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write a byte-level BPE without merges, which is this tokenizer in the form others read."""
        folder.mkdir(parents=True, exist_ok=True)
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        }
        special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        contents = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": 256, "content": DOCUMENT_TOKEN, **special, "special": True}],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": _byte_characters() | {DOCUMENT_TOKEN: 256}, "merges": []},
        }
        (folder / "tokenizer.json").write_text(json.dumps(contents, ensure_ascii=False), encoding="utf-8")
        _write_tokenizer_config(folder, begin=DOCUMENT_TOKEN, end=DOCUMENT_TOKEN, kind="bytes")


class FileTokenizer:
    """A tokenizer of the package `tokenizers`, read from a `tokenizer.json` or trained here."""

    def __init__(self, inner: Any, *, written: str, begin_id: int, end_id: int) -> None:
        """Take a `tokenizers.Tokenizer`, its JSON, and which of its tokens begin and end a document."""
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # read: encode them as ordinary text
        self._inner = inner
        self.begin_id = begin_id
        self.end_id = end_id
        self.vocab_size = max(inner.get_vocab().values()) + 1
        # What is written again is what was read: another release of the package may write it otherwise.
        self._written = written
        contents = json.loads(written)
        self.fingerprint = fingerprint_of("file-1", json.dumps(contents, sort_keys=True), begin_id, end_id)
        self._splits = _may_split(contents)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, without begin and end; uses all cores."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: list[str]) -> list[NDArray[Any]]:
        """Return what `encode` does as arrays."""
        parts = [_parts(text) if self._splits else [text] for text in texts]
        encoded = self._encode_parts([part for text_parts in parts for part in text_parts])
        return [np.concatenate([next(encoded) for _ in text_parts]) for text_parts in parts]

    def _encode_parts(self, parts: list[str]) -> Iterator[NDArray[Any]]:
        """Yield the ids of each part; few at once, for what the package returns takes 100 bytes a token."""
        begin, characters = 0, 0
        for place, part in enumerate(parts, start=1):
            characters += len(part)
            if characters >= CHARACTERS_AT_ONCE or place == len(parts):
                for found in self._inner.encode_batch_fast(parts[begin:place], add_special_tokens=False):
                    yield np.array(found.ids, dtype=np.uint32)
                begin, characters = place, 0

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special tokens left out."""
        return self._inner.decode([int(token) for token in ids], skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._written, encoding="utf-8")
        begin, end = (self._inner.id_to_token(token) for token in (self.begin_id, self.end_id))
        _write_tokenizer_config(folder, begin=begin, end=end, kind="file")


def bpe_size(setting: str) -> int | None:
    """Return SIZE of a setting `bpe:SIZE`, none of any other tokenizer that exists.

    Raises:
        ConfigError: the setting names no tokenizer, or a size below 257 (256 bytes and the document token).
    """
    kind, colon, size = setting.partition(":")
    if kind == "bpe":
        if not size.isdecimal() or int(size) < 257:
            raise ConfigError(f"data.tokenizer must be bpe:SIZE with SIZE at least 257, got {setting!r}")
        return int(size)
    if setting == "bytes" or Path(setting).expanduser().exists():
        return None
    raise ConfigError(
        f"data.tokenizer: {unknown_name(setting, 'tokenizer', ['bytes', 'bpe:SIZE'])}, "
        "or the path of a tokenizer.json or its folder"
    )


def open_tokenizer(setting: str) -> Tokenizer:
    """Return the tokenizer `bytes`, or the one at a path.

    Raises:
        UserError: there is no readable tokenizer, or it has neither a begin nor an end token.
    """
    return BytesTokenizer() if setting == "bytes" else load_tokenizer(Path(setting).expanduser())


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`, or the folder it stands in: a run, an export, a downloaded model.

    Raises:
        UserError: there is no readable tokenizer, or it has neither a begin nor an end token.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"there is no tokenizer at {file}; a folder needs a tokenizer.json (data.tokenizer)")
    if _settings_beside(file, "tokenizer_config.json").get("hardy_tokenizer") == "bytes":
        return BytesTokenizer()
    import tokenizers

    try:
        written = file.read_text(encoding="utf-8")
        inner = tokenizers.Tokenizer.from_str(written)
    except Exception as error:  # the package raises bare Exception
        raise UserError(
            f"{file} is no tokenizer.json that the package tokenizers can read: {error}"
        ) from None
    begin, end = (_special_id(inner, file, role) for role in ("bos", "eos"))
    if begin is None and end is None:
        raise UserError(
            f"{file} does not say which token begins or ends a document; write "
            '{"bos_token": "...", "eos_token": "..."} into a tokenizer_config.json beside it (data.tokenizer)'
        )
    begin_id, end_id = (end if begin is None else begin), (begin if end is None else end)
    assert begin_id is not None and end_id is not None
    return FileTokenizer(inner, written=written, begin_id=begin_id, end_id=end_id)


def _special_id(inner: Any, file: Path, role: str) -> int | None:
    """Find the id of the token of a role, "bos" or "eos": as the files beside say, else by a usual name."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _settings_beside(file, name).get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found = inner.token_to_id(token)
            if found is None:
                raise UserError(
                    f"{file.parent / name} names {role}_token {token!r}, which {file} does not have"
                )
            return found
    for name in ("config.json", "generation_config.json"):
        found = _settings_beside(file, name).get(f"{role}_token_id")
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int):
            return found
    usual = KNOWN_BEGINS if role == "bos" else KNOWN_ENDS
    known = (inner.token_to_id(token) for token in usual)
    return next((token for token in known if token is not None), None)


def _settings_beside(file: Path, name: str) -> dict[str, Any]:
    """Return what a JSON file in the folder of `file` says; nothing where there is none."""
    path = file.parent / name
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def _write_tokenizer_config(folder: Path, *, begin: str, end: str, kind: str) -> None:
    contents = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
        "hardy_tokenizer": kind,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


def _byte_characters() -> dict[str, int]:
    """Return the printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(256 + place): byte for place, byte in enumerate(others)}


def _may_split(contents: dict[str, Any]) -> bool:
    """Whether a text may be encoded in parts: the words of GPT-2's pattern never cross a cut of `_parts`."""
    pre = contents.get("pre_tokenizer") or {}
    plain = contents.get("normalizer") is None and contents.get("model", {}).get("type") == "BPE"
    gpt2 = pre.get("type") == "ByteLevel" and pre.get("use_regex") is True
    return plain and gpt2 and not pre.get("add_prefix_space")


def _parts(text: str) -> list[str]:
    """Cut a long text after single line ends that have a visible character on both sides."""
    parts: list[str] = []
    start = 0
    while len(text) - start > LONG_TEXT_CHARACTERS:
        cut = _LINE_END.search(text, start + LONG_TEXT_CHARACTERS)
        if cut is None:
            break
        parts.append(text[start : cut.end()])
        start = cut.end()
    return [*parts, text[start:]]


_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")
