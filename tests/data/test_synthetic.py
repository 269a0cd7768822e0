"""Synthetic documents: the lengths asked for, and a language with something to learn."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from hardy.config import ConfigError
from hardy.data.synthetic import DISTRIBUTIONS, synthetic_source


def texts(rest):
    return [document.text for document in synthetic_source(rest, setting=f"synthetic:{rest}").read()]


@pytest.mark.parametrize(
    ("rest", "check"),
    [
        ("constant,documents=20,mean=37", lambda sizes: set(sizes) == {37}),
        ("uniform,documents=400,min=10,max=13", lambda sizes: set(sizes) == {10, 11, 12, 13}),
        (
            "zipf,documents=400,min=5,max=500,exponent=2",
            lambda s: min(s) == 5 and np.median(s) < 20 < max(s) <= 500,
        ),
        ("zipf,documents=400,min=5,max=500,exponent=1", lambda s: 30 < np.median(s) < 80 and max(s) <= 500),
        (
            "bimodal,documents=400,min=5,max=90,share=0.25",
            lambda s: set(s) == {5, 90} and 65 < s.count(90) < 135,
        ),
        ("lognormal,documents=2000,mean=60,sigma=0.5,min=1", lambda s: abs(np.mean(s) - 60) < 3),
        ("lognormal,documents=50,mean=60,min=40,max=50", lambda s: min(s) >= 40 and max(s) == 50),
    ],
)
def test_lengths_follow_the_distribution(rest, check):
    assert check([len(text) for text in texts(rest)])


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_distribution_has_defaults_and_knows_its_size(name):
    source = synthetic_source(f"{name},documents=30", setting="")
    read = [document.text for document in source.read()]
    assert len(read) == 30 and all(read) and sum(map(len, read)) == source.expected_bytes
    assert all(text.isascii() for text in read)


def test_the_seed_changes_texts_and_equal_settings_repeat_them():
    assert (
        texts("uniform,documents=5")
        == texts("uniform,documents=5,seed=0")
        != texts("uniform,documents=5,seed=1")
    )
    sources = [synthetic_source(rest, setting="") for rest in ("uniform", "uniform,seed=0", "uniform,seed=1")]
    first, same, other = (source.fingerprint() for source in sources)
    assert first == same != other


def test_two_words_tell_much_about_the_next():
    words = " ".join(texts("constant,documents=40,mean=20000")).split()
    alone = Counter(words)
    pairs, triples = Counter(pairwise(words)), Counter(zip(words, words[1:], words[2:], strict=False))

    def entropy(counts, contexts):
        total = sum(counts.values())
        return -sum(n / total * math.log(n / contexts(key)) for key, n in counts.items())

    unigram = entropy(alone, lambda _: len(words))
    trigram = entropy(triples, lambda key: pairs[key[:2]])
    assert unigram > 3.5 and trigram < 1.3


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ("uniformly", "no length distribution 'uniformly'; did you mean 'uniform'"),
        ("uniform,mn=3", "no parameter 'mn'; did you mean 'min'"),
        ("constant,max=3", "no parameter 'max'.*Known: documents, mean, seed"),
        ("uniform,min=few", "min must be a number, got 'few'"),
        ("uniform,min", "min must be a number, got ''"),
        ("uniform,min=1.5", "min must be a whole number at least 1, got 1.5"),
        ("uniform,documents=0", "documents must be a whole number at least 1, got 0"),
        ("bimodal,share=2", "share must be a number at least 0 and at most 1, got 2"),
        ("uniform,min=9,max=3", "min must be at most max, got 9 and 3"),
    ],
)
def test_a_bad_parameter_is_refused(rest, said):
    with pytest.raises(ConfigError, match=f"data.source=synthetic:{rest}: .*{said}"):
        synthetic_source(rest, setting=f"synthetic:{rest}")
