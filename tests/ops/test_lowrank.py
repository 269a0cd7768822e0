"""What APOLLO does with a sketch: lengths, the limit on growth, its memory, and leading directions."""

import math

import pytest
import torch

from hardy.ops.lowrank import length_ratio, limit_growth, remember_norm, top_directions


def test_a_ratio_of_lengths_is_zero_where_there_was_no_length():
    after = torch.tensor([9.0, 4.0, 0.0, math.nan])
    before = torch.tensor([1.0, 0.0, 4.0, 0.0])
    assert length_ratio(after, before).tolist() == [3.0, 0.0, 0.0, 0.0]


def test_a_ratio_of_lengths_holds_where_its_square_does_not():
    before = torch.tensor([1e-40])  # a length of 1e-20, which fp32 holds
    assert not (torch.ones(1) / before).isfinite()
    torch.testing.assert_close(length_ratio(torch.ones(1), before), torch.tensor([1e20]), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("norm", "memory", "limit"),
    [
        (1.0, 1.0, 1.0),  # no growth
        (1.05, 1.0, 1.0),  # growth within gamma
        (3.3, 1.0, 3.0),  # growth beyond it
        (0.5, 2.0, 1.0),  # never less than 1
        (7.0, 0.0, 1.0),  # nothing known yet
        (7.0, math.inf, 1.0),
        (7.0, math.nan, 1.0),
        (0.0, 1.0, 1.0),
    ],
)
def test_a_step_grows_by_gamma_at_most(norm, memory, limit):
    got = limit_growth(torch.tensor(norm), torch.tensor(memory), gamma=1.1)
    assert got.item() == pytest.approx(limit)


def test_a_norm_of_zero_is_never_remembered():
    norm, memory = torch.tensor([2.0, 0.0, 2.0, math.nan]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    active = torch.tensor([1.0, 1.0, 0.0, 1.0])
    assert remember_norm(norm, memory, active).tolist() == [2.0, 1.0, 1.0, 1.0]


def matrix(shape, *, dtype=torch.float64):
    """Return a matrix with well separated singular values."""
    generator = torch.Generator().manual_seed(0)
    rows, cols = shape
    left, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(cols, cols, generator=generator, dtype=torch.float64))
    values = 2.0 ** -torch.arange(min(shape), dtype=torch.float64)
    return (left[:, : len(values)] * values @ right[: len(values)]).to(dtype)


@pytest.mark.parametrize("method", ["gram", "exact"])
@pytest.mark.parametrize(("shape", "contracts"), [((12, 6), "cols"), ((6, 12), "rows"), ((8, 8), "cols")])
def test_directions_are_the_leading_singular_ones(shape, contracts, method):
    whole = matrix(shape)
    got = top_directions(whole, 3, contracts=contracts, method=method)
    u, _, vh = torch.linalg.svd(whole, full_matrices=False)
    wanted = vh[:3] if contracts == "cols" else u.T[:3]
    torch.testing.assert_close((got @ wanted.T).abs(), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(got @ got.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (got.gather(1, got.abs().argmax(1, keepdim=True)) > 0).all()
    assert got.is_contiguous() and got.shape == (3, min(shape))


@pytest.mark.parametrize("method", ["gram", "exact"])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15, 1e18])
def test_directions_do_not_depend_on_the_size_of_the_gradient(scale, method):
    whole = matrix((12, 6), dtype=torch.float32)
    usual = top_directions(whole, 2, contracts="cols", method=method)
    torch.testing.assert_close(
        top_directions(whole * scale, 2, contracts="cols", method=method), usual, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("method", ["gram", "exact"])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_what_is_not_finite_counts_as_zero(value, method):
    whole = matrix((12, 6), dtype=torch.float32)
    whole[3] = value
    expected = whole.clone()
    expected[3] = 0.0
    got = top_directions(whole, 2, contracts="cols", method=method)
    assert torch.equal(got, top_directions(expected, 2, contracts="cols", method=method))
    nothing = top_directions(torch.full((12, 6), value), 2, contracts="cols", method=method)
    torch.testing.assert_close(nothing @ nothing.T, torch.eye(2))


def test_low_precision_is_decomposed_in_fp32():
    low = matrix((12, 6), dtype=torch.bfloat16)
    got = top_directions(low, 2, contracts="cols", method="gram")
    assert got.dtype == torch.float32
    assert torch.equal(got, top_directions(low.float(), 2, contracts="cols", method="gram"))
