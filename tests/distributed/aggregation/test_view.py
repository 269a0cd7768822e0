import pytest
import torch

from hardy.distributed.aggregation.stack import identity
from hardy.distributed.aggregation.view import View, gram, lower_median_place, with_last_vector


def view_of(X, *, rows=None, extras=None, blocks=None):
    rows = list(range(len(X))) if rows is None else rows
    squares = X.double().square().sum(1)[rows]
    if extras is not None:
        squares = torch.cat([squares, extras.double().square().sum()[None]])
    split = [X] if blocks is None else blocks
    matrix = gram(split, rows, squares, identity, extras=None if extras is None else [extras])
    return View(
        mix_nR=torch.eye(len(rows), len(squares), dtype=torch.float64),
        squares_n=squares[: len(rows)],
        sample_weights_n=torch.ones(len(rows), dtype=torch.float64),
        dots_n=X.double()[rows].sum(1),
        reference_square=1.0,
        gram=matrix,
    )


def distances(X):
    return (X.double()[:, None] - X.double()[None]).square().sum(2)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_distances_of_some_rows(dtype):
    X = draw(6, 50_000, dtype=dtype)
    got = view_of(X, rows=[5, 0, 3], blocks=[X[:, :7], X[:, 7:]]).distances_nn()
    torch.testing.assert_close(got, distances(X[[5, 0, 3]]), rtol=1e-5, atol=0)
    assert torch.equal(got, got.T) and got.diagonal().eq(0).all()


def test_distances_of_nearly_equal_rows():
    """The plain float32 Gram matrix is wrong many times over here."""
    X = (draw(1, 300_000) + 1e-4 * draw(5, 300_000)).float()
    X[1:] += 1e-4 * torch.randn(4, 300_000, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(view_of(X).distances_nn(), distances(X), rtol=1e-3, atol=0)


def test_one_huge_row_cannot_spoil_the_distances_of_others():
    X = (1 + 0.01 * draw(7, 100_000)).float()
    X[3] *= 1e8
    others = [0, 1, 2, 4, 5, 6]
    got = view_of(X).distances_nn()[others][:, others]
    torch.testing.assert_close(got, distances(X[others]), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("small", "large"), [(1.0, 3e38), (1e-30, 1.0), (1e-25, 1e25), (1e-20, 1e-20)])
def test_sizes_that_overflow_or_vanish(small, large):
    X = draw(6, 1000).clamp(-1, 1)
    X[:4] *= small
    X[4:] *= large
    torch.testing.assert_close(view_of(X).distances_nn(), distances(X), rtol=1e-4, atol=0)


def test_mixtures_and_factors():
    X = draw(4, 500, dtype=torch.float64)
    M = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.25, 0.75]], dtype=torch.float64)
    factors = torch.tensor([1.0, 0.5, 2.0, 0.1], dtype=torch.float64)
    want = M @ (factors[:, None] * X)
    got = view_of(X).scaled(factors).mixed(M)
    torch.testing.assert_close(got.squares_n, want.square().sum(1))
    torch.testing.assert_close(got.dots_n, want.sum(1))
    torch.testing.assert_close(got.distances_nn(), distances(want))
    torch.testing.assert_close(got.mix_nR @ X, want)


def test_distances_of_mixtures_are_exactly_symmetric():
    M = torch.rand(9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = view_of(draw(9, 500)).mixed(M / M.sum(1, keepdim=True)).distances_nn()
    assert torch.equal(got, got.T) and got.diagonal().eq(0).all()


def test_sample_weights_of_mixtures_are_averages():
    X = draw(4, 5, dtype=torch.float64)
    M = torch.tensor([[0.5, 0.5, 0, 0]], dtype=torch.float64)
    base = view_of(X)
    base.sample_weights_n.copy_(torch.tensor([1.0, 3.0, 5.0, 7.0]))
    assert base.mixed(M).sample_weights_n.tolist() == [2.0]
    assert base.scaled(torch.full((4,), 9.0)).sample_weights_n.tolist() == [1.0, 3.0, 5.0, 7.0]


def test_the_last_vector_is_one_more_row():
    X, v = draw(4, 50), 3 * draw(50)
    M = torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 0.5, 0.5, 0]], dtype=torch.float64)
    view = view_of(X, extras=v)
    mixed = with_last_vector(view.mixed(M[:, :4]), v.double().square().sum())
    want = torch.stack([*(M[:, :4] @ X.double()), v.double()])
    torch.testing.assert_close(mixed.distances_nn(), distances(want), rtol=1e-5, atol=1e-5)


def test_lower_median_place():
    assert lower_median_place(torch.tensor([5.0, 1.0, 3.0, 2.0])) == 3
    assert lower_median_place(torch.tensor([5.0, 1.0, 3.0])) == 2


@pytest.mark.parametrize("num_rows", [5, 9, 13, 31])
def test_equal_mixtures_have_equal_bits(num_rows):
    """Else a rule that compares with one of them, ties included, takes some and leaves others."""
    view = view_of(draw(num_rows, 41))
    weights = draw(3, num_rows, dtype=torch.float64).softmax(1)
    kind = torch.arange(2 * num_rows) % 3
    got = view.mixed(weights[kind])
    for k in range(3):
        for numbers in (
            got.mix_nR,
            got.squares_n[:, None],
            got.dots_n[:, None],
            got.sample_weights_n[:, None],
        ):
            same = numbers[kind == k]
            assert torch.equal(same, same[:1].expand_as(same))
