"""What is measured on held-out data: loss, accuracy, macro-F1; of spans exact match and token F1.

Shape suffixes: N examples, C classes, T tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  as everywhere

IGNORED = -100
LONGEST_ANSWER = 30
"""Tokens; the limit within which the best (start <= end) pair is looked for."""


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of classes, in nats; labels of `IGNORED` do not count."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def class_scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy, and the mean over the classes of their F1."""
    counted = labels.flatten() != IGNORED
    logits_NC, labels_N = logits.flatten(0, -2)[counted], labels.flatten()[counted]
    num_classes = logits_NC.shape[1]
    guess_N = logits_NC.argmax(1)
    pairs = torch.bincount(labels_N * num_classes + guess_N, minlength=num_classes**2)
    table_CC = pairs.view(num_classes, num_classes).double()
    right_C = table_CC.diagonal()
    f1_C = 2 * right_C / (table_CC.sum(0) + table_CC.sum(1)).clamp(min=1)
    return {"accuracy": (right_C.sum() / table_CC.sum()).item(), "macro_f1": f1_C.mean().item()}


def span_loss(logits_NT2: Tensor, labels_N2: Tensor) -> Tensor:
    """Return the mean cross-entropy of the first and the last token of the answer, in nats."""
    return F.cross_entropy(logits_NT2.transpose(1, 2).flatten(0, 1), labels_N2.flatten())


def best_spans(logits_NT2: Tensor) -> Tensor:
    """Return the likeliest first and last token with first <= last <= first + 29, [N, 2]."""
    first_NT, last_NT = logits_NT2.unbind(-1)
    num_tokens = first_NT.shape[1]
    allowed_TT = torch.ones(num_tokens, num_tokens).triu().tril(LONGEST_ANSWER - 1).bool()
    pairs_NTT = (first_NT.unsqueeze(2) + last_NT.unsqueeze(1)).masked_fill(~allowed_TT, -torch.inf)
    best_N = pairs_NTT.flatten(1).argmax(1)
    return torch.stack([best_N // num_tokens, best_N % num_tokens], dim=1)


def span_scores(logits_NT2: Tensor, labels_N2: Tensor) -> dict[str, float]:
    """Return the share of answers met exactly, and the mean F1 of their tokens' places."""
    guess_N2 = best_spans(logits_NT2)
    exact_N = (guess_N2 == labels_N2).all(1).double()
    first_N = torch.maximum(guess_N2[:, 0], labels_N2[:, 0])
    last_N = torch.minimum(guess_N2[:, 1], labels_N2[:, 1])
    shared_N = (last_N - first_N + 1).clamp(min=0)
    lengths_N = (guess_N2[:, 1] - guess_N2[:, 0] + 1) + (labels_N2[:, 1] - labels_N2[:, 0] + 1)
    return {"exact_match": exact_N.mean().item(), "token_f1": (2 * shared_N / lengths_N).mean().item()}
