import torch

from hardy.distributed.aggregation import build_aggregator
from hardy.reference import aggregation as twin
from hardy.reference import dstar as trusted_twin


def steps(count, *, num_rows=7):
    draw = torch.Generator().manual_seed(0)
    slow = torch.randn(num_rows, 12, generator=draw, dtype=torch.float64) + 1
    wild = torch.linspace(0.1, 2.0, num_rows, dtype=torch.float64)[:, None]
    return [
        slow + wild * torch.randn(num_rows, 12, generator=draw, dtype=torch.float64) for _ in range(count)
    ]


def test_rows_that_changed_too_fast_are_left_out():
    Gs = steps(5)
    first = twin.trimmed_mean(twin.nnm(Gs[0], 2), 2)
    aggregator = build_aggregator("kardam", num_faulty=2)
    for G, want in zip(Gs, trusted_twin.kardam(Gs, 2, first), strict=True):
        outcome = aggregator([G[:, :5], G[:, 5:]])
        torch.testing.assert_close(torch.cat(outcome.vectors), want)
    assert 6 not in outcome.metrics["accepted"]


def test_rows_are_known_by_their_workers():
    Gs = steps(4)
    plain, shuffled = (build_aggregator("kardam", num_faulty=2) for _ in range(2))
    for number, G in enumerate(Gs):
        order = torch.randperm(7, generator=torch.Generator().manual_seed(number)).tolist()
        want = plain([G]).vectors[0]
        torch.testing.assert_close(shuffled([G[order]], workers=order).vectors[0], want)


def test_a_worker_is_used_from_its_second_row_on():
    Gs = steps(3, num_rows=8)
    aggregator = build_aggregator("kardam", num_faulty=2)
    aggregator([Gs[0][:7]])
    assert 7 not in aggregator([Gs[1]]).metrics["accepted"]
    later = Gs[2].clone()
    later[7] = Gs[1][7] * 1.0001  # it hardly changed
    assert 7 in aggregator([later]).metrics["accepted"]


def test_a_row_that_was_removed_is_not_remembered():
    Gs = steps(3)
    aggregator = build_aggregator("kardam", num_faulty=2)
    aggregator([Gs[0]])
    spoiled = Gs[1].clone()
    spoiled[3] = torch.nan
    assert 3 not in aggregator([spoiled]).metrics["accepted"]
    assert aggregator([Gs[2]]).vectors[0].isfinite().all()


def test_it_goes_on_when_columns_are_forgotten():
    aggregator = build_aggregator("kardam", num_faulty=1)
    for step in range(6):
        outcome = aggregator([torch.randn(5, 8, generator=torch.Generator().manual_seed(step))], step=step)
        assert outcome.taken == "rows" and outcome.vectors[0].isfinite().all()
        if step in (0, 3):
            aggregator.forget_columns()
