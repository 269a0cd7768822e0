"""Factors and blocks of SMMF's matrix; its shape, re-exported, is tested in `test_matrix_shape.py` too."""

import time

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.ops.factorize import blocks, compress, expand, matrix_shape


@given(st.integers(1, 2**33))
def test_virtual_is_the_root_rounded_up(numel):
    height, width = matrix_shape(numel, policy="virtual")
    assert (width - 1) ** 2 < numel <= width**2
    assert (height - 1) * width < numel <= height * width


def test_auto_gives_up_the_exact_shape_only_for_long_and_large():
    assert matrix_shape(65521, policy="auto") == (65521, 1)  # prime, but small
    assert matrix_shape(65537, policy="auto") == matrix_shape(65537, policy="virtual") == (256, 257)
    assert matrix_shape(256 * 4096, policy="auto") == (1024, 1024)
    assert matrix_shape(64 * 16 * 64, policy="auto") == (256, 256)
    edge = 1021 * 67  # primes: height is 15.2 times the width
    assert matrix_shape(edge, policy="auto") == (1021, 67)
    beyond = 1087 * 61  # 17.8 times
    assert matrix_shape(beyond, policy="auto") == matrix_shape(beyond, policy="virtual")


def test_fast_for_the_largest_primes():
    start = time.perf_counter()
    assert matrix_shape(2**33 - 9, policy="exact") == (2**33 - 9, 1)
    assert time.perf_counter() - start < 1.0  # 4 ms; a search upwards would take minutes


def test_compress_then_expand_keeps_a_rank_one_matrix():
    generator = torch.Generator().manual_seed(0)
    row, col = (torch.rand(size, dtype=torch.float64, generator=generator) for size in (7, 5))
    matrix = expand(row, col)
    again = expand(*compress(matrix.sum(1), matrix.sum(0)))
    torch.testing.assert_close(again, matrix, rtol=1e-14, atol=0)


def test_compress_keeps_the_sums_of_any_matrix():
    matrix = torch.rand(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    factors = compress(matrix.sum(1), matrix.sum(0))
    again = expand(*factors)
    torch.testing.assert_close(again.sum(1), matrix.sum(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(again.sum(0), matrix.sum(0), rtol=1e-14, atol=0)
    assert torch.equal(factors.row, matrix.sum(1))  # the column factor is the divided one
    assert not torch.allclose(again, matrix)


def test_compress_of_nothing_is_zeros_without_nan():
    factors = compress(torch.zeros(3), torch.zeros(2))
    assert [factor.tolist() for factor in factors] == [[0.0] * 3, [0.0] * 2]
    stack = compress(torch.tensor([[0.0, 0.0], [1.0, 3.0]]), torch.tensor([[0.0, 0.0], [2.0, 2.0]]))
    assert stack.col.tolist() == [[0.0, 0.0], [0.5, 0.5]]  # of a stack, each by its own total
    partly = compress(torch.tensor([0.0, 4.0]), torch.tensor([0.0, 4.0]))
    assert expand(*partly).tolist() == [[0.0, 0.0], [0.0, 4.0]]


@settings(max_examples=300)
@given(
    rows=st.integers(1, 12),
    cols=st.integers(1, 30),
    gap=st.integers(0, 20),
    start=st.integers(0, 50),
    width=st.integers(1, 25),
)
def test_blocks_cover_each_element_once_at_its_place(rows, cols, gap, start, width):
    stride = cols + gap
    buffer = torch.arange(rows * cols)
    seen = torch.zeros_like(buffer)
    row_of, col_of = torch.arange(1000).unsqueeze(1), torch.arange(width)
    for block in blocks(start=start, stride=stride, shape=(rows, cols), width=width):
        elements = block.of(buffer)
        flat = start + elements // cols * stride + elements % cols
        assert torch.equal(flat // width, row_of[block.rows].expand_as(elements))
        assert torch.equal(flat % width, col_of[block.cols].expand_as(elements))
        block.of(seen).add_(1)
    assert (seen == 1).all()


def count(**place):
    return sum(1 for _ in blocks(**place))


def test_few_blocks_whatever_the_cut():
    assert count(start=0, stride=64, shape=(500, 64), width=64) == 1
    assert count(start=7, stride=64, shape=(500, 64), width=100) == 3
    # A worker's columns of 4096 x 11008, matrix rows half as long as the tensor's: all rows begin alike.
    assert count(start=2752, stride=11008, shape=(300, 2752), width=5504) == 1
    # 32000 x 4096 in rows of 10240: every fifth row begins alike, none of these pieces crosses a border.
    assert count(start=1024, stride=4096, shape=(300, 1024), width=10240) == 5
    # Nothing in common: row by row.
    assert count(start=0, stride=1009, shape=(20, 400), width=1013) <= 40


def test_a_block_of_a_part_of_a_storage():
    storage = torch.arange(20)
    (block,) = blocks(start=6, stride=3, shape=(2, 3), width=3)
    assert block.of(storage[5:11]).tolist() == [[5, 6, 7], [8, 9, 10]]
    assert (block.rows, block.cols) == (slice(2, 4, 1), slice(0, 3))
