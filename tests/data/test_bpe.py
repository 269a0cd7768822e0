"""Training of the BPE tokenizer."""

from hardy.data.bpe import train_bpe

TEXT = "the cat sat on the mat; the dog sat on the log.\n" * 30


def test_frequent_words_become_tokens_and_the_size_is_kept():
    tokenizer = train_bpe(iter([TEXT]), vocab_size=270)
    assert tokenizer.vocab_size == 270
    (ids,) = tokenizer.encode([" the the"])
    assert len(ids) == 2 and ids[0] == ids[1]


def test_a_small_text_yields_a_small_vocabulary_that_still_takes_any_text():
    tokenizer = train_bpe(iter(["ab"]), vocab_size=4096)
    assert 257 <= tokenizer.vocab_size < 270
    assert tokenizer.decode(tokenizer.encode(["ünknown \x01"])[0]) == "ünknown \x01"


def test_equal_texts_give_equal_tokenizers():
    first, second = (train_bpe(iter([TEXT, "more"]), vocab_size=300) for _ in range(2))
    other = train_bpe(iter([TEXT[::-1]]), vocab_size=300)
    assert first.fingerprint == second.fingerprint != other.fingerprint
