"""Synthetic documents: lengths from a named distribution, words from a small language that can be learned.

A length counts characters, all ASCII, so under the tokenizer `bytes` it is the number of tokens. The words
follow a Markov chain of order two with a fixed table: whatever the lengths and the seed, it is one language.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hardy.config import ConfigError, unknown_name
from hardy.data.documents import Document, Source, fingerprint_of
from hardy.rng import numpy_generator_for

Lengths = NDArray[np.int64]

NUM_WORDS = 64
SUCCESSOR_SHARES = (0.6, 0.2, 0.15, 0.05)
"""Chances of the four words that may follow a pair of words."""
SYLLABLES = ("ba", "de", "fi", "go", "lu", "me", "no", "ra", "si", "tu", "ve", "zo")


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """A law of document lengths."""

    defaults: Mapping[str, float]
    """Its settings with their defaults, besides `documents` and `seed`."""
    draw: Callable[[np.random.Generator, int, Mapping[str, float]], NDArray[np.float64]]
    """Draws that many lengths; they are rounded and held within min and max afterwards."""


def _bounded_pareto(rng: np.random.Generator, count: int, p: Mapping[str, float]) -> NDArray[np.float64]:
    """Draw from a density proportional to length**-exponent between min and max."""
    low, high, power = p["min"], p["max"] + 1.0, 1.0 - p["exponent"]
    uniform = rng.random(count)
    if power == 0:
        return np.floor(low * (high / low) ** uniform)
    return np.floor((low**power + uniform * (high**power - low**power)) ** (1 / power))


DISTRIBUTIONS: dict[str, Distribution] = {
    "constant": Distribution(
        defaults={"mean": 512}, draw=lambda rng, count, p: np.full(count, p["mean"], dtype=np.float64)
    ),
    "uniform": Distribution(
        defaults={"min": 64, "max": 1024},
        draw=lambda rng, count, p: rng.integers(int(p["min"]), int(p["max"]) + 1, count).astype(np.float64),
    ),
    "lognormal": Distribution(
        defaults={"mean": 512, "sigma": 1.0, "min": 16, "max": 16384},
        draw=lambda rng, count, p: rng.lognormal(
            math.log(p["mean"]) - p["sigma"] ** 2 / 2, p["sigma"], count
        ),
    ),
    "zipf": Distribution(defaults={"exponent": 1.5, "min": 32, "max": 16384}, draw=_bounded_pareto),
    "bimodal": Distribution(
        defaults={"min": 128, "max": 4096, "share": 0.1},
        draw=lambda rng, count, p: np.where(rng.random(count) < p["share"], p["max"], p["min"]),
    ),
}
"""mean, min and max are characters; share is that of the long documents."""


def synthetic_source(rest: str, *, setting: str) -> Source:
    """Return the source that `synthetic:REST` describes.

    Args:
        rest: DISTRIBUTION[,key=value...], such as "lognormal,documents=2000,mean=300".
        setting: the whole setting as given, for messages.

    Raises:
        ConfigError: the distribution or a key is unknown, or a value is refused.
    """
    name, *pairs = [part.strip() for part in rest.split(",")]
    if name not in DISTRIBUTIONS:
        raise ConfigError(
            f"data.source={setting}: " + unknown_name(name, "length distribution", DISTRIBUTIONS)
        )
    parameters = _read_parameters(pairs, defaults=DISTRIBUTIONS[name].defaults, setting=setting)
    lengths = document_lengths(name, parameters)
    return Source(
        read=lambda: _documents(lengths, seed=int(parameters["seed"])),
        fingerprint=lambda: fingerprint_of("synthetic-1", name, sorted(parameters.items())),
        expected_bytes=int(lengths.sum()),
    )


def document_lengths(name: str, parameters: Mapping[str, float]) -> Lengths:
    """Return the characters of each document under a complete set of parameters."""
    rng = numpy_generator_for(int(parameters["seed"]), "synthetic lengths", name)
    drawn = np.rint(DISTRIBUTIONS[name].draw(rng, int(parameters["documents"]), parameters))
    return drawn.clip(parameters.get("min", 1), parameters.get("max")).astype(np.int64)


def _read_parameters(pairs: list[str], *, defaults: Mapping[str, float], setting: str) -> dict[str, float]:
    """Return the defaults with what the user gave laid over them, checked."""
    parameters = {"documents": 1000.0, "seed": 0.0, **defaults}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if key not in parameters:
            raise ConfigError(f"data.source={setting}: " + unknown_name(key, "parameter", parameters))
        try:
            number = float(value.replace("_", ""))
        except ValueError:
            number = math.nan
        if not equals or not math.isfinite(number):
            raise ConfigError(f"data.source={setting}: {key} must be a number, got {value!r}")
        parameters[key] = number
    _check(parameters, setting)
    return parameters


def _check(parameters: Mapping[str, float], setting: str) -> None:
    """Refuse values that describe no distribution."""
    for key, value in parameters.items():
        least = {"seed": 0.0, "sigma": 0.0, "exponent": 0.0, "share": 0.0}.get(key, 1.0)
        whole = key in ("documents", "seed", "min", "max")
        if value < least or (key == "share" and value > 1) or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            most = " and at most 1" if key == "share" else ""
            raise ConfigError(
                f"data.source={setting}: {key} must be {kind} at least {least:g}{most}, got {value:g}"
            )
    if parameters.get("min", 1) > parameters.get("max", math.inf):
        low, high = parameters["min"], parameters["max"]
        raise ConfigError(f"data.source={setting}: min must be at most max, got {low:g} and {high:g}")


def _documents(lengths: Lengths, *, seed: int) -> Iterator[Document]:
    """Yield one text per length; each depends on the seed and its own index."""
    words, successors = _language()
    characters_per_word = sum(map(len, words)) / NUM_WORDS + 1
    for index, length in enumerate(lengths.tolist()):
        rng = numpy_generator_for(seed, "synthetic", index)
        pair = rng.integers(NUM_WORDS, size=2).tolist()
        chain, size = [words[pair[0]], words[pair[1]]], len(words[pair[0]]) + len(words[pair[1]]) + 2
        while size <= length:
            missing = int((length - size) / characters_per_word) + 2
            for choice in rng.choice(len(SUCCESSOR_SHARES), size=missing, p=SUCCESSOR_SHARES).tolist():
                pair = [pair[1], successors[pair[0]][pair[1]][choice]]
                chain.append(words[pair[1]])
                size += len(chain[-1]) + 1
        yield Document(f"synthetic document {index}", " ".join(chain)[:length])


def _language() -> tuple[list[str], list[list[list[int]]]]:
    """Return the words, and the words that may follow each pair of words."""
    rng = numpy_generator_for(0, "synthetic language")
    numbers = rng.permutation(len(SYLLABLES) ** 2)[:NUM_WORDS].tolist()
    words = [SYLLABLES[number // len(SYLLABLES)] + SYLLABLES[number % len(SYLLABLES)] for number in numbers]
    words = [word + SYLLABLES[index % len(SYLLABLES)] * (index % 3) for index, word in enumerate(words)]
    shape = (NUM_WORDS, NUM_WORDS, len(SUCCESSOR_SHARES))
    return words, rng.integers(NUM_WORDS, size=shape).tolist()
