"""One linear probe per layer, by normalised logistic regression and by scikit-learn's, on the same rows."""

import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hardy.cli.probe_split import Split

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]
RIDGE = 1e-3
"""Of features with variance 1."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one method reached on one layer."""

    accuracy: float
    """Share of test texts that are right."""
    iterations: int
    """Most that one of its problems took."""
    seconds: float
    """To train it."""
    converged: bool
    """Of ours: all training texts are right in all problems. Of scikit-learn's: it ended by itself."""


@dataclass(frozen=True, kw_only=True)
class LayerScores:
    """What both methods read from one layer."""

    layer: str
    """embedding, or the number of the block from 1."""
    ours: Score
    theirs: Score


def majority_accuracy(labels: list[str], split: Split) -> float:
    """Return how often the most frequent training class is right on the test texts."""
    found = np.asarray(labels)
    names, counts = np.unique(found[split.train], return_counts=True)
    return float((found[split.test] == names[counts.argmax()]).mean())


def probe_layers(
    vectors_NLD: "Tensor", labels: list[str], split: Split, *, max_iter: int
) -> list[LayerScores]:
    """Train both methods on each layer, on the same whitened features.

    Features of a model are strongly correlated; without whitening the margins are too small to be found soon,
    and scikit-learn's classifier is less often right, too.
    """
    from sklearn.linear_model import LogisticRegression

    from hardy.linear.estimators import NormalizedLogisticRegression

    found = np.asarray(labels)
    train_labels, test_labels = found[split.train], found[split.test]
    scores: list[LayerScores] = []
    for layer in range(vectors_NLD.shape[1]):
        rows = vectors_NLD[:, layer].numpy()
        train, test = whitened(*standardised(rows[split.train], rows[split.test]))
        ours = NormalizedLogisticRegression(multi_class="softmax", max_iter=max_iter)
        theirs = LogisticRegression(max_iter=max_iter)
        scores.append(
            LayerScores(
                layer=str(layer) if layer else "embedding",
                ours=_score(ours, train, train_labels, test, test_labels),
                theirs=_score(theirs, train, train_labels, test, test_labels),
            )
        )
    return scores


def standardised(train: Array, test: Array) -> tuple[Array, Array]:
    """Return both with mean 0 and deviation 1 of each feature on the training rows; a constant one is 0."""
    mean, deviation = train.mean(0), train.std(0)
    deviation = np.where(deviation > 0, deviation, 1)
    return (train - mean) / deviation, (test - mean) / deviation


def whitened(train: Array, test: Array) -> tuple[Array, Array]:
    """Return both along the training rows' principal axes, with about the same variance along each.

    `RIDGE` keeps axes of almost no variance small; axes that no training row has are dropped.
    """
    _, sizes, axes = np.linalg.svd(train, full_matrices=False)
    axes = axes.T / np.sqrt(sizes**2 / len(train) + RIDGE)
    return train @ axes, test @ axes


def _score(model: Any, rows: Array, labels: Array, test_rows: Array, test_labels: Array) -> Score:
    """Train and test one method."""
    from sklearn.exceptions import ConvergenceWarning

    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.fit(rows, labels)
    seconds = time.perf_counter() - began
    for warning in said:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return Score(
        accuracy=float(model.score(test_rows, test_labels)),
        iterations=int(np.max(model.n_iter_)),
        seconds=seconds,
        converged=not any(issubclass(warning.category, ConvergenceWarning) for warning in said),
    )
