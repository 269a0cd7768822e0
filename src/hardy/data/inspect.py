"""What `hardy data inspect` shows of a corpus, as plain values."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hardy.data.corpus import Corpus
from hardy.data.store import TokenStore
from hardy.rng import numpy_generator_for


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Stored tokens per document."""

    least: int
    """The shortest."""
    median: float
    """Half are longer."""
    mean: float
    """The average."""
    most_of_90_percent: float
    """Nine in ten are at most so long."""
    most_of_99_percent: float
    """All but one in a hundred are at most so long."""
    most: int
    """The longest."""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Documents and tokens by document length, in bins that double."""

    edges: tuple[int, ...]
    """Bin i holds lengths from edges[i] to edges[i + 1] - 1."""
    documents: tuple[int, ...]
    """Documents in each bin."""
    tokens: tuple[int, ...]
    """Tokens of the documents in each bin."""


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """One split in numbers."""

    num_documents: int
    """Documents."""
    num_bytes: int
    """UTF-8 bytes of text."""
    num_tokens: int
    """Stored tokens, begins included."""
    bytes_per_token: float
    """UTF-8 bytes per token."""
    lengths: Lengths | None
    """Tokens per document; none for an empty split."""
    histogram: Histogram | None
    """The same by bins; none for an empty split."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The beginning of one document."""

    document: int
    """Its place in the split."""
    num_tokens: int
    """Tokens of the whole document."""
    ids: tuple[int, ...]
    """Its first stored tokens."""
    text: str
    """These, decoded."""


def summarise(store: TokenStore) -> SplitSummary:
    """Return counts and lengths of one split.

    Args:
        store: `corpus.train` or `corpus.validation`.
    """
    lengths = store.lengths
    return SplitSummary(
        num_documents=store.num_documents,
        num_bytes=store.num_bytes,
        num_tokens=store.num_tokens,
        bytes_per_token=store.bytes_per_token,
        lengths=length_statistics(lengths) if lengths.size else None,
        histogram=length_histogram(lengths) if lengths.size else None,
    )


def length_statistics(lengths: NDArray[np.int64]) -> Lengths:
    """Return the usual figures of at least one length."""
    median, ninety, ninety_nine = np.percentile(lengths, [50, 90, 99]).tolist()
    return Lengths(
        least=int(lengths.min()),
        median=median,
        mean=float(lengths.mean()),
        most_of_90_percent=ninety,
        most_of_99_percent=ninety_nine,
        most=int(lengths.max()),
    )


def length_histogram(lengths: NDArray[np.int64]) -> Histogram:
    """Return a histogram of at least one positive length, with powers of two as edges.

    Example:
        >>> length_histogram(np.array([2, 3, 9]))
        Histogram(edges=(2, 4, 8, 16), documents=(2, 0, 1), tokens=(5, 0, 9))
    """
    first, last = (int(length).bit_length() for length in (lengths.min(), lengths.max()))
    edges = 2 ** np.arange(first - 1, last + 1)
    documents, _ = np.histogram(lengths, bins=edges)
    tokens, _ = np.histogram(lengths, bins=edges, weights=lengths)
    return Histogram(
        edges=tuple(edges.tolist()),
        documents=tuple(documents.tolist()),
        tokens=tuple(tokens.astype(np.int64).tolist()),
    )


def samples(
    corpus: Corpus,
    *,
    split: Literal["train", "validation"] = "train",
    num_samples: int = 3,
    most_tokens: int = 64,
    seed: int = 0,
) -> list[Sample]:
    """Return the beginnings of some documents, chosen by the seed, in the order of the split.

    Args:
        corpus: a prepared corpus.
        split: which side to look at.
        num_samples: documents to show; fewer when the split has fewer.
        most_tokens: tokens to show of each, after its begin.
        seed: of the choice.
    """
    store = corpus.train if split == "train" else corpus.validation
    order = numpy_generator_for(seed, "samples", split).permutation(store.num_documents)
    shown: list[Sample] = []
    for index in sorted(order[:num_samples].tolist()):
        document = store.document(index)
        ids = tuple(document[: most_tokens + 1].tolist())
        text = corpus.tokenizer.decode(ids[1:])
        shown.append(Sample(document=index, num_tokens=document.size, ids=ids, text=text))
    return shown
