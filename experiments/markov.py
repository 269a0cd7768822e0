"""Symbols of which each depends on the last two, by a table that is drawn once: batches, and a text to read.

Shape suffixes: N texts, T symbols of a text, V different symbols.
"""

import functools
import string
import tempfile
from hashlib import blake2b
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Generator, Tensor

from hardy.data.store import written_whole
from hardy.data.tokenizer import DOCUMENT_TOKEN
from hardy.rng import generator_for

STRENGTH = 2.5
"""Deviation of the logits of the next symbol: 0 makes all alike, a large one makes the next one certain."""
NUM_SYMBOLS, NUM_CHAINS, CHAIN_SYMBOLS = 32, 512, 1024
"""Of the text that `settings` writes: chains are drawn beside each other and laid end to end. It is longer
than what 250 steps of 1,024 tokens read, so that none comes twice."""


@functools.cache
def transitions(num_symbols: int) -> Tensor:
    """Return the chances of the next symbol by the last two, [V, V, V]."""
    return (STRENGTH * torch.randn((num_symbols,) * 3, generator=generator_for(0, "markov"))).softmax(-1)


def draw(count: int, length: int, generator: Generator, *, num_symbols: int) -> Tensor:
    """Return texts, [N, T]; their first two symbols are drawn evenly."""
    symbols_NT = torch.empty(count, length, dtype=torch.int64)
    symbols_NT[:, :2] = torch.randint(num_symbols, (count, 2), generator=generator)
    for place in range(2, length):
        chances_NV = transitions(num_symbols)[symbols_NT[:, place - 2], symbols_NT[:, place - 1]]
        symbols_NT[:, place] = torch.multinomial(chances_NV, 1, generator=generator).squeeze(1)
    return symbols_NT


@functools.cache
def _symbols() -> Tensor:
    """Return all symbols of the text."""
    generator = generator_for(0, "markov text")
    return draw(NUM_CHAINS, CHAIN_SYMBOLS, generator, num_symbols=NUM_SYMBOLS).flatten()


def floor() -> float:
    """Return the loss on the text of a model that knows the law, in nats per symbol."""
    symbols_T = _symbols()
    chances_T = transitions(NUM_SYMBOLS)[symbols_T[:-2], symbols_T[1:-1], symbols_T[2:]]
    return -chances_T.log().mean().item()


@functools.cache
def settings() -> dict[str, object]:
    """Write the text and its tokenizer where they are missing, and return the settings that read them.

    The folder is named after the text, so that another law or draw is another folder.
    """
    letters = string.ascii_letters[:NUM_SYMBOLS]
    text = "".join(letters[symbol] for symbol in _symbols().tolist())
    name = blake2b(text.encode(), digest_size=8).hexdigest()
    entry = Path(tempfile.gettempdir()) / "hardy-experiments" / "markov" / name
    if not entry.exists():
        with written_whole(entry) as folder:
            (folder / "text.txt").write_text(text, encoding="utf-8")
            _tokenizer(letters).save(str(folder / "tokenizer.json"))
    return {
        "data.source": f"files:{entry / 'text.txt'}",
        "data.tokenizer": str(entry / "tokenizer.json"),
        "data.pack_tokens": 64,
        "train.evaluate_packs": 128,
    }


def _tokenizer(letters: str) -> Tokenizer:
    """Return a tokenizer with a token for each letter, and one that begins and ends the text."""
    vocabulary = {token: place for place, token in enumerate([*letters, DOCUMENT_TOKEN])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=DOCUMENT_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    return tokenizer
