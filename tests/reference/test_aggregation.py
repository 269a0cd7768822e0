"""The plain rules on numbers that can be worked out by hand."""

import pytest
import torch

from hardy.reference import aggregation as twin


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


LINE = rows([0.0], [1.0], [3.0], [10.0], [100.0])


def test_coordinates():
    assert twin.median(LINE).item() == 3
    assert twin.median(LINE[:4]).item() == 2
    assert twin.trimmed_mean(LINE, 1).item() == pytest.approx(14 / 3)
    assert twin.meamed(LINE, 2).item() == pytest.approx(4 / 3)  # 3, then 1 and 0
    assert twin.phocas(LINE, 1).item() == pytest.approx(14 / 4)  # around 14 / 3: 3, 1, 0, 10
    assert twin.sign_majority(rows([1.0, -1.0], [2.0, 0.0], [-3.0, 0.0])).tolist() == [1, -1]
    assert twin.around([0.0, 2.0, 9.0], 1.0, 1) == 0.0  # of two equally near the smaller


def test_krum():
    assert twin.krum_scores(LINE, 1) == [1 + 9, 1 + 4, 4 + 9, 49 + 81, 8100 + 97**2]
    assert twin.krum(LINE, 1).item() == 1
    assert twin.multi_krum(LINE, 1, keep=2).item() == 0.5
    assert twin.multi_krum(LINE, 1).item() == 3.5


def test_bulyan_drops_the_far_ones_twice():
    seven = rows([0.0], [1.0], [2.0], [3.0], [4.0], [5.0], [1000.0])
    assert 1 <= twin.bulyan(seven, 1).item() <= 4


def test_geometric_median_of_a_line_is_its_median_and_of_a_triangle_its_fermat_point():
    assert twin.geometric_median(LINE).item() == pytest.approx(3, abs=1e-3)
    corners = rows([0.0, 1.0], [-(3**0.5) / 2, -0.5], [3**0.5 / 2, -0.5])
    assert twin.geometric_median(corners).tolist() == pytest.approx([0, 0], abs=1e-5)


def test_centred_clipping():
    v = torch.zeros(1, dtype=torch.float64)
    assert twin.centered_clip(rows([1.0], [3.0], [100.0]), v, rounds=1, tau=2.0).item() == pytest.approx(
        5 / 3
    )
    assert twin.centered_clip(rows([1.0], [3.0], [100.0]), v, rounds=1).item() == pytest.approx(7 / 3)


def test_subsets():
    assert twin.mda(LINE, 2).item() == pytest.approx(4 / 3)
    assert twin.smea(LINE, 2).item() == pytest.approx(4 / 3)
    assert twin.monna(LINE, 3, own=3).item() == 6.5
    assert twin.cge(-LINE, 2).item() == pytest.approx(-4 / 3)
    assert twin.aksel(LINE).item() == pytest.approx(4 / 3)
    assert twin.dnc(LINE, 1).item() == 3.5
    assert twin.dnc_subsampled(LINE, 1, [[0], [0]]).item() == 3.5
    square = torch.tensor([[0.0, 0.0], [9.0, 1.0], [1.0, 9.0], [1.0, 1.0]], dtype=torch.float64)
    assert twin.dnc_subsampled(square, 1, [[0], [1]]).tolist() == [0.5, 0.5]
    assert twin.dnc_subsampled(square, 1, [[0], [1]], c=3).tolist() == [5.0, 5.0]  # row 2, row 1
    assert twin.caf(LINE, 1).item() == pytest.approx(3.5, abs=0.2)


def test_norms():
    assert twin.norm_clip(LINE).item() == pytest.approx((0 + 1 + 3 + 3 + 3) / 5)
    assert twin.norm_clip(LINE, 2.0).item() == pytest.approx((0 + 1 + 2 + 2 + 2) / 5)
    assert twin.norm_screen(LINE, 3.0).item() == pytest.approx(4 / 3)


def test_what_comes_before():
    assert twin.nnm(LINE, 3).flatten().tolist() == [0.5, 0.5, 2.0, 6.5, 55.0]
    assert twin.bucketing(LINE, 2, [4, 0, 1, 2, 3]).flatten().tolist() == [50, 2, 10]
    assert twin.clip(LINE, 5.0).flatten().tolist() == [0, 1, 3, 5, 5]
    assert twin.arc(LINE, 1).flatten().tolist() == [0, 1, 3, 10, 10]  # floor(2 * 4 / 5) = 1
    assert twin.arc(LINE, 2).flatten().tolist() == [0, 1, 3, 3, 3]  # floor(4 * 3 / 5) = 2
