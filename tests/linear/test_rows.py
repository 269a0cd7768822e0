"""One pass over rows: chunks, weights and joint problems against sums written out."""

import math

import pytest
import torch

from hardy.linear.config import SolverConfig
from hardy.linear.rows import (
    ERROR_WEIGHT,
    ERRORS,
    SHARES,
    Rows,
    merged,
    relative,
    soft_margins,
    strongest_wrong,
)
from hardy.rng import generator_for

N, D, C = 23, 4, 3
METHODS = ["normalized_logistic", "logistic", "batch_perceptron", "perceptron"]


def drawn(*shape):
    return torch.randn(*shape, generator=generator_for(0, "rows", *shape), dtype=torch.float64)


def signs_of_classes():
    return torch.where(torch.arange(N)[:, None] % C == torch.arange(C), 1.0, -1.0).double()


@pytest.mark.parametrize("problems", ["separate", "joint"])
@pytest.mark.parametrize("method", METHODS)
def test_chunks_give_what_one_chunk_gives(method, problems):
    weights = torch.arange(N).double() % 4
    found = []
    for chunk_bytes in (10**6, 3 * D * 8):
        config = SolverConfig(method=method, problems=problems, chunk_bytes=chunk_bytes)
        rows = Rows(drawn(N, D), signs_of_classes(), weights, config=config, dtype=torch.float64)
        theta = 3 * drawn(rows.num_problems, rows.num_weights)
        found.append(rows.sweep(theta, first_row=5, trace=True))
        assert len(rows.chunks) == (1 if chunk_bytes == 10**6 else 8)
    one, many = found
    torch.testing.assert_close((one.peak_P, one.least_P), (many.peak_P, many.least_P), rtol=1e-13, atol=0)
    torch.testing.assert_close(one.sums_PK, many.sums_PK, rtol=1e-13, atol=1e-13, equal_nan=True)


def test_a_joint_problem_is_one_of_differences_between_classes():
    features, signs = drawn(N, D), signs_of_classes()
    config = SolverConfig(problems="joint")
    rows = Rows(features, signs, None, config=config, dtype=torch.float64)
    theta = drawn(1, C * D)
    seen = rows.sweep(theta, first_row=0, trace=True)
    scores = features @ theta.view(C, D).T
    right = signs.argmax(1)
    p = scores.softmax(1)
    wanted = torch.zeros(C, D, dtype=torch.float64)
    for i in range(N):
        for c in range(C):
            wanted[c] += ((c == right[i]).double() - p[i, c]) * features[i]
    shares = seen.peak_P.exp() * seen.sums_PK[:, SHARES]
    torch.testing.assert_close(shares.sum(), (1 - p[torch.arange(N), right]).sum())
    torch.testing.assert_close((seen.peak_P.exp() * seen.sums_PK[0, 5:]).view(C, D), wanted)
    loss = torch.nn.functional.cross_entropy(scores, right, reduction="sum")
    torch.testing.assert_close(seen.sums_PK[0, 4], loss)
    least = min(scores[i, right[i]] - scores[i, c] for i in range(N) for c in range(C) if c != right[i])
    torch.testing.assert_close(seen.least_P[0], least)


def test_margins_of_two_classes_are_the_difference_of_scores():
    scores, signs = torch.tensor([[2.0, 5.0], [1.0, 0.5]]), torch.tensor([[1, -1], [-1, 1]])
    assert strongest_wrong(scores, signs).tolist() == [[-3.0], [-0.5]]
    torch.testing.assert_close(soft_margins(scores, signs), strongest_wrong(scores, signs))


def test_nothing_has_a_share_where_all_is_far_beyond():
    assert relative(torch.tensor([-math.inf]), torch.tensor(-math.inf)).tolist() == [0.0]
    rows = Rows(drawn(N, D), signs_of_classes(), None, config=SolverConfig(), dtype=torch.float64)
    seen, nothing = rows.sweep(drawn(C, D), first_row=0, trace=False), rows._nothing(3)
    for pair in ((seen, nothing), (nothing, seen)):
        both = merged(*pair, num_sums=3)
        assert torch.equal(both.sums_PK, seen.sums_PK) and torch.equal(both.peak_P, seen.peak_P)


def test_misclassified_rows_are_counted_and_weighed():
    weights, signs = torch.arange(N).double() % 4, signs_of_classes()
    theta = drawn(C, D)
    missed = (signs * (drawn(N, D) @ theta.T) <= 0) & (weights > 0)[:, None]
    for given, weight in ((weights, (weights[:, None] * missed).sum(0)), (weights.sign(), missed.sum(0))):
        rows = Rows(drawn(N, D), signs, given, config=SolverConfig(), dtype=torch.float64)
        sums = rows.sweep(theta, first_row=0, trace=False).sums_PK
        assert sums[:, ERRORS].tolist() == missed.sum(0).tolist()
        assert sums[:, ERROR_WEIGHT].tolist() == weight.tolist()
