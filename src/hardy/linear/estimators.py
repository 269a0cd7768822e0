"""The linear solvers as scikit-learn estimators, for NumPy arrays, SciPy's sparse matrices and torch tensors.

Paper: A. Tyurin, arXiv 2412.08424; see `solver`. Ours: more than two classes, scaling and bias. They are
right when every margin is positive, and say how many rows are not and how large the least margin is; the loss
says neither. Data that no weights separate needs a regularised method instead, such as scikit-learn's
LogisticRegression; then the best weights seen are kept and `converged_` is false.
"""

import warnings
from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hardy.config import ConfigError, UserError, unknown_name
from hardy.linear.config import Method, SolverConfig
from hardy.linear.rows import Features
from hardy.linear.solver import Solution, solve
from hardy.linear.sparse import SparseRows

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import accuracy_score
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
except ImportError as error:
    raise UserError(
        f"hardy.linear's estimators need scikit-learn 1.6 or newer ({error}); install it by "
        f"pip install 'hardy[linear]'"
    ) from None

from scipy.sparse import issparse  # scikit-learn brings it

Array = NDArray[Any]
UPDATES: dict[str, Method] = {
    "mean": "batch_perceptron",
    "normalized": "normalized_batch_perceptron",
}
"""What `BatchPerceptron(update=...)` may be."""


class _Separator(ClassifierMixin, BaseEstimator):
    """What the estimators share: scaling and bias, classes to signs and back, the report."""

    features: Literal["scaled", "as_given"]
    multi_class: Literal["one_vs_rest", "softmax"]
    fit_intercept: bool
    bias_scale: float

    def _config(self) -> SolverConfig:
        """Return the solver's settings, but for several classes."""
        raise NotImplementedError

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Look for weights that separate the classes.

        Args:
            X: rows, a NumPy array or what becomes one, a matrix of scipy.sparse, which stays sparse, or a
                torch tensor, which is used where it is; computed in float64 if it is that, else in float32.
            y: a class for each row; at least two.
            sample_weight: of each row, not negative; 2 is as the row twice, 0 as if it were not there.

        Raises:
            UserError: a ValueError; settings, numbers or classes that cannot work.

        Warns:
            ConvergenceWarning: no weights with positive margins were found.
        """
        config = self._config()
        if self.features not in ("scaled", "as_given"):
            raise ConfigError(unknown_name(self.features, "choice of features", ["scaled", "as_given"]))
        if self.multi_class not in ("one_vs_rest", "softmax"):
            raise ConfigError(unknown_name(self.multi_class, "multi_class", ["one_vs_rest", "softmax"]))
        if not self.bias_scale > 0 or not np.isfinite(self.bias_scale):
            raise ConfigError(f"bias_scale must be above 0 and finite, got {self.bias_scale}")
        rows, labels = self._checked(X, y)
        weights = _checked_weights(sample_weight, count=len(labels))
        there = weights > 0
        if not there.all():
            rows = rows[torch.from_numpy(there).to(rows.device)] if isinstance(rows, Tensor) else rows[there]
            labels, weights = labels[there], weights[there]
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise UserError(
                f"y holds one class ({self.classes_[0]}) in {len(labels)} rows with a positive weight; "
                f"give rows of at least two classes"
            )
        self._solve(rows, codes, weights, config)
        return self

    def decision_function(self, X: Any) -> Any:
        """Return the classes' scores, (n, classes), or how far a row is on the second of two classes' side.

        A tensor comes back for a tensor, on its device.
        """
        check_is_fitted(self)
        if isinstance(X, Tensor):
            rows = _checked_tensor(X)
            if rows.shape[1] != self.n_features_in_:
                raise UserError(f"X has {rows.shape[1]} features, but fit saw {self.n_features_in_}")
            coef, intercept = (
                torch.as_tensor(x, dtype=rows.dtype, device=rows.device)
                for x in (self.coef_, self.intercept_)
            )
            scores = rows @ coef.T + intercept
        else:
            rows = validate_data(self, X, reset=False, accept_sparse="csr")
            scores = rows @ self.coef_.T + self.intercept_
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict(self, X: Any) -> Any:
        """Return the class of each row: a tensor for a tensor if classes are numbers, else a NumPy array."""
        scores = self.decision_function(X)
        codes = 1 * (scores > 0) if scores.ndim == 1 else scores.argmax(1)
        if isinstance(codes, Tensor) and self.classes_.dtype.kind in "iufb":
            return torch.as_tensor(self.classes_, device=codes.device)[codes]
        return self.classes_[_numpy(codes)]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the share of rows whose class is right."""
        labels, predicted = (_numpy(value) for value in (y, self.predict(X)))
        return float(accuracy_score(labels, predicted, sample_weight=sample_weight))

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that sparse matrices are taken."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _checked(self, X: Any, y: Any) -> tuple[Any, Array]:
        """Return rows and labels, checked as scikit-learn does."""
        if not isinstance(X, Tensor):
            checked: Any = validate_data(
                self, X, _numpy(y), dtype=[np.float64, np.float32], accept_sparse="csr"
            )
            rows, labels = checked
        else:
            rows, labels = _checked_tensor(X), column_or_1d(_numpy(y), warn=True)
            if len(rows) != len(labels):
                raise UserError(f"X has {len(rows)} rows and y has {len(labels)}; give a class for each row")
            self.n_features_in_ = rows.shape[1]
        check_classification_targets(labels)
        return rows, labels

    def _solve(self, rows: Any, codes: Array, weights: Array, config: SolverConfig) -> None:
        """Scale, solve, and fold the scaling back into the weights."""
        table, centre, size = self._scaled(rows, weights)
        if len(self.classes_) > 2 and self.multi_class == "softmax":
            config = replace(config, problems="joint")
        wanted = torch.arange(len(self.classes_)) if len(self.classes_) > 2 else torch.ones(1)
        signs = torch.where(torch.from_numpy(codes)[:, None] == wanted, 1.0, -1.0)
        found = solve(table, signs, config, weights_N=torch.from_numpy(weights))
        theta = _numpy(found.theta_CD).astype(np.float64)
        length = np.linalg.norm(theta, axis=None if config.problems == "joint" else 1, keepdims=True)
        theta /= np.where(length > 0, length, 1)
        self.coef_ = (theta[:, :-1] if self.fit_intercept else theta) / size
        bias = theta[:, -1] * self.bias_scale if self.fit_intercept else np.zeros(len(theta))
        self.intercept_ = bias - self.coef_ @ centre
        self._report(found, config)

    def _scaled(self, rows: Any, weights: Array) -> tuple[Features, Array, float]:
        """Return a copy with the bias column, and the centre and size that were taken out."""
        if issparse(rows):
            return self._scaled_sparse(rows, weights)
        width = rows.shape[1] + self.fit_intercept
        if isinstance(rows, Tensor):
            table = rows.new_empty(len(rows), width)
            table[:, : rows.shape[1]] = rows
        else:
            copy = np.empty((len(rows), width), dtype=rows.dtype)
            copy[:, : rows.shape[1]] = rows
            table = torch.from_numpy(copy)
        inner = table[:, : rows.shape[1]]
        centre, size = np.zeros(rows.shape[1]), 1.0
        if self.features == "scaled":
            share = torch.from_numpy(weights / weights.sum()).to(table.device, table.dtype)
            if self.fit_intercept:
                mean = share @ inner
                inner -= mean
                centre = _numpy(mean).astype(np.float64)
            size = float((share @ inner.square().sum(1)).sqrt()) or 1.0
            inner /= size
        if self.fit_intercept:
            table[:, -1] = self.bias_scale
        return table, centre, size

    def _scaled_sparse(self, rows: Any, weights: Array) -> tuple[Features, Array, float]:
        """Return the same of a sparse matrix, whose centre is taken out in thought."""
        table = rows.copy()
        table.sum_duplicates()
        bias = self.bias_scale if self.fit_intercept else None
        if self.features != "scaled":
            return SparseRows(table, bias=bias), np.zeros(rows.shape[1]), 1.0
        share = weights / weights.sum()
        centre = (table.T @ share) if self.fit_intercept else None
        size = float(np.sqrt(share @ SparseRows(table, centre_E=centre).lengths().numpy() ** 2)) or 1.0
        table.data /= size
        scaled = None if centre is None else centre / size
        centre = np.zeros(rows.shape[1]) if centre is None else centre
        return SparseRows(table, centre_E=scaled, bias=bias), centre, size

    def _report(self, found: Solution, config: SolverConfig) -> None:
        """Keep what the solver knows, and warn where it failed."""
        self.n_iter_ = _numpy(found.num_iter)
        self.converged_ = bool(found.converged.all())
        self.min_margin_, self.margin_upper_ = _numpy(found.min_margin), _numpy(found.margin_upper)
        self.n_misclassified_ = _numpy(found.num_misclassified)
        if not self.converged_:
            worst = int(self.margin_upper_.argmin())
            warnings.warn(
                f"no separating weights after {config.max_iter} steps: {self.n_misclassified_.tolist()} rows "
                f"are misclassified, and no weights have a margin above {self.margin_upper_[worst]:.3g} (in "
                f"scaled features). The best weights are kept; raise max_iter, or use a regularised method "
                f"such as scikit-learn's LogisticRegression",
                ConvergenceWarning,
                stacklevel=4,
            )


class NormalizedLogisticRegression(_Separator):
    """Normalised logistic regression: steps of any size; their number hardly grows with that of the rows.

    Args:
        gamma: step size; none takes 2 log(2n - 1) / R^2, with R the length of the longest scaled row. Large
            ones (1e6) are stable; small ones move more evenly.
        max_iter: steps after which to give up.
        multi_class: of more than two classes: one_vs_rest tells each from all others; softmax wants the right
            class's score to be the largest, which weights reach more often (ours).
        stop: separated ends once every margin is positive; margin goes on while the least margin grows, which
            tends to the largest there is.
        tol: of margin: relative growth within 50 steps that counts.
        features: scaled centres them (with a bias) and divides by the root mean square length of the rows;
            as_given leaves them.
        fit_intercept: whether there is a bias.
        bias_scale: the constant feature that makes it, beside the scaled ones.

    Attributes:
        coef_, intercept_: a row for each class, one row for two classes. But for softmax, their decision is
            the signed distance from the boundary in scaled features.
    and, one entry for each problem (one, but for one_vs_rest of more than two classes):
        n_iter_: steps.
        n_misclassified_: rows whose margin is not positive.
        min_margin_: least margin; where positive, the largest possible one is at least this.
        margin_upper_: the largest possible margin is at most this.
        converged_: whether all problems are solved (one word for all).

    Example:
        >>> model = NormalizedLogisticRegression(gamma=1e6).fit([[0.0], [1.0], [5.0]], ["a", "a", "b"])
        >>> model.predict([[4.0]]).tolist(), model.converged_, model.n_misclassified_.tolist()
        (['b'], True, [0])
    """

    def __init__(
        self,
        gamma: float | None = None,
        max_iter: int = 10_000,
        multi_class: Literal["one_vs_rest", "softmax"] = "one_vs_rest",
        stop: Literal["separated", "margin"] = "separated",
        tol: float = 1e-3,
        features: Literal["scaled", "as_given"] = "scaled",
        fit_intercept: bool = True,
        bias_scale: float = 1.0,
    ) -> None:
        self.gamma = gamma
        self.max_iter = max_iter
        self.multi_class: Literal["one_vs_rest", "softmax"] = multi_class
        self.stop: Literal["separated", "margin"] = stop
        self.tol = tol
        self.features = features
        self.fit_intercept = fit_intercept
        self.bias_scale = bias_scale

    def _config(self) -> SolverConfig:
        return SolverConfig(gamma=self.gamma, max_iter=self.max_iter, stop=self.stop, tol=self.tol)


class LogisticGD(_Separator):
    """Logistic regression by plain gradient descent, of any step size; as gamma grows, the batch perceptron.

    Args and attributes are those of `NormalizedLogisticRegression`; it ends once every margin is positive.

    Example:
        >>> LogisticGD(gamma=1e3).fit([[0.0], [1.0], [5.0]], [0, 0, 1]).predict([[4.0]])
        array([1])
    """

    def __init__(
        self,
        gamma: float | None = None,
        max_iter: int = 10_000,
        multi_class: Literal["one_vs_rest", "softmax"] = "one_vs_rest",
        features: Literal["scaled", "as_given"] = "scaled",
        fit_intercept: bool = True,
        bias_scale: float = 1.0,
    ) -> None:
        self.gamma = gamma
        self.max_iter = max_iter
        self.multi_class: Literal["one_vs_rest", "softmax"] = multi_class
        self.features = features
        self.fit_intercept = fit_intercept
        self.bias_scale = bias_scale

    def _config(self) -> SolverConfig:
        return SolverConfig(method="logistic", gamma=self.gamma, max_iter=self.max_iter)


class BatchPerceptron(_Separator):
    """The perceptron on all rows at once: steps along the misclassified rows.

    Args:
        update: mean adds their sum over n, the limit of `LogisticGD`; normalized their mean, that of
            `NormalizedLogisticRegression`.
        max_iter: steps after which to give up.
        multi_class, features, fit_intercept, bias_scale: as in `NormalizedLogisticRegression`, as are the
            attributes.

    Example:
        >>> BatchPerceptron(update="normalized").fit([[0.0], [1.0], [5.0]], [0, 0, 1]).predict([[4.0]])
        array([1])
    """

    def __init__(
        self,
        update: Literal["mean", "normalized"] = "mean",
        max_iter: int = 10_000,
        multi_class: Literal["one_vs_rest", "softmax"] = "one_vs_rest",
        features: Literal["scaled", "as_given"] = "scaled",
        fit_intercept: bool = True,
        bias_scale: float = 1.0,
    ) -> None:
        self.update = update
        self.max_iter = max_iter
        self.multi_class: Literal["one_vs_rest", "softmax"] = multi_class
        self.features = features
        self.fit_intercept = fit_intercept
        self.bias_scale = bias_scale

    def _config(self) -> SolverConfig:
        if self.update not in UPDATES:
            raise ConfigError(unknown_name(self.update, "update", UPDATES))
        return SolverConfig(method=UPDATES[self.update], max_iter=self.max_iter)


def _numpy(value: Any) -> Any:
    """Return a tensor as a NumPy array, anything else as it is."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def _checked_tensor(X: Tensor) -> Tensor:
    """Return a table of finite floats, without gradient; fp64 stays, all else becomes fp32."""
    if X.layout != torch.strided:
        raise UserError(f"X is a sparse tensor ({X.layout}); give a matrix of scipy.sparse instead")
    if X.ndim != 2 or 0 in X.shape:
        raise UserError(f"X must be a table with rows and features, got shape {tuple(X.shape)}")
    rows = X.detach().to(torch.float64 if X.dtype == torch.float64 else torch.float32)
    if not bool(rows.isfinite().all()):
        raise UserError("X holds NaN or Inf; remove or replace them")
    return rows


def _checked_weights(sample_weight: Any, *, count: int) -> Array:
    """Return the weights of the rows, 1 each if there are none."""
    if sample_weight is None:
        return np.ones(count)
    weights = np.asarray(_numpy(sample_weight), dtype=np.float64)
    if weights.shape != (count,):
        raise UserError(f"sample_weight must hold one number for each of {count} rows, got {weights.shape}")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise UserError("sample_weight must be finite and not negative")
    if not weights.any():
        raise UserError("sample_weight is zero for all rows; give at least two classes a positive weight")
    return weights
