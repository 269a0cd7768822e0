import pytest
import torch

from hardy.distributed.aggregation import build_aggregator, stack
from hardy.distributed.aggregation.columns import Rows, drawn_columns
from hardy.distributed.aggregation.stack import identity

X = torch.randn(5, 23, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BLOCKS = [X[:, :9].float(), X[:, 9:]]
MIX = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


def rows(**others):
    return Rows(blocks=BLOCKS, places=[4, 0, 2], total=identity, **others)


def mixed():
    return MIX @ X[[4, 0, 2]]


def test_mixtures_are_reduced_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(stack, "CPU_CHUNK", 4)
    got = rows().reduced(MIX, lambda x_nc: x_nc.sum(0))
    assert [vector.dtype for vector in got] == [torch.float32, torch.float64]
    torch.testing.assert_close(torch.cat([v.double() for v in got]), mixed().sum(0), rtol=1e-6, atol=1e-6)
    got = rows().reduced(None, lambda x_nc: x_nc.sum(0))
    want = X[[4, 0, 2]].sum(0)
    torch.testing.assert_close(torch.cat([v.double() for v in got]), want, rtol=1e-6, atol=1e-6)


def test_picked_rows_are_not_mixed():
    picks = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    got = rows().reduced(picks, lambda x_nc: x_nc[0] + 10 * x_nc[1] + 100 * x_nc[2])
    assert torch.equal(got[1], X[2, 9:] + 10 * X[4, 9:] + 100 * X[4, 9:])


def test_a_factor_is_no_pick():
    halves = torch.tensor([[0.5, 0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(rows().reduced(halves, lambda x_nc: x_nc[0])[1], X[4, 9:] / 2)


def test_distances_to_the_trusted_gradient_and_to_a_vector_of_columns():
    g = torch.ones(23, dtype=torch.float64)
    trusted = rows(references=[g[:9].float(), g[9:]])
    close = dict(rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(trusted.residual_squares(MIX), (mixed() - g).square().sum(1), **close)
    got = rows().distances_to(MIX, lambda x_nc: x_nc.mean(0))
    torch.testing.assert_close(got, (mixed() - mixed().mean(0)).square().sum(1), **close)
    last = [[row[:9], row[9:]] for row in X[[1, 2, 3]]]
    want = (X[[4, 0, 2]] - X[[1, 2, 3]]).square().sum(1)
    torch.testing.assert_close(rows().changes(last), want, **close)


def test_a_huge_row_of_weight_0_leaves_no_trace():
    stacked = X.float().clone()
    stacked[0] = 3e38
    huge = Rows(blocks=[stacked], places=[4, 0, 2], total=identity)
    mix = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(huge.reduced(mix, lambda x: x[0])[0], (X[4] + X[2]).float() / 2)


def test_drawn_columns_are_the_same_however_they_are_held():
    purpose, drawn = ["test", 3], drawn_columns(23, 7, seed=1, purpose=["test", 3])
    assert len(set(drawn.tolist())) == 7 and drawn.tolist() == sorted(drawn.tolist()) and drawn.max() < 23
    whole = rows().drawn(7, seed=1, purpose=purpose)
    got = torch.cat([block.double() for block in whole.blocks], 1)
    torch.testing.assert_close(got, X[[4, 0, 2]][:, drawn], rtol=1e-6, atol=1e-6)
    assert list(whole.places) == [0, 1, 2]
    pieces = []
    for begin, end in ((0, 9), (9, 23)):
        part = Rows(
            blocks=[X[:, begin:end]],
            places=[4, 0, 2],
            total=lambda _: torch.tensor(23.0),
            first_columns=[begin],
        )
        pieces.append(part.drawn(7, seed=1, purpose=purpose).blocks[0])
    assert torch.equal(torch.cat(pieces, 1), X[[4, 0, 2]][:, drawn])


def test_every_column_is_as_likely_and_none_comes_twice():
    counts = torch.zeros(6)
    for purpose in range(3000):
        counts[drawn_columns(6, 2, seed=0, purpose=[purpose])] += 1
    assert ((counts - 1000).abs() < 130).all() and counts.sum() == 6000


def test_a_draw_from_columns_of_unknown_place_is_refused():
    here = Rows(blocks=BLOCKS, places=[0], total=lambda number: number + 5)
    with pytest.raises(ValueError, match="23 of 28 columns are here; to draw some give first_columns"):
        here.drawn(3, seed=0, purpose=[])


@pytest.mark.parametrize("size", [2.0**-100, 2.0**-60, 2.0**60, 2.0**90])
def test_distances_whose_squares_leave_float32_are_what_they_are(size):
    rows = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    for rule, other in (("aksel", {}), ("kardam", {})):
        found = []
        for scale in (1.0, size):
            aggregator = build_aggregator(rule, num_faulty=2, arguments=other)
            for step in range(3):
                outcome = aggregator([rows.roll(step, 0) * scale], step=step)
            found.append(outcome.vectors[0] / scale)
        assert torch.equal(*found)
