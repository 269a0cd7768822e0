"""Gradients cut into slices and put together again."""

import pytest
import torch

from hardy.distributed.comm import Alone
from hardy.distributed.robust.slices import Slices, first_columns
from hardy.distributed.simulation import SimWorld

SHAPES = [(3, 5), (), (7,), (2, 1, 3)]


def tensors_of(rank, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("bucket_bytes", [1, 40, 10**6])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_slice_of_everyone_put_together_is_the_sum(size, bucket_bytes):
    def body(comm):
        mine = tensors_of(comm.rank)
        slices = Slices(mine, comm, bucket_bytes=bucket_bytes)
        blocks = slices.trade(mine)
        assert all(block.shape[0] == size for block in blocks)
        assert all(
            torch.equal(block[comm.rank], own) for block, own in zip(blocks, slices.own(mine), strict=True)
        )
        into = [torch.empty_like(tensor) for tensor in mine]
        slices.put_together([block.sum(0) for block in blocks], into=into)
        added = [torch.empty_like(tensor) for tensor in mine]
        slices.add_up(mine, into=added)
        return into, added, slices.first_columns, [block.shape[1] for block in blocks]

    expected = [sum(parts) for parts in zip(*(tensors_of(rank) for rank in range(size)), strict=True)]
    found = SimWorld(size).run(body)
    for into, added, _, _ in found:
        torch.testing.assert_close(into, expected)
        torch.testing.assert_close(added, expected)
    columns = sorted(
        column
        for _, _, firsts, widths in found
        for first, width in zip(firsts, widths, strict=True)
        for column in range(first, first + width)
    )
    assert columns == list(range(len(columns))), "the slices do not overlap and leave nothing out"


def test_other_dtypes_travel_apart_and_keep_their_bits():
    def body(comm):
        mine = [*tensors_of(comm.rank), *tensors_of(comm.rank, torch.bfloat16)]
        slices = Slices(mine, comm)
        blocks = slices.trade(mine)
        into = [torch.empty_like(tensor) for tensor in mine]
        slices.put_together([block[1] for block in blocks], into=into)
        return into

    expected = [*tensors_of(1), *tensors_of(1, torch.bfloat16)]
    for into in SimWorld(3).run(body):
        for found, tensor in zip(into, expected, strict=True):
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_what_is_sent_is_what_a_ring_sends():
    def body(comm):
        mine = [torch.ones(600)]
        slices = Slices(mine, comm)
        slices.put_together([b.sum(0) for b in slices.trade(mine)], into=mine)
        return comm.bytes_sent

    assert SimWorld(4).run(body) == [2 * 600 * 4 * 3 // 4] * 4


def test_empty_tensors_and_a_worker_alone():
    empty = [torch.zeros(0), torch.zeros(3, 0)]
    slices = Slices(empty, Alone())
    assert [block.shape for block in slices.trade(empty)] == [(1, 0)]
    slices.put_together(slices.own(empty), into=empty)


def test_places_of_slices_are_counted_over_all_workers():
    places = SimWorld(3).run(lambda comm: first_columns([4, 1], comm))
    assert places == [[0, 12], [4, 13], [8, 14]]
