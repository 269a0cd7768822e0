"""From a source of text to two token stores, one to train on and one held out, cached on disk.

A document is held out when the 64-bit hash of its text falls below `validation_fraction` of the range, so
the split depends on the text alone and a growing corpus never moves a document to the other side. Of two or
more documents at least one is on each side (the one whose hash is nearest); of a single document the tail
is held out.
"""

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hardy.config import UserError
from hardy.data.bpe import train_bpe
from hardy.data.config import DataConfig
from hardy.data.documents import Source, fingerprint_of
from hardy.data.sources import open_source
from hardy.data.spool import TextSpool
from hardy.data.store import DamagedStoreError, StoreWriter, TokenStore, Verify, written_whole
from hardy.data.tokenizer import Tokenizer, bpe_size, load_tokenizer, open_tokenizer

logger = logging.getLogger(__name__)

Progress = Callable[[str, float], None]

CACHE_FORMAT = 1
"""Part of the cache key; raised whenever equal settings would give other tokens."""
BPE_SAMPLE_BYTES = 12_000_000
BATCH_BYTES = 4_000_000
"""Text that is encoded at once."""


@dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """What is known of a corpus once it has been read."""

    num_documents: int
    """Documents of the source that hold any text."""
    num_bytes: int
    """UTF-8 bytes of their texts."""
    unigram_entropy: float
    """Nats per target that a model pays which knows only how frequent each token is: the cross-entropy of the
    validation targets under the frequencies of the training targets, each counted once more than it occurs.
    Of the training targets themselves where nothing is held out. A validation loss below it means something
    was learned."""
    train_entropy: float
    """Nats per target: the entropy of the frequencies of the training targets."""
    tokenizer_fingerprint: str
    """Of the tokenizer that made the tokens."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A tokenised corpus: what to train on and what is held out."""

    tokenizer: Tokenizer
    """Made the tokens, and decodes them."""
    train: TokenStore
    """The documents to train on."""
    validation: TokenStore
    """The documents held out; empty when `data.validation_fraction` is 0."""
    fingerprint: str
    """Equal for equal tokens, split and tokenizer, wherever they came from."""
    facts: CorpusFacts
    """Counts and entropies."""

    @property
    def num_documents(self) -> int:
        """Documents of the source that hold any text."""
        return self.facts.num_documents

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of their texts."""
        return self.facts.num_bytes

    @property
    def unigram_entropy(self) -> float:
        """Nats per target of the best model that ignores context; see `CorpusFacts`."""
        return self.facts.unigram_entropy

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per target, of both stores."""
        return self.num_bytes / (self.train.num_tokens + self.validation.num_tokens)


def prepare(config: DataConfig, *, cache_dir: Path, on_progress: Progress | None = None) -> Corpus:
    """Return the corpus of `config`, from the cache when it was prepared before.

    Several processes may prepare the same corpus at once: each writes its own copy, and the first to finish
    is kept.

    Args:
        config: what to read and how.
        cache_dir: folder of the cache; made when it is missing.
        on_progress: called with the name of a stage and the share of it that is done.

    Raises:
        UserError: the source or the tokenizer cannot be read, the corpus is empty, or the disk is full.
    """
    size = bpe_size(config.tokenizer)
    fixed = open_tokenizer(config.tokenizer) if size is None else None
    source = open_source(config)
    named = f"bpe:{size}" if fixed is None else fixed.fingerprint
    key = fingerprint_of(CACHE_FORMAT, source.fingerprint(), named, config.validation_fraction)
    entry = cache_dir / "corpora" / key
    if entry.is_dir():
        try:
            return open_corpus(entry)
        except DamagedStoreError as damage:
            logger.warning("the cached corpus is damaged and is prepared again: %s", damage)
            _discard(entry)
    report = on_progress or (lambda stage, share: None)
    with written_whole(entry) as folder:
        _build(folder, source=source, config=config, tokenizer=fixed, report=report)
    return open_corpus(entry)


def open_corpus(folder: Path, *, verify: Verify = "auto") -> Corpus:
    """Open a prepared corpus.

    Raises:
        DamagedStoreError: a file is missing or is not what was written.
    """
    train, validation = (TokenStore(folder / name, verify=verify) for name in ("train", "validation"))
    try:
        facts = CorpusFacts(**json.loads((folder / "facts.json").read_text(encoding="utf-8")))
        tokenizer = load_tokenizer(folder / "tokenizer")
    except (OSError, TypeError, ValueError) as error:
        raise DamagedStoreError(f"{folder} cannot be read: {error}") from error
    if tokenizer.fingerprint != facts.tokenizer_fingerprint:
        raise DamagedStoreError(f"{folder / 'tokenizer'} is not the tokenizer that made the tokens")
    fingerprint = fingerprint_of(tokenizer.fingerprint, train.checksum, validation.checksum)
    return Corpus(
        tokenizer=tokenizer, train=train, validation=validation, fingerprint=fingerprint, facts=facts
    )


def held_out(hashes: NDArray[np.uint64], *, fraction: float) -> NDArray[np.bool_]:
    """Return which documents are held out, by the hashes of their texts; see the head of this file.

    Example:
        >>> held_out(np.array([9, 2**63, 2**62], dtype=np.uint64), fraction=0.1).tolist()
        [True, False, False]
    """
    if fraction == 0 or hashes.size < 2:
        return np.zeros(hashes.size, dtype=np.bool_)
    below = hashes < np.uint64(int(fraction * 2**64))
    if not below.any():
        below[hashes.argmin()] = True
    if below.all():
        below[hashes.argmax()] = False
    return below


def _build(
    folder: Path, *, source: Source, config: DataConfig, tokenizer: Tokenizer | None, report: Progress
) -> None:
    """Fill a folder with all of a corpus."""
    path = folder / "text.spool"
    with TextSpool(path) as spool:
        _read(source, spool, report)
        if not len(spool):
            raise UserError(f"data.source={config.source} holds no text; the corpus would be empty")
        num_documents, fraction = len(spool), config.validation_fraction
        if num_documents == 1 and fraction:
            spool.split_last(fraction=fraction)
            chosen = np.arange(len(spool)) == 1
        else:
            chosen = held_out(spool.hashes, fraction=fraction)
        if tokenizer is None:
            report("training the tokenizer", 0.0)
            sample = spool.sample(np.flatnonzero(~chosen), most_bytes=BPE_SAMPLE_BYTES)
            tokenizer = train_bpe(sample, vocab_size=bpe_size(config.tokenizer) or 0)
            report("training the tokenizer", 1.0)
        tokenizer.save(folder / "tokenizer")
        _tokenise(folder, spool, chosen, tokenizer, report)
        num_bytes = spool.num_bytes
    path.unlink()
    targets = [_count_targets(TokenStore(folder / name, verify="sizes"), tokenizer) for name in SPLITS]
    facts = CorpusFacts(
        num_documents=num_documents,
        num_bytes=num_bytes,
        tokenizer_fingerprint=tokenizer.fingerprint,
        **_entropies(*targets),
    )
    (folder / "facts.json").write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")


SPLITS = ("train", "validation")


def _read(source: Source, spool: TextSpool, report: Progress) -> None:
    """Copy the source into the spool."""
    report("reading", 0.0)
    for document in source.read():
        before = spool.num_bytes
        spool.add(document)
        if source.expected_bytes and before // BATCH_BYTES != spool.num_bytes // BATCH_BYTES:
            report("reading", min(1.0, spool.num_bytes / source.expected_bytes))
    report("reading", 1.0)


def _tokenise(
    folder: Path, spool: TextSpool, chosen: NDArray[np.bool_], tokenizer: Tokenizer, report: Progress
) -> None:
    """Write both stores, in the order of the source."""
    sizes = spool.sizes
    done = np.cumsum(sizes) / sizes.sum()
    writers = [
        StoreWriter(folder / name, vocab_size=tokenizer.vocab_size, begin_id=tokenizer.begin_id)
        for name in SPLITS
    ]
    with writers[0], writers[1]:
        for begin, end in _batches(sizes):
            encoded = tokenizer.encode_arrays([spool.text(index) for index in range(begin, end)])
            for writer, mine in zip(writers, (~chosen[begin:end], chosen[begin:end]), strict=True):
                writer.append(
                    [encoded[place] for place in np.flatnonzero(mine)],
                    num_bytes=int(sizes[begin:end][mine].sum()),
                )
            report("tokenising", float(done[end - 1]))


def _batches(sizes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield runs of documents of about `BATCH_BYTES`, at least one in each."""
    begin, filled = 0, 0
    for index, size in enumerate(sizes.tolist()):
        filled += size
        if filled >= BATCH_BYTES or index + 1 == sizes.size:
            yield begin, index + 1
            begin, filled = index + 1, 0


def _count_targets(store: TokenStore, tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Return how often each token is a target: every stored token but the begins, and an end per document."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for start in range(0, store.num_tokens, BATCH_BYTES):
        counts += np.bincount(store.tokens[start : start + BATCH_BYTES], minlength=counts.size)
    counts[tokenizer.begin_id] -= store.num_documents
    counts[tokenizer.end_id] += store.num_documents
    return counts


def _entropies(train: NDArray[np.int64], validation: NDArray[np.int64]) -> dict[str, float]:
    """Return the entropies of `CorpusFacts` from the counts of targets."""
    smoothed = np.log((train + 1) / (train.sum() + train.size))
    seen = validation if validation.any() else train
    occurring = train[train > 0] / train.sum()
    return {
        "unigram_entropy": float(-(seen * smoothed).sum() / seen.sum()),
        "train_entropy": float(-(occurring * np.log(occurring)).sum()),
    }


def _discard(entry: Path) -> None:
    """Take a damaged entry away at one stroke, so that no other process opens it half removed."""
    aside = entry.parent / f".{entry.name}-{uuid.uuid4().hex}"
    try:
        os.rename(entry, aside)
    except FileNotFoundError:
        return  # another process was faster
    shutil.rmtree(aside, ignore_errors=True)
