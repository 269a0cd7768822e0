"""The estimators: scikit-learn's own checks, NumPy and torch, two and more classes, what they report."""

import pickle
import subprocess
import sys
import warnings
from unittest import SkipTest

import numpy as np
import pytest
import torch

from hardy.config import UserError
from hardy.linear import BatchPerceptron, LogisticGD, NormalizedLogisticRegression

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra linear)")
import joblib  # noqa: E402  the package may be missing
from sklearn.base import clone  # noqa: E402  the package may be missing
from sklearn.datasets import load_digits  # noqa: E402
from sklearn.exceptions import ConvergenceWarning  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.utils.estimator_checks import estimator_checks_generator  # noqa: E402

CHECKED = [
    NormalizedLogisticRegression(max_iter=100),
    NormalizedLogisticRegression(max_iter=40, stop="margin", multi_class="softmax"),
    LogisticGD(max_iter=100),
    BatchPerceptron(max_iter=100),
]


@pytest.mark.parametrize("estimator", CHECKED, ids=str)
@pytest.mark.filterwarnings("ignore")  # the checks' own data is not always separable
def test_scikit_learns_checks_pass(estimator):
    passed = 0
    for one, check in estimator_checks_generator(clone(estimator)):
        try:
            check(one)
            passed += 1
        except SkipTest:  # needs pandas, or another array library
            continue
    assert passed > 50


def three_clouds(*, n=60, dtype=np.float64):
    generator = np.random.default_rng(0)
    y = np.arange(n) % 3
    return (generator.normal(size=(n, 4)) * 0.5 + 6 * np.eye(3, 4)[y] + 100).astype(dtype), y


@pytest.mark.parametrize("multi_class", ["one_vs_rest", "softmax"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_tensor_gives_what_an_array_gives(multi_class, dtype):
    X, y = three_clouds(dtype=dtype)
    model = NormalizedLogisticRegression(multi_class=multi_class)
    of_array, of_tensor = clone(model).fit(X, y), clone(model).fit(torch.tensor(X), torch.tensor(y))
    np.testing.assert_allclose(of_array.coef_, of_tensor.coef_, rtol=1e-4)
    assert of_array.converged_ and of_array.n_iter_.tolist() == of_tensor.n_iter_.tolist()
    assert of_array.score(X, y) == of_tensor.score(torch.tensor(X), torch.tensor(y)) == 1.0
    predicted = of_tensor.predict(torch.tensor(X))
    assert isinstance(predicted, torch.Tensor) and predicted.tolist() == y.tolist()
    scores = of_array.decision_function(torch.tensor(X))
    assert isinstance(scores, torch.Tensor) and scores.dtype == torch.tensor(X).dtype
    np.testing.assert_allclose(scores.numpy(), of_array.decision_function(X), rtol=1e-3, atol=1e-3)


def test_words_come_back_as_words_for_tensors_too():
    X, y = three_clouds()
    model = NormalizedLogisticRegression().fit(torch.tensor(X), np.array(["a", "b", "c"])[y])
    assert model.predict(torch.tensor(X))[:3].tolist() == ["a", "b", "c"]


@pytest.mark.parametrize("bias_scale", [1.0, 3.0])
@pytest.mark.parametrize("features", ["scaled", "as_given"])
def test_the_report_is_what_can_be_counted(features, bias_scale):
    X, y = three_clouds()
    X, y = X - 100, y == 1
    model = NormalizedLogisticRegression(features=features, stop="margin", bias_scale=bias_scale).fit(X, y)
    distance = model.decision_function(X) * np.where(y, 1, -1)
    assert (distance <= 0).sum() == model.n_misclassified_[0] == 0
    np.testing.assert_allclose(distance.min(), model.min_margin_[0], rtol=1e-6)
    assert model.min_margin_[0] <= model.margin_upper_[0]


def test_without_a_bias_the_features_are_not_centred():
    X, y = three_clouds()
    model = NormalizedLogisticRegression(fit_intercept=False).fit(X - 100, y == 1)
    assert model.intercept_.tolist() == [0.0] and model.coef_.shape == (1, 4)
    direct = NormalizedLogisticRegression(fit_intercept=False, features="as_given").fit(X - 100, y == 1)
    cosine = (model.coef_ @ direct.coef_.T) / np.linalg.norm(model.coef_) / np.linalg.norm(direct.coef_)
    assert cosine.item() == pytest.approx(1), "steps of the default size do not depend on the scale"


@pytest.mark.parametrize("estimator", [NormalizedLogisticRegression(gamma=1e6), LogisticGD(gamma=1e6)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_steps_of_a_million_are_stable(estimator, dtype):
    X, y = three_clouds(dtype=dtype)
    model = clone(estimator).fit(X, y)
    assert model.converged_ and model.score(X, y) == 1.0
    assert np.isfinite(model.coef_).all()


def test_the_limit_of_large_steps_is_the_perceptron():
    X, y = three_clouds()
    X = X + np.random.default_rng(1).normal(size=X.shape)
    for large, limit in (
        (LogisticGD(gamma=1e9), BatchPerceptron()),
        (NormalizedLogisticRegression(gamma=1e9), BatchPerceptron(update="normalized")),
    ):
        np.testing.assert_allclose(large.fit(X, y == 1).coef_, limit.fit(X, y == 1).coef_, rtol=1e-5)


@pytest.mark.parametrize("estimator", CHECKED, ids=str)
def test_estimators_survive_being_saved_and_cloned(estimator, tmp_path):
    X, y = three_clouds()
    model = clone(estimator).set_params(max_iter=5_000).fit(X, y)
    joblib.dump(model, tmp_path / "model.joblib")
    saved = [joblib.load(tmp_path / "model.joblib"), pickle.loads(pickle.dumps(model))]
    for found in saved:
        assert found.get_params() == model.get_params()
        for rows in (X, torch.tensor(X)):
            assert (found.predict(rows) == model.predict(rows)).all()
            assert (found.decision_function(rows) == model.decision_function(rows)).all()
    again = clone(saved[0])
    assert not hasattr(again, "coef_")
    assert (again.fit(X, y).coef_ == model.coef_).all()


def test_data_that_nothing_separates_is_said_so():
    X = np.array([[0.0], [1.0], [2.0], [3.0]])
    with pytest.warns(
        ConvergenceWarning, match=r"after 200 steps: \[[12]\] rows are misclassified.*LogisticReg"
    ):
        model = NormalizedLogisticRegression(max_iter=200).fit(X, [0, 1, 0, 1])
    assert not model.converged_ and model.n_misclassified_[0] in (1, 2)
    assert model.margin_upper_[0] < 0.2


def test_digits_are_read_as_well_as_by_scikit_learn():
    X, y = load_digits(return_X_y=True)
    train = np.arange(len(y)) % 4 != 0
    theirs = LogisticRegression(max_iter=5000).fit(X[train], y[train]).score(X[~train], y[~train])
    ours = NormalizedLogisticRegression(multi_class="softmax", gamma=1e6).fit(X[train], y[train])
    assert ours.converged_
    assert ours.score(X[~train], y[~train]) >= theirs - 0.01


@pytest.mark.parametrize(
    ("settings", "fit", "text"),
    [
        ({}, {"y": [1, 1, 1, 1]}, "y holds one class (1) in 4 rows"),
        ({}, {"sample_weight": [1, 0, 1, 0]}, "y holds one class (0) in 2 rows with a positive weight"),
        ({}, {"sample_weight": [1, 1]}, "sample_weight must hold one number for each of 4 rows"),
        ({}, {"sample_weight": [1, 1, 1, -1]}, "sample_weight must be finite and not negative"),
        ({}, {"sample_weight": [0, 0, 0, 0]}, "sample_weight is zero for all rows"),
        ({}, {"X": torch.tensor([[float("nan")]] * 4)}, "X holds NaN or Inf"),
        ({}, {"X": torch.ones(4)}, "X must be a table with rows and features"),
        ({}, {"X": torch.ones(3, 1)}, "X has 3 rows and y has 4"),
        ({"gamma": -1.0}, {}, "linear.gamma must be"),
        ({"features": "scald"}, {}, "there is no choice of features 'scald'; did you mean 'scaled'"),
        ({"multi_class": "softmx"}, {}, "there is no multi_class 'softmx'; did you mean 'softmax'"),
        ({"bias_scale": 0.0}, {}, "bias_scale must be above 0 and finite, got 0.0"),
    ],
)
def test_what_cannot_work_is_refused(settings, fit, text):
    data = {"X": [[0.0], [1.0], [2.0], [3.0]], "y": [0, 1, 0, 1]} | fit
    with pytest.raises(UserError) as error:
        NormalizedLogisticRegression(**settings).fit(**data)
    assert str(error.value).startswith(text)


def test_other_refusals():
    with pytest.raises(UserError, match="there is no update 'men'; did you mean 'mean'"):
        BatchPerceptron(update="men").fit([[0.0], [1.0]], [0, 1])
    model = BatchPerceptron().fit([[0.0], [1.0]], [0, 1])
    with pytest.raises(UserError, match="X has 2 features, but fit saw 1"):
        model.predict(torch.ones(1, 2))


def test_scaling_and_weights_leave_the_callers_data_alone():
    X, y = three_clouds()
    for rows in (X.copy(), torch.tensor(X)):
        NormalizedLogisticRegression().fit(rows, y, sample_weight=np.arange(len(y)))
        assert (np.asarray(rows) == X).all()


def test_without_scikit_learn_the_way_out_is_said():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import hardy.linear\n"
        "from hardy.linear import SolverConfig, solve\n"
        "try: hardy.linear.LogisticGD\n"
        "except hardy.UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "need scikit-learn 1.6 or newer" in done.stdout and "pip install 'hardy[linear]'" in done.stdout


def test_the_room_loads_nothing_before_use():
    code = "import sys, hardy.linear; print({'torch', 'sklearn', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n"
    assert not hasattr(sys.modules["hardy.linear"], "no_such_name")


def test_convergence_is_silent():
    X, y = three_clouds()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NormalizedLogisticRegression().fit(X, y)
