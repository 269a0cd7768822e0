"""What is shown of a corpus."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardy.data.inspect import length_histogram, length_statistics, samples, summarise


@pytest.fixture
def corpus(make_corpus):
    return make_corpus(source="synthetic:uniform,documents=50,min=20,max=200", validation_fraction=0.2)


def test_a_split_in_numbers(corpus):
    summary = summarise(corpus.train)
    lengths = corpus.train.lengths
    assert (summary.num_documents, summary.num_tokens) == (lengths.size, lengths.sum())
    assert summary.num_bytes == summary.num_tokens - summary.num_documents
    assert summary.bytes_per_token == summary.num_bytes / summary.num_tokens
    assert summary.lengths.least == lengths.min() and summary.lengths.most == lengths.max()
    assert sum(summary.histogram.tokens) == summary.num_tokens


def test_an_empty_split_has_no_lengths(make_store):
    summary = summarise(make_store([]))
    assert summary.num_documents == 0 and summary.lengths is None and summary.histogram is None


def test_length_statistics():
    found = length_statistics(np.arange(1, 102))
    assert (found.least, found.median, found.mean, found.most) == (1, 51.0, 51.0, 101)
    assert (found.most_of_90_percent, found.most_of_99_percent) == (91.0, 100.0)


@given(lengths=st.lists(st.integers(1, 10**6), min_size=1, max_size=30))
def test_every_length_is_in_its_bin(lengths):
    found = length_histogram(np.array(lengths))
    assert found.edges[0] <= min(lengths) and max(lengths) < found.edges[-1]
    assert found.documents[0] and found.documents[-1]
    for begin, end, documents, tokens in zip(
        found.edges, found.edges[1:], found.documents, found.tokens, strict=False
    ):
        inside = [length for length in lengths if begin <= length < end]
        assert end == 2 * begin and (documents, tokens) == (len(inside), sum(inside))


def test_samples_are_beginnings_in_order_and_repeat(corpus):
    shown = samples(corpus, num_samples=4, most_tokens=10, seed=1)
    assert [sample.document for sample in shown] == sorted({sample.document for sample in shown})
    for sample in shown:
        document = corpus.train.document(sample.document)
        assert sample.ids == tuple(document[:11].tolist()) and sample.ids[0] == corpus.tokenizer.begin_id
        assert sample.num_tokens == document.size
        assert sample.text == bytes(document[1:11].tolist()).decode()
    assert shown == samples(corpus, num_samples=4, most_tokens=10, seed=1)
    assert shown != samples(corpus, num_samples=4, most_tokens=10, seed=2)


def test_no_more_samples_than_documents(corpus):
    shown = samples(corpus, split="validation", num_samples=1000)
    assert len(shown) == corpus.validation.num_documents
