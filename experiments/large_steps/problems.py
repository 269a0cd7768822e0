"""What the solvers are tried on: the paper's two constructions, Gaussian points, digits, layers."""

import contextlib
import io
import tempfile
from pathlib import Path

import torch

from hardy.cli.main import main
from hardy.cli.probe import vectors_of
from hardy.cli.probe_layers import probe_layers
from hardy.cli.probe_split import split_by_group
from hardy.cli.probe_tasks import built_in
from hardy.cli.weights import load_run
from hardy.data.pydocs import pydocs_source
from hardy.reference import perceptron as twin
from hardy.rng import generator_for


def balanced(seed=0):
    """Return 40 Gaussian rows in 5 dimensions turned to one side of a hidden direction."""
    A = torch.randn(40, 5, generator=generator_for(seed, "balanced"), dtype=torch.float64)
    w = torch.randn(5, generator=generator_for(seed, "direction"), dtype=torch.float64)
    return A * (A @ w).sign()[:, None]


def margin_points():
    """Return the 42 rows on which solvers go on after separation; another program of ours drew them so."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    w = torch.randn(8, generator=generator, dtype=torch.float64)
    distance = A @ w / w.norm()
    return (A * distance.sign()[:, None])[distance.abs() > 0.3]


def digits(kind):
    """Return z of the digits 3 and 8 with a bias, scaled; imbalanced keeps every tenth 8."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    threes, eights = (torch.tensor(X[y == digit]) for digit in (3, 8))
    eights = eights if kind == "balanced" else eights[::10]
    rows = torch.cat([threes, eights])
    signs = torch.cat([torch.ones(len(threes)), -torch.ones(len(eights))]).double()
    rows = rows - rows.mean(0)
    rows = rows / rows.square().sum(1).mean().sqrt()
    return torch.cat([rows, torch.ones(len(rows), 1).double()], 1) * signs[:, None]


DATA = {
    "worst case, n = 100": lambda: twin.worst_case(100),
    "worst case, n = 500": lambda: twin.worst_case(500),
    "worst case, n = 1000": lambda: twin.worst_case(1000),
    "worst case, n = 2000": lambda: twin.worst_case(2000),
    "Gaussian, balanced": balanced,
    "digits 3 and 8, balanced": lambda: digits("balanced"),
    "digits 3 and 8, imbalanced": lambda: digits("imbalanced"),
}


def digit_accuracies(seed):
    """Return test accuracy on all ten digits: ours, scikit-learn's."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    from hardy.linear import NormalizedLogisticRegression

    X, y = load_digits(return_X_y=True)
    train, test, train_y, test_y = train_test_split(X, y, random_state=seed, stratify=y)
    ours = NormalizedLogisticRegression(multi_class="softmax").fit(train, train_y)
    theirs = LogisticRegression(max_iter=5000).fit(train, train_y)
    return {
        "ours": ours.score(test, test_y),
        "theirs": theirs.score(test, test_y),
        "iterations": int(ours.n_iter_.max()),
        "converged": ours.converged_,
    }


def layer_accuracies(seed, *, is_smoke):
    """Return test accuracies on every layer of a small language model, trained here: docstring or code."""
    short = (
        [
            "--train.steps",
            "2",
            "--optim.schedule.warmup_steps",
            "0",
            "--train.batch_packs",
            "1",
            "--data.limit_mb",
            "0.2",
        ]
        if is_smoke
        else []
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        words = ["train", "tiny", "--run-dir", str(run), "--data.cache_dir", f"{folder}/cache"]
        words += ["--log.progress", "none", "--train.device", "cpu", "--train.seed", str(seed), *short]
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(words) == 0
        model, tokenizer = load_run(run, None)
    documents = pydocs_source(packages=[]).read()
    some = [next(documents) for _ in range(20)] if is_smoke else list(documents)
    examples = built_in("docstring", num_examples=40 if is_smoke else 1000, seed=seed, documents=some)
    vectors, _ = vectors_of(model, tokenizer, examples.texts, pool="mean", most_tokens=256)
    split = split_by_group(examples.labels, examples.groups, test_share=0.25, seed=seed)
    scores = probe_layers(vectors, examples.labels, split, max_iter=1000)
    return {
        "layers": [score.layer for score in scores],
        "ours": [score.ours.accuracy for score in scores],
        "theirs": [score.theirs.accuracy for score in scores],
    }
