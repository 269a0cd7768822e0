import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hardy.ops import tiles as tiling


@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 40),
    most=st.integers(8, 200),
    width=st.one_of(st.none(), st.integers(1, 60)),
)
def test_tiles_cover_each_element_once_and_stay_small(rows, cols, most, width):
    seen = torch.zeros(rows, cols, dtype=torch.int64)
    for tile in tiling.tiles((rows, cols), most=most, width=width):
        seen[tile] += 1
        height, across = tiling.shape_of(tile)
        assert seen[tile].shape == (height, across)
        assert height * across <= most
        assert width or across == cols or tile[1].start % 8 == 0
    assert (seen == 1).all()


def test_bands_of_whole_rows_where_a_row_fits():
    assert all(tile[1] == slice(0, 30) for tile in tiling.tiles((100, 30), most=64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_buffers_share_one_budget_that_does_not_grow_with_the_tensor(dtype, monkeypatch):
    monkeypatch.setitem(tiling._BUFFER_BYTES, "cpu", 1 << 12)
    like = torch.zeros((), dtype=dtype)
    large = tiling.buffers(3, like=like, numel=10**12)
    assert len(large) == 3
    assert {buffer.dtype for buffer in large} == {dtype}
    assert sum(buffer.numel() * buffer.element_size() for buffer in large) <= (1 << 12) + 3 * 8 * 8
    assert len(tiling.buffers(1, like=like, numel=3)[0]) == 8  # a tile of eights fits


def test_elsewhere_the_budget_is_larger_and_below_64_mib():
    (buffer,) = tiling.buffers(1, like=torch.empty((), device="meta"), numel=10**12)
    assert 16 << 20 <= buffer.numel() * buffer.element_size() <= 64 << 20


def test_loaded_copies_only_another_dtype():
    source, buffer = torch.ones(2, 3), torch.zeros(2, 3)
    assert tiling.loaded(source, buffer) is source
    assert buffer.sum() == 0
    assert tiling.loaded(source.bfloat16(), buffer) is buffer
    assert torch.equal(buffer, source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_cut_nan_and_infinity_and_leave_bits_alone(dtype):
    x = torch.tensor([math.nan, math.inf, -0.0, 1e-45, 3.5], dtype=dtype)
    kept = tiling.cut(x.clone(), tiling.mask_where(torch.tensor([False, False, True, True, True]), like=x))
    assert kept[:2].tolist() == [0.0, 0.0]
    assert torch.equal(tiling.bits(kept[2:]), tiling.bits(x[2:]))
    off = tiling.cut(x.clone(), tiling.mask_where(torch.tensor(False), like=x))
    assert torch.equal(tiling.bits(off), torch.zeros_like(tiling.bits(off)))
    on = tiling.cut(x.clone(), tiling.mask_where(torch.tensor(True), like=x))
    assert torch.equal(tiling.bits(on), tiling.bits(x))
