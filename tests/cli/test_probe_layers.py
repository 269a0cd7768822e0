"""Probes of layers: the features, the majority, and that the layer that knows is found."""

import numpy as np
import pytest
import torch

from hardy.cli.probe_layers import majority_accuracy, probe_layers, standardised, whitened
from hardy.cli.probe_split import split_by_group
from hardy.rng import generator_for

pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra linear)")
LABELS = ["a"] * 60 + ["b"] * 30 + ["c"] * 2


def test_the_majority_is_that_of_the_training_texts():
    split = split_by_group(LABELS, test_share=0.25, seed=0)
    assert majority_accuracy(LABELS, split) == 15 / 24


def test_features_are_standardised_and_whitened_by_the_training_rows():
    rows = torch.randn(300, 4, generator=generator_for(0, "rows")).numpy()
    rows[:, 1] = rows[:, 0] * 100 + 7 + rows[:, 1]
    rows[:, 3] = 5.0
    train, test = standardised(rows[:200], rows[200:])
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(train.std(0), [1, 1, 1, 0], atol=1e-3)
    np.testing.assert_allclose(
        test, (rows[200:] - rows[:200].mean(0)) / [*rows[:200].std(0)[:3], 1], rtol=1e-3, atol=1e-3
    )
    white, white_test = whitened(train, test)
    spread = white.T @ white / 200
    np.testing.assert_allclose(spread - np.diag(np.diag(spread)), 0, atol=1e-4)
    assert np.diag(spread)[:2] == pytest.approx([1, 1], abs=2e-3)
    assert 0.01 < np.diag(spread)[2] < 1, "an axis of almost no variance stays small"
    np.testing.assert_allclose(white_test, test @ np.linalg.lstsq(train, white, rcond=None)[0], atol=1e-2)


def test_the_layer_that_knows_is_found_by_both():
    generator = generator_for(0, "layers")
    vectors = torch.randn(240, 3, 6, generator=generator)
    codes = torch.arange(240) % 3
    vectors[:, 1, :3] += 6 * torch.eye(3)[codes]
    labels = [str(code) for code in codes.tolist()]
    split = split_by_group(labels, test_share=0.25, seed=0)
    scores = probe_layers(vectors, labels, split, max_iter=300)
    assert [score.layer for score in scores] == ["embedding", "1", "2"]
    for one in ("ours", "theirs"):
        accuracies = [getattr(score, one).accuracy for score in scores]
        assert accuracies[1] > 0.95 and max(accuracies[0], accuracies[2]) < 0.6
    assert scores[1].ours.converged and scores[1].ours.iterations < 300
    assert not scores[0].ours.converged and scores[0].ours.iterations == 300
    assert all(score.ours.seconds > 0 for score in scores)
