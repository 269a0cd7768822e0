"""Four tasks without a download, each an endless source of examples from a fixed law.

`teacher` and `markov` follow hardy's specification of the recipe to the letter. `domains` adds to its bigrams
a frequency of tokens for each class, without which every optimizer stays near an accuracy of 0.6. `span`
makes its one sentence precise. The law of a task is drawn once; the seed of a run draws weights and batches.

Shape suffixes: N examples, T tokens, V vocabulary, C classes.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import markov
import torch
from models import Transformer, perceptron
from scores import IGNORED, class_loss, class_scores, span_loss, span_scores
from torch import Generator, Tensor, nn

from hardy.rng import generator_for

Examples = tuple[Tensor, Tensor]
"""Inputs and labels."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained on."""

    draw: Callable[[int, Generator], Examples]
    """Draws so many examples."""
    build: Callable[[], nn.Module]
    """Makes the model, with torch's initial weights from torch's own generator."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """Of logits and labels, 0-d."""
    scores: Callable[[Tensor, Tensor], dict[str, float]]
    """Of logits and labels of all held-out examples."""
    ideal: Callable[[Tensor], Tensor] | None = None
    """Logits of inputs by the law itself, which no model can better; None where the answer is certain."""
    batch: int
    """Examples of a step."""
    steps: int
    num_held_out: int
    """Examples for choosing a learning rate, and as many others for the report."""


# teacher: a noisy function of 32 inputs whose scales fall by a factor of 100

NUM_INPUTS, NUM_HIDDEN, NUM_CLASSES = 32, 64, 10
INPUT_SCALES = 10 * torch.logspace(0, -2, NUM_INPUTS)


@functools.cache
def _teacher_weights() -> tuple[Tensor, Tensor]:
    generator = generator_for(0, "teacher")
    a = torch.randn(NUM_INPUTS, NUM_HIDDEN, generator=generator) / math.sqrt(NUM_INPUTS)
    return a, torch.randn(NUM_HIDDEN, NUM_CLASSES, generator=generator) / 8


def teacher_logits(z_NI: Tensor) -> Tensor:
    """Return the teacher's logits of hidden inputs, [N, C]."""
    a, b = _teacher_weights()
    return 6 * torch.tanh(3 * z_NI @ a) @ b


def draw_teacher(count: int, generator: Generator) -> Examples:
    """Return inputs [N, 32] and classes [N]."""
    z_NI = torch.randn(count, NUM_INPUTS, generator=generator)
    labels_N = torch.multinomial(teacher_logits(z_NI).softmax(1), 1, generator=generator).squeeze(1)
    return z_NI * INPUT_SCALES, labels_N


# markov: the next token depends on the last two

MARKOV_VOCABULARY, MARKOV_TOKENS = 16, 17


def draw_markov(count: int, generator: Generator) -> Examples:
    """Return tokens [N, 16] and the token after each; the second, which nothing tells, does not count."""
    tokens_NT = markov.draw(count, MARKOV_TOKENS, generator, num_symbols=MARKOV_VOCABULARY)
    labels_NT = tokens_NT[:, 1:].clone()
    labels_NT[:, 0] = IGNORED
    return tokens_NT[:, :-1], labels_NT


def ideal_markov(tokens_NT: Tensor) -> Tensor:
    """Return the logits of each next token by the law, [N, 16, V]; all equal for the second token."""
    logits_NTV = markov.transitions(MARKOV_VOCABULARY).log()[tokens_NT[:, :-1], tokens_NT[:, 1:]]
    return torch.cat([torch.zeros_like(logits_NTV[:, :1]), logits_NTV], dim=1)


# domains: which of four languages is a text in

DOMAIN_PRIORS = (0.5, 0.25, 0.15, 0.10)
DOMAIN_VOCABULARY, DOMAIN_TOKENS = 24, 24
BIGRAM_STRENGTH, FREQUENCY_STRENGTH = 0.6, 0.4


@functools.cache
def domain_transitions() -> Tensor:
    """Return the chances of the next token by class and last token, [C, V, V]."""
    generator, classes, vocabulary = generator_for(0, "domains"), len(DOMAIN_PRIORS), DOMAIN_VOCABULARY
    base_VV = torch.randn(vocabulary, vocabulary, generator=generator)
    bigrams_CVV = torch.randn(classes, vocabulary, vocabulary, generator=generator)
    frequencies_C1V = torch.randn(classes, 1, vocabulary, generator=generator)
    return (base_VV + BIGRAM_STRENGTH * bigrams_CVV + FREQUENCY_STRENGTH * frequencies_C1V).softmax(-1)


def draw_domains(count: int, generator: Generator) -> Examples:
    """Return tokens [N, 24] and classes [N]."""
    priors = torch.tensor(DOMAIN_PRIORS)
    labels_N = torch.multinomial(priors, count, replacement=True, generator=generator)
    tokens_NT = torch.empty(count, DOMAIN_TOKENS, dtype=torch.int64)
    tokens_NT[:, 0] = torch.randint(DOMAIN_VOCABULARY, (count,), generator=generator)
    for place in range(1, DOMAIN_TOKENS):
        chances_NV = domain_transitions()[labels_N, tokens_NT[:, place - 1]]
        tokens_NT[:, place] = torch.multinomial(chances_NV, 1, generator=generator).squeeze(1)
    return tokens_NT, labels_N


def ideal_domains(tokens_NT: Tensor) -> Tensor:
    """Return the logits of each class by the law, [N, C]."""
    steps_CNT = domain_transitions().log()[:, tokens_NT[:, :-1], tokens_NT[:, 1:]]
    return torch.tensor(DOMAIN_PRIORS).log() + steps_CNT.sum(-1).T


# span: token 0 names a type; the answer is the inside of the one span of that type

NUM_TYPES, SPAN_TOKENS, LONGEST_INSIDE = 4, 24, 3
END = 2 * NUM_TYPES
"""Tokens below 4 ask for a type, 4 to 7 open a span of a type, this one closes it, later ones are words."""
SPAN_VOCABULARY = 32


def draw_span(count: int, generator: Generator) -> Examples:
    """Return tokens [N, 24] and the first and last place of the answer [N, 2].

    A text has one to four spans of different types, in any order and with words between them; words say
    nothing about types.
    """
    number_N1 = torch.randint(1, NUM_TYPES + 1, (count, 1), generator=generator)
    exists_NS = torch.arange(NUM_TYPES) < number_N1
    inside_NS = torch.randint(1, LONGEST_INSIDE + 1, (count, NUM_TYPES), generator=generator)
    size_NS = (inside_NS + 2) * exists_NS
    types_NS = torch.rand(count, NUM_TYPES, generator=generator).argsort(1)
    free_N1 = SPAN_TOKENS - 1 - size_NS.sum(1, keepdim=True)
    share_NS = torch.rand(count, NUM_TYPES, generator=generator).sort(1).values
    before_NS = (share_NS * (free_N1 + 1)).long()  # words before each span, never fewer than before the last
    open_NS = 1 + before_NS + size_NS.cumsum(1) - size_NS
    tokens_NT = torch.randint(END + 1, SPAN_VOCABULARY, (count, SPAN_TOKENS), generator=generator)
    rows_NS = torch.arange(count).unsqueeze(1).expand_as(open_NS)
    tokens_NT[rows_NS[exists_NS], open_NS[exists_NS]] = NUM_TYPES + types_NS[exists_NS]
    tokens_NT[rows_NS[exists_NS], (open_NS + inside_NS + 1)[exists_NS]] = END
    asked_N1 = (torch.rand(count, 1, generator=generator) * number_N1).long()
    tokens_NT[:, :1] = types_NS.gather(1, asked_N1)
    first_N1 = open_NS.gather(1, asked_N1) + 1
    return tokens_NT, torch.cat([first_N1, first_N1 + inside_NS.gather(1, asked_N1) - 1], dim=1)


TASKS = {
    "teacher": Task(
        draw=draw_teacher,
        build=lambda: perceptron((NUM_INPUTS, 64, 64, NUM_CLASSES)),
        loss=class_loss,
        scores=class_scores,
        ideal=lambda inputs_NI: teacher_logits(inputs_NI / INPUT_SCALES),
        batch=64,
        steps=600,
        num_held_out=4096,
    ),
    "markov": Task(
        draw=draw_markov,
        build=lambda: Transformer(
            vocab_size=MARKOV_VOCABULARY,
            num_tokens=MARKOV_TOKENS - 1,
            num_outputs=MARKOV_VOCABULARY,
            use="next token",
        ),
        loss=class_loss,
        scores=class_scores,
        ideal=ideal_markov,
        batch=32,
        steps=300,
        num_held_out=2048,
    ),
    "domains": Task(
        draw=draw_domains,
        build=lambda: Transformer(
            vocab_size=DOMAIN_VOCABULARY,
            num_tokens=DOMAIN_TOKENS,
            num_outputs=len(DOMAIN_PRIORS),
            use="whole text",
        ),
        loss=class_loss,
        scores=class_scores,
        ideal=ideal_domains,
        batch=32,
        steps=300,
        num_held_out=2048,
    ),
    "span": Task(
        draw=draw_span,
        build=lambda: Transformer(
            vocab_size=SPAN_VOCABULARY, num_tokens=SPAN_TOKENS, num_outputs=2, use="each token"
        ),
        loss=span_loss,
        scores=span_scores,
        batch=32,
        steps=400,
        num_held_out=2048,
    ),
}
"""By name."""
