"""Sparse rows against the same rows as a tensor, in products, in the solver and in the estimators."""

import tracemalloc
import warnings
from itertools import islice

import numpy as np
import pytest
import torch

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra linear)")
from scipy import sparse  # noqa: E402  the package may be missing
from sklearn.base import clone  # noqa: E402
from sklearn.feature_extraction.text import CountVectorizer  # noqa: E402

from hardy.cli.probe_tasks import built_in  # noqa: E402
from hardy.config import UserError  # noqa: E402
from hardy.data.pydocs import pydocs_source  # noqa: E402
from hardy.distributed.simulation import SimWorld  # noqa: E402
from hardy.linear import BatchPerceptron, LogisticGD, NormalizedLogisticRegression  # noqa: E402
from hardy.linear.config import SolverConfig  # noqa: E402
from hardy.linear.solver import solve  # noqa: E402
from hardy.linear.sparse import SparseRows  # noqa: E402

N, E, C = 31, 12, 3


def drawn(*, n=N, dtype=np.float64):
    """Return sparse rows and classes that they tell."""
    classes = np.arange(n) % C
    matrix = sparse.random(n, E, 0.3, format="csr", random_state=0)
    matrix = matrix + sparse.csr_array((3 * np.ones(n), (np.arange(n), classes)), (n, E))
    return sparse.csr_array(matrix).astype(dtype), classes


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    ("centre", "bias"), [(None, None), (None, 2.0), (np.arange(E) / 7, None), (np.arange(E) / 7, 3.0)]
)
def test_products_are_those_of_the_table(dtype, centre, bias):
    matrix, _ = drawn(dtype=dtype)
    rows = SparseRows(matrix, centre_E=centre, bias=bias)
    table = matrix.toarray() if centre is None else matrix.toarray() - centre.astype(dtype)
    if bias is not None:
        table = np.c_[table, np.full(N, bias, dtype)]
    exact = torch.from_numpy(table.astype(np.float64))
    assert rows.shape == exact.shape and len(rows) == N
    theta = torch.randn(C, exact.shape[1], generator=torch.Generator().manual_seed(0)).to(rows.dtype)
    weights = torch.randn(N, C, generator=torch.Generator().manual_seed(1)).to(rows.dtype)
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == np.float64 else {"rtol": 1e-5, "atol": 1e-4}
    assert rows.scores(theta).dtype == rows.mixed(weights).dtype == rows.dtype
    torch.testing.assert_close(rows.scores(theta).double(), exact @ theta.double().T, **close)
    torch.testing.assert_close(rows.mixed(weights).double(), weights.double().T @ exact, **close)
    torch.testing.assert_close(rows.lengths(), exact.norm(dim=1), **close)
    part = rows.part(slice(7, 40))
    assert torch.equal(part.scores(theta), rows.scores(theta)[7:])
    assert np.shares_memory(part.matrix_NE.data, matrix.data)
    torch.testing.assert_close(
        rows.to(torch.float64).mixed(weights.double()), weights.double().T @ exact, **close
    )


@pytest.mark.parametrize("problems", ["separate", "joint"])
@pytest.mark.parametrize("method", ["normalized_logistic", "batch_perceptron", "perceptron"])
def test_the_solver_gives_what_it_gives_for_the_table(method, problems):
    matrix, classes = drawn()
    table = torch.from_numpy(matrix.toarray())
    signs = torch.where(torch.from_numpy(classes)[:, None] == torch.arange(C), 1, -1)
    weights = 1.0 + torch.arange(N) % 3
    config = SolverConfig(method=method, problems=problems, max_iter=40)
    dense = solve(table, signs, config, weights_N=weights, trace=True)
    small = SolverConfig(method=method, problems=problems, max_iter=40, chunk_bytes=300)
    parts = [slice(0, 4), slice(4, 4), slice(4, N)]

    def body(comm):
        part = parts[comm.rank]
        rows = SparseRows(matrix).part(part)
        return solve(rows, signs[part], config, weights_N=weights[part], workers=comm, trace=True)

    for found in (
        solve(SparseRows(matrix), signs, config, weights_N=weights, trace=True),
        solve(SparseRows(matrix), signs, small, weights_N=weights, trace=True),
        *SimWorld(3).run(body),
    ):
        torch.testing.assert_close(found.theta_CD, dense.theta_CD, rtol=1e-9, atol=1e-11)
        assert torch.equal(found.num_iter, dense.num_iter)
        assert torch.equal(found.trace.misclassified, dense.trace.misclassified)
        torch.testing.assert_close(found.margin_upper, dense.margin_upper, rtol=1e-9, atol=0)


ESTIMATORS = [
    NormalizedLogisticRegression(),
    NormalizedLogisticRegression(multi_class="softmax", stop="margin", features="as_given", bias_scale=2.0),
    LogisticGD(fit_intercept=False),
    BatchPerceptron(update="normalized"),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("form", [sparse.csr_array, sparse.csr_matrix, sparse.coo_array])
def test_estimators_give_what_they_give_for_the_table(estimator, form):
    matrix, classes = drawn(n=90)
    weights = np.arange(90) % 4
    dense = clone(estimator).fit(matrix.toarray(), classes, sample_weight=weights)
    given = form(matrix)
    found = clone(estimator).fit(given, classes, sample_weight=weights)
    assert found.n_iter_.tolist() == dense.n_iter_.tolist() and found.converged_
    np.testing.assert_allclose(found.coef_, dense.coef_, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(found.intercept_, dense.intercept_, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(found.margin_upper_, dense.margin_upper_, rtol=1e-9)
    assert abs(given - matrix).max() == 0, "the caller's matrix is left alone"
    scores = found.decision_function(given)
    np.testing.assert_allclose(scores, dense.decision_function(matrix.toarray()), rtol=1e-7, atol=1e-9)
    assert found.predict(given).tolist() == dense.predict(matrix.toarray()).tolist()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_counts_of_words_give_what_they_give_as_a_table(dtype):
    documents = list(islice(pydocs_source(packages=[]).read(), 30))
    examples = built_in("docstring", num_examples=160, seed=0, documents=documents)
    counts = CountVectorizer(dtype=dtype).fit_transform(examples.texts)
    assert counts.nnz < 0.05 * np.prod(counts.shape)
    train, test = np.arange(160) % 4 != 0, np.arange(160) % 4 == 0
    labels = np.asarray(examples.labels)
    model = NormalizedLogisticRegression()
    found = clone(model).fit(counts[train], labels[train])
    dense = clone(model).fit(counts[train].toarray(), labels[train])
    assert found.converged_ and found.n_iter_.tolist() == dense.n_iter_.tolist()
    np.testing.assert_allclose(
        found.coef_, dense.coef_, rtol=1e-3 if dtype == np.float32 else 1e-9, atol=1e-6
    )
    accuracy = found.score(counts[test], labels[test])
    assert accuracy == dense.score(counts[test].toarray(), labels[test]) > 0.8


def test_a_place_that_is_stored_twice_is_their_sum():
    twice = sparse.csr_array((np.array([1.0, 1.0, 3.0]), np.array([0, 0, 1]), np.array([0, 2, 3])), (2, 2))
    once = sparse.csr_array([[2.0, 0.0], [0.0, 3.0]])
    for features in ("scaled", "as_given"):
        model = NormalizedLogisticRegression(features=features)
        found, wanted = (clone(model).fit(rows, [0, 1]) for rows in (twice, once))
        assert found.coef_.tolist() == wanted.coef_.tolist() and found.margin_upper_ == wanted.margin_upper_
    assert twice.nnz == 3


def test_nothing_is_made_dense():
    columns = np.c_[np.arange(400) % 2, 2 + np.random.default_rng(0).integers(0, 399_998, (400, 5))]
    matrix = sparse.csr_array((np.ones(2400), columns.ravel(), 6 * np.arange(401)), (400, 400_000))
    tracemalloc.start()
    model = NormalizedLogisticRegression(max_iter=30).fit(matrix, np.arange(400) % 2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert model.converged_
    assert peak < 0.1 * 400 * 400_000 * 8, "of the table's 1.3 GB"


def test_what_cannot_work_is_refused():
    matrix = sparse.csr_array([[1.0, 0.0], [np.inf, 1.0], [np.nan, np.nan]])
    with pytest.raises(UserError, match="features hold NaN or Inf in 2 rows"):
        solve(SparseRows(matrix), torch.ones(3, 1))
    with pytest.raises(UserError, match="1 rows are all zeros"):
        solve(SparseRows(sparse.csr_array([[1.0, 0.0], [0.0, 0.0]])), torch.ones(2, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's sparse layouts are young
        tensor = torch.eye(2).to_sparse_csr()
    with pytest.raises(UserError, match="X is a sparse tensor .*; give a matrix of scipy.sparse instead"):
        NormalizedLogisticRegression().fit(tensor, [0, 1])
