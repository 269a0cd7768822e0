"""A small classifier on six nodes, each of which sees half of the classes; all nodes at once, float64.

Letters: N nodes, B examples of a batch, F features, H hidden units, C classes, D parameters of one model.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from hardy.rng import generator_for

N, B, F, H, C = 6, 100, 64, 64, 10
SHAPES = [(F, H), (H,), (H, C), (C,)]
D = sum(torch.Size(shape).numel() for shape in SHAPES)


def gaussian():
    """Return (train, test) of (x, y): ten Gaussian clouds in 64 dimensions."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(C, F, generator=generator)
    y = torch.randint(C, (12000,), generator=generator)
    x = (0.45 * centres[y] + torch.randn(12000, F, generator=generator)).double()
    return (x[:9800], y[:9800]), (x[-2000:], y[-2000:])


def digits():
    """Return (train, test) of (x, y): handwritten digits of 8 x 8 pixels, 1,397 and 400 of them."""
    images = load_digits()
    order = torch.randperm(len(images.target), generator=generator_for(0, "digits"))
    x = torch.from_numpy(images.data)[order]
    y = torch.from_numpy(images.target)[order].long()
    x = (x - x[:-400].mean(0)) / (x[:-400].std(0) + 1e-3)
    return (x[:-400], y[:-400]), (x[-400:], y[-400:])


DATA = {"clouds": gaussian, "digits": digits}


def halves(y):
    """Return [N, n]: examples sorted by label; nodes 0 to 2 own the first half, 3 to 5 the second."""
    first, second = y.argsort(stable=True)[: len(y) // 2 * 2].chunk(2)
    return torch.stack([first] * (N // 2) + [second] * (N // 2))


def weights(seed):
    """Return one model's first weights, [D]; all nodes begin with them."""
    generator = generator_for(seed, "weights")
    parts = [torch.randn(s, generator=generator).double() * (0.1 if len(s) > 1 else 0.0) for s in SHAPES]
    return torch.cat([part.flatten() for part in parts])


def unpacked(z_ND):
    """Return [W1, b1, W2, b2], each of all nodes."""
    parts = z_ND.split([torch.Size(shape).numel() for shape in SHAPES], dim=1)
    return [part.reshape(-1, *shape) for part, shape in zip(parts, SHAPES, strict=True)]


def gradients(z_ND: Tensor, x_NBF: Tensor, y_NB: Tensor) -> Tensor:
    """Return every node's gradient of its mean cross-entropy, [N, D]."""
    W1, b1, W2, b2 = unpacked(z_ND)
    hidden_NBH = (x_NBF @ W1 + b1[:, None]).relu()
    error_NBC = (hidden_NBH @ W2 + b2[:, None]).softmax(2)
    error_NBC -= torch.nn.functional.one_hot(y_NB, C)
    error_NBC /= y_NB.shape[1]
    back_NBH = (error_NBC @ W2.mT) * (hidden_NBH > 0)
    parts = [x_NBF.mT @ back_NBH, back_NBH.sum(1), hidden_NBH.mT @ error_NBC, error_NBC.sum(1)]
    return torch.cat([part.flatten(1) for part in parts], 1)


def accuracies(z_ND, x, y):
    """Return each model's share of right answers, [N]."""
    W1, b1, W2, b2 = unpacked(z_ND)
    scores = (x @ W1 + b1[:, None]).relu() @ W2 + b2[:, None]
    return (scores.argmax(2) == y).double().mean(1)
