import pytest
import torch

from hardy.distributed.aggregation import stack
from hardy.distributed.aggregation.stack import Loader, identity, row_numbers, weighted_sums


@pytest.fixture(autouse=True, params=["native", "torch"])
def way(request, monkeypatch):
    """Walk in C++ where that can be had, and by torch."""
    if request.param == "torch":
        monkeypatch.setattr(stack, "can_walk", lambda *tensors: False)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_squares_and_dots_over_blocks(dtype):
    X, g = draw(5, 70_000, dtype=dtype), draw(70_000, seed=1, dtype=dtype)
    got = row_numbers(list(X.split([40_000, 30_000], 1)), list(g.split([40_000, 30_000])), identity)
    torch.testing.assert_close(
        got.squares_N, X.double().square().sum(1), rtol=2e-6 if dtype == torch.bfloat16 else 1e-7, atol=0
    )
    torch.testing.assert_close(got.dots_N, X.double() @ g.double(), rtol=1e-5, atol=1e-3)
    assert got.reference_square == pytest.approx(g.double().square().sum().item(), rel=1e-6)
    assert row_numbers([X], None, identity).dots_N is None


def test_long_rows_lose_no_digits():
    X = torch.ones(1, 3_000_000) + draw(1, 3_000_000) * 0.1
    got = row_numbers([X], [X[0]], identity)
    want = X.double().square().sum()
    assert abs(got.squares_N[0] / want - 1) < 1e-6 and abs(got.dots_N[0] / want - 1) < 1e-6


@pytest.mark.parametrize("size", [1e20, 3e38, 1e-25, 1e-38])
def test_products_that_overflow_or_vanish_are_formed_again(size):
    X, g = torch.full((3, 1000), 1.0), torch.full((1000,), 2.0)
    X[1] = size
    got = row_numbers([X], [g], identity)
    assert got.squares_N.tolist() == pytest.approx([1e3, 1e3 * size**2, 1e3], rel=1e-5)
    assert got.dots_N.tolist() == pytest.approx([2e3, 2e3 * size, 2e3], rel=1e-5)
    swapped = row_numbers([g[None].expand(2, -1)], [X[1]], identity)
    assert swapped.reference_square == pytest.approx(1e3 * size**2, rel=1e-5)
    assert swapped.dots_N.tolist() == pytest.approx([2e3 * size] * 2, rel=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_only_rows_that_are_not_finite_have_squares_that_are_not(value):
    X = draw(4, 50)
    X[2, 17] = value
    X[0] = 3e38
    assert row_numbers([X], None, identity).squares_N.isfinite().tolist() == [True, True, False, True]


def test_a_bad_trusted_gradient_spoils_no_row():
    X, g = draw(4, 50), draw(50)
    g[3] = torch.nan
    got = row_numbers([X], [g], identity)
    assert got.squares_N.isfinite().all() and not torch.tensor(got.reference_square).isfinite()


def test_weighted_sums_never_read_rows_of_weight_0():
    X = draw(4, 70_001)
    X[1] = torch.nan
    weights = torch.tensor([0.5, 0.0, 0.25, 0.0], dtype=torch.float64)
    got = weighted_sums([X[:, :3], X[:, 3:]], weights, extras=[X[0, :3], X[0, 3:]], extra_weight=2.0)
    torch.testing.assert_close(torch.cat(got), 2.5 * X[0] + 0.25 * X[2])


def test_bf16_is_added_up_in_fp32():
    X = torch.full((64, 5), 1.0, dtype=torch.bfloat16)
    X[0] = 256.0
    weights = torch.ones(64, dtype=torch.float64)
    assert weighted_sums([X], weights)[0].tolist() == [320.0] * 5  # 256 + 1 = 256 in bf16
    got = weighted_sums([X], weights, exact=True)[0]
    assert (got.dtype, got.tolist()) == (torch.float32, [319.0] * 5)


def test_products_of_all_rows_in_pieces(monkeypatch):
    X, Y = draw(4, 1003), draw(3, 1003, seed=1)
    for piece in (100, 1003, 5000):
        monkeypatch.setattr(stack, "PRODUCT", piece)
        torch.testing.assert_close(stack.products(X, Y), X.double() @ Y.double().T, rtol=1e-5, atol=1e-4)


def test_chosen_rows_are_loaded_in_order_and_converted():
    X = draw(5, 10, dtype=torch.bfloat16)
    loader = Loader(X, [3, 1], dtype=torch.float32, spare=1)
    assert torch.equal(loader.copy(slice(2, 6))[:2], X[[3, 1], 2:6].float())
    assert loader.copy(slice(8, 10)).shape == (3, 2)
    assert not loader.is_plain and Loader(X, range(5), dtype=torch.bfloat16).is_plain


def test_products_are_exact_whatever_the_program_allows():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with stack.exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
