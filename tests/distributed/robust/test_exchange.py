"""A meeting: what is sent, sharded replicas, those who take part only, rows that weigh differently."""

import pytest
import torch

from hardy.distributed.aggregation import aggregate, build_aggregator
from hardy.distributed.aggregation.columns import Rows
from hardy.distributed.groups import split
from hardy.distributed.robust.combine import Combiner
from hardy.distributed.robust.exchange import Exchange, dot
from hardy.distributed.robust.trusted import Trusted
from hardy.distributed.simulation import SimWorld

SIZE = 37


def row(number):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(number)) + 0.5


def exchanged(grid, rule, *, f, form="slices", trusted=None, arguments=None, **further):
    """Return what a replica's part of the gradient becomes; shards hold uneven parts of it."""
    cuts = [0, 30, SIZE] if grid.inner.size == 2 else [0, SIZE]
    part = slice(cuts[grid.inner.rank], cuts[grid.inner.rank + 1])
    sent = [row(grid.replica)[part]]
    aggregator = build_aggregator(rule, num_faulty=f, arguments=arguments)
    combine = Combiner(aggregator, num_workers=grid.outer.size)
    exchange = Exchange(combine, like=sent, inner=grid.inner, outer=grid.outer, form=form, **further)
    into = [torch.zeros_like(sent[0])]
    given = None if trusted is None else Trusted([trusted[part]], "median")
    assert exchange(sent, given, into=into, step=0)
    return part, into[0]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(("rule", "form"), [("median", "slices"), ("krum", "slices"), ("cge", "scalars")])
def test_sharded_replicas_get_their_parts_of_the_dense_result(rule, form, shards):
    def body(comm):
        return exchanged(split(comm, replicas=5, shards=shards), rule, f=1, form=form)

    expected = aggregate(torch.stack([row(i) for i in range(5)]), rule, num_faulty=1)
    for part, found in SimWorld(5 * shards).run(body):
        torch.testing.assert_close(found, expected[part])


@pytest.mark.parametrize("shards", [1, 2])
def test_drawn_columns_are_those_of_all_shards(shards, monkeypatch):
    """Each worker draws from its own part of the columns of all: together they have as many as were asked."""
    seen = []
    drawn = Rows.drawn

    def noted(rows, *given, **named):
        result = drawn(rows, *given, **named)
        firsts = rows.first_columns
        seen.append((firsts[0], rows.blocks[0].shape[1], result.blocks[0].shape[1]))
        return result

    monkeypatch.setattr(Rows, "drawn", noted)

    def body(comm):
        arguments = {"columns": 12, "rounds": 1}
        return exchanged(split(comm, replicas=5, shards=shards), "dnc", f=1, arguments=arguments)

    found = SimWorld(5 * shards).run(body)
    assert sum(count for _, _, count in seen) == 12
    columns = sorted(column for first, width, _ in seen for column in range(first, first + width))
    assert columns == list(range(40))  # with what is padded
    whole = torch.cat([part for _, part in found[:shards]])
    rows = torch.stack([row(i) for i in range(5)])
    means = [rows[[j for j in range(5) if j != i]].mean(0) for i in range(5)]
    assert min((whole - mean).abs().max() for mean in means) < 1e-6


@pytest.mark.parametrize("form", ["slices", "scalars"])
def test_a_trusted_gradient_in_parts_is_the_whole_one(form):
    def body(comm):
        return exchanged(split(comm, replicas=5, shards=2), "fltrust", f=1, form=form, trusted=row(99))

    rows = torch.stack([row(i) for i in range(5)])
    expected = aggregate(rows, "fltrust", num_faulty=1, reference=row(99))
    for part, found in SimWorld(10).run(body):
        torch.testing.assert_close(found, expected[part])


@pytest.mark.parametrize("form", ["slices", "scalars"])
def test_rows_may_weigh_differently(form):
    weights = torch.tensor([1.0, 0.5, 1.0])

    rows = torch.stack([row(i) for i in range(3)])
    expected = (weights[:, None] * rows).sum(0) / weights.sum()

    def body(comm):
        grid = split(comm, replicas=3, shards=1)
        sent = [row(grid.replica)]
        combine = Combiner(build_aggregator("mean", num_faulty=0), num_workers=10)
        exchange = Exchange(
            combine,
            like=sent,
            inner=grid.inner,
            outer=grid.outer,
            form=form,
            workers=(4, 7, 9),
            sample_weights=weights,
        )
        assert exchange(sent, None, into=sent, step=0)
        return sent[0], combine.take_report()["believed_workers"]

    for found, believed in SimWorld(3).run(body):
        torch.testing.assert_close(found, expected)
        assert believed == [4, 7, 9]


def test_reports_send_one_sum_and_three_numbers():
    def body(comm):
        grid = split(comm, replicas=4, shards=1)
        before = grid.outer.bytes_sent
        exchanged(grid, "fltrust", f=1, form="scalars", trusted=row(99))
        return grid.outer.bytes_sent - before

    padded = -(-SIZE // 4) * 4
    assert SimWorld(4).run(body) == [2 * padded * 4 * 3 // 4 + 3 * 3 * 8] * 4


def test_inner_products_are_exact_over_long_vectors():
    x = torch.full((3_000_001,), 0.1)
    assert dot([x, x[:1]], [x, x[:1]]).item() == pytest.approx(3_000_002 * float(x[0]) ** 2, rel=1e-11)
    assert dot([], []).item() == 0.0
