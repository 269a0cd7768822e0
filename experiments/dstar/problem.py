"""Ten classes, twenty workers, one hidden layer: data, splits, and the gradients of all workers at once."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from hardy.rng import generator_for

NUM_WORKERS, NUM_CLASSES, FEATURES, HIDDEN = 20, 10, 64, 64
BATCH, TRUSTED_BATCH = 32, 64
TRUSTED = NUM_WORKERS
"""Whose row is the gradient of the trusted batch: it stands after those of the workers."""
SHAPES = ((HIDDEN, FEATURES), (HIDDEN,), (NUM_CLASSES, HIDDEN), (NUM_CLASSES,))
SIZES = tuple(torch.Size(shape).numel() for shape in SHAPES)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Examples, and which of them belong to whom."""

    inputs: Tensor
    labels: Tensor
    num_train: int
    """The first examples are the workers'."""
    num_trusted: int
    """The next are the trusted pool; the rest is the test."""

    def test(self) -> tuple[Tensor, Tensor]:
        """Return inputs and labels held out."""
        first = self.num_train + self.num_trusted
        return self.inputs[first:], self.labels[first:]


@lru_cache
def gaussian(_seed: int) -> Data:
    """Return ten blurred points in 64 dimensions, the same for every seed."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(NUM_CLASSES, FEATURES, generator=generator)
    labels = torch.randint(NUM_CLASSES, (12_000,), generator=generator)
    noise = torch.randn(12_000, FEATURES, generator=generator)
    return Data(inputs=0.45 * centres[labels] + noise, labels=labels, num_train=9_800, num_trusted=200)


@lru_cache
def digits(seed: int) -> Data:
    """Return the 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn, shuffled."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=generator_for(seed, "digits"))
    inputs = (torch.tensor(found.data, dtype=torch.float32) - 8) / 6
    return Data(
        inputs=inputs[order], labels=torch.tensor(found.target)[order], num_train=1200, num_trusted=100
    )


DATA = {"gaussian": gaussian, "digits": digits}


def stream(seed: int, purpose: str, draw: int) -> torch.Generator:
    """Return the random stream of a purpose; every draw but the first has one of its own."""
    return generator_for(seed, purpose, *([draw] if draw else []))


def split_iid(data: Data, seed: int, draw: int = 0) -> Tensor:
    """Return the examples of each worker: a random split."""
    order = torch.randperm(data.num_train, generator=stream(seed, "split", draw))
    return order.view(NUM_WORKERS, -1)


def split_half_by_label(data: Data, seed: int, draw: int = 0) -> Tensor:
    """Return the examples of each worker: the first half of a slice sorted by label, half at random."""
    generator = stream(seed, "split", draw)
    sorted_by_label = data.labels[: data.num_train].argsort(stable=True).view(NUM_WORKERS, -1)
    num_own = sorted_by_label.shape[1] // 2
    num_others = sorted_by_label.shape[1] - num_own
    others = [torch.randperm(data.num_train, generator=generator)[:num_others] for _ in range(NUM_WORKERS)]
    return torch.cat([sorted_by_label[:, :num_own], torch.stack(others)], 1)


def split_by_label(data: Data, _seed: int, _draw: int = 0) -> Tensor:
    """Return the examples of each worker: one of the two halves of a label, near enough.

    Workers 0 to 9 hold the first halves, 10 to 19 the second: those that attack take no label away.
    """
    sorted_by_label = data.labels[: data.num_train].argsort(stable=True)
    return sorted_by_label.view(NUM_WORKERS // 2, 2, -1).transpose(0, 1).reshape(NUM_WORKERS, -1)


SPLITS = {"iid": split_iid, "non-iid": split_half_by_label, "by label": split_by_label}


def initial_weights(seed: int) -> Tensor:
    """Return all weights as one vector: 0.1 times normal numbers, biases 0.

    Straight from torch's generator, as the other program seems to have drawn them: with seed 0 the first ten
    hidden units are a tenth of the centres of `gaussian`, drawn from the same stream. That is a head start.

    Example:
        >>> centres = torch.randn(NUM_CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
        >>> torch.equal(weights_of(initial_weights(0))[0][:NUM_CLASSES], 0.1 * centres)
        True
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [
        0.1 * torch.randn(shape, generator=generator) if len(shape) == 2 else torch.zeros(shape)
        for shape in SHAPES
    ]
    return torch.cat([part.flatten() for part in parts])


def weights_of(theta: Tensor) -> list[Tensor]:
    """Return the matrices and biases as views of the vector."""
    return [part.view(shape) for part, shape in zip(theta.split(SIZES), SHAPES, strict=True)]


def gradients(theta: Tensor, inputs_WBF: Tensor, labels_WB: Tensor) -> Tensor:
    """Return the gradient [W, D] of each worker's mean cross-entropy, all in a few products."""
    W1, b1, W2, b2 = weights_of(theta)
    hidden_WBH = (inputs_WBF @ W1.T + b1).relu()
    errors_WBC = (hidden_WBH @ W2.T + b2).softmax(-1)
    errors_WBC -= one_hot(labels_WB, NUM_CLASSES)
    errors_WBC /= labels_WB.shape[1]
    back_WBH = (errors_WBC @ W2) * (hidden_WBH > 0)
    parts = (back_WBH.mT @ inputs_WBF, back_WBH.sum(1), errors_WBC.mT @ hidden_WBH, errors_WBC.sum(1))
    return torch.cat([part.flatten(1) for part in parts], 1)


def accuracy(theta: Tensor, inputs: Tensor, labels: Tensor) -> float:
    """Return the share of examples that are told right."""
    W1, b1, W2, b2 = weights_of(theta)
    found = ((inputs @ W1.T + b1).relu() @ W2.T + b2).argmax(1)
    return (found == labels).double().mean().item()
