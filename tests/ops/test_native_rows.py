"""Walks over stacks in C++: against float64, on any number of threads, with gaps between rows."""

import shutil

import pytest
import torch

from hardy.ops import native_build
from hardy.ops.native_rows import can_walk, mix_rows, row_sums

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, native_build.COMPILERS)), reason="needs a C++ compiler"
)
SHAPES = [(1, 1), (3, 100), (2, 1 << 15), (5, (1 << 15) + 1), (16, 100_003), (3, 0), (0, 7)]


def stack(num_rows, num_columns, *, gap=0):
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(num_rows, num_columns + gap, generator=draw) + 0.5
    return wide[:, :num_columns], torch.randn(num_columns, generator=draw)


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gap", [0, 3])
def test_squares_and_products_are_those_of_float64(shape, gap):
    rows_ND, reference_D = stack(*shape, gap=gap)
    assert can_walk(rows_ND, reference_D)
    sums = row_sums(rows_ND, reference_D)
    rows, reference = rows_ND.double(), reference_D.double()
    squares = [*rows.square().sum(1).tolist(), reference.square().sum().item()]
    assert sums[0].tolist() == pytest.approx(squares, rel=3e-7)
    assert sums[1].tolist() == pytest.approx([*(rows @ reference).tolist(), 0.0], rel=1e-4, abs=1e-3)
    alone = row_sums(rows_ND, None)
    assert alone[0, :-1].tolist() == sums[0, :-1].tolist()
    assert alone[0, -1] == 0 and not alone[1].any()


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_added_by_weight(shape):
    rows_ND, extra_D = stack(*shape, gap=5)
    weights = [0.5 - row for row in range(shape[0])]
    found = torch.full_like(extra_D, torch.nan)
    mix_rows([*rows_ND, extra_D], [*weights, 2.0], into=found)
    wanted = torch.tensor(weights, dtype=torch.float64) @ rows_ND.double() + 2 * extra_D.double()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_threads_do_not_change_a_bit():
    rows_ND, reference_D = stack(7, 300_000)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        mixed = torch.empty(300_000)
        mix_rows(list(rows_ND), [0.1] * 7, into=mixed)
        found.append(torch.cat([row_sums(rows_ND, reference_D).flatten(), mixed.double()]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_compiler
def test_what_is_not_finite_stays_in_its_row():
    rows_ND, reference_D = stack(3, 5000)
    rows_ND[1, 4999] = torch.nan
    rows_ND[2, 0] = torch.inf
    sums = row_sums(rows_ND, reference_D)
    assert sums[:, 0].isfinite().all() and sums[:, 1].isnan().all() and not sums[:, 2].isfinite().any()


def test_what_it_cannot_walk_over():
    rows = torch.zeros(2, 6)
    assert not can_walk(rows.double()) and not can_walk(rows.bfloat16()) and not can_walk(rows.T)
    assert not can_walk(rows, torch.zeros(6, dtype=torch.float64)) and not can_walk(rows[:, ::2])
    assert not can_walk(rows.to("meta"))


def test_without_a_compiler_it_says_so(monkeypatch):
    from hardy.ops import native_rows

    monkeypatch.setattr(native_build, "loaded_library", lambda: None)
    native_rows._functions.cache_clear()
    try:
        assert not can_walk(torch.zeros(2, 6))
    finally:
        native_rows._functions.cache_clear()
