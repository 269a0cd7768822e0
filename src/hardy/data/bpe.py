"""Training of a byte-level BPE tokenizer on a sample of a corpus."""

from collections.abc import Iterator

from hardy.data.tokenizer import DOCUMENT_TOKEN, FileTokenizer


def train_bpe(texts: Iterator[str], *, vocab_size: int) -> FileTokenizer:
    """Train a byte-level BPE with the pattern of GPT-2 and `<|document|>` as token 0.

    Equal texts give equal tokenizers. A small text yields fewer tokens than asked for.

    Args:
        texts: the sample.
        vocab_size: most tokens, at least 257.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return FileTokenizer(tokenizer, written=tokenizer.to_str(), begin_id=0, end_id=0)
