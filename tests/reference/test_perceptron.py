"""The twin of the large steps against sums written out, and its data sets against the paper."""

import math

import pytest
import torch

from hardy.reference import perceptron as twin

Z = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]], dtype=torch.float64)
THETA = torch.tensor([-0.3, 0.2], dtype=torch.float64)


def written_out(name, gamma):
    m = [sum(a * b for a, b in zip(z, THETA.tolist(), strict=True)) for z in Z.tolist()]
    s = [1 / (1 + math.exp(x)) for x in m]
    missed = [float(x <= 0) for x in m]
    shares = {
        "normalized_logistic": [gamma * x / sum(s) for x in s],
        "logistic": [gamma * x / len(s) for x in s],
        "batch_perceptron": [x / len(s) for x in missed],
        "normalized_batch_perceptron": [x / sum(missed) for x in missed],
        "perceptron": [0.0, 1.0, 0.0],
    }[name]
    return [THETA[j].item() + sum(w * Z[i, j].item() for i, w in enumerate(shares)) for j in range(2)]


@pytest.mark.parametrize("name", twin.METHODS)
def test_a_step_is_the_formula(name):
    assert twin.METHODS[name](Z, THETA, 3, 2.5).tolist() == pytest.approx(written_out(name, 2.5), rel=1e-13)


def test_the_batch_perceptron_begins_with_half_a_step():
    path = twin.path(twin.bp, Z)
    assert next(path).tolist() == [0, 0]
    torch.testing.assert_close(next(path), Z.sum(0) / 6)


def test_loss_and_gradient_belong_together():
    theta = THETA.clone().requires_grad_()
    value = torch.nn.functional.softplus(-(Z @ theta)).mean()
    value.backward()
    assert twin.loss(Z, THETA) == pytest.approx(value.item())
    torch.testing.assert_close(twin.gradient(Z, THETA), theta.grad)


def test_the_worst_case_has_the_papers_margin_and_length():
    rows = twin.worst_case(50)
    assert rows.shape == (50, 2) and (rows.square().sum(1) == 1.25).all()
    assert (rows @ torch.tensor([1.0, 0.0], dtype=torch.float64)).min() == 0.5
    assert twin.most_steps(twin.perceptron, 1000, math.sqrt(1.25), 0.5) == pytest.approx(5)
    bounds = [twin.most_steps(twin.nlr, 1000, math.sqrt(1.25), 0.5, g) for g in (0.1, 1, 10, 100)]
    assert bounds == pytest.approx([613, 65.8, 11.1, 5.6], rel=1e-2)
    assert twin.most_steps(twin.bp, 1000, math.sqrt(1.25), 0.5) == pytest.approx(5000)
    assert twin.most_steps(twin.lr, 1000, 1.0, 0.5) == math.inf


def test_steps_that_do_not_suffice_are_said_so():
    assert twin.separate(twin.lr, twin.worst_case(100), 1.0, limit=560)[1] is None
    assert twin.separate(twin.lr, twin.worst_case(100), 1.0, limit=561)[1] == 561
