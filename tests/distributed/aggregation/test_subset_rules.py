import pytest
import torch

from hardy.config import ConfigError
from hardy.distributed.aggregation import aggregate, build_aggregator, subset_rules
from hardy.reference import aggregation as twin


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("at_once", [1, 2, 4096])
def test_subsets_of_equal_worth_are_taken_in_order(at_once, monkeypatch):
    monkeypatch.setattr(subset_rules, "SUBSETS_AT_ONCE", at_once)
    rows = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    for rule in ("mda", "smea"):
        assert aggregate(rows, rule, num_faulty=1).item() == 1.0


def test_many_subsets_are_tried_in_batches():
    rows = draw(15, 3)
    rows[[3, 7, 8, 9, 12]] += 3
    for rule, plain in (("mda", twin.mda), ("smea", twin.smea)):
        torch.testing.assert_close(aggregate(rows, rule, num_faulty=5), plain(rows, 5))


def test_too_many_subsets_are_refused():
    aggregator = build_aggregator("smea", num_faulty=10)
    aggregator.check(22)
    with pytest.raises(ConfigError) as caught:
        aggregator.check(40)
    assert "subsets are too many to be tried; lower it to at most 5" in str(caught.value)
    assert "let at least" not in str(caught.value)


def test_dnc_drops_more_rows_by_its_factor():
    rows = draw(12, 5)
    rows[:3] += 20
    for factor in (1.0, 1.5, 2.0):
        got = aggregate(rows, "dnc", num_faulty=3, factor=factor)
        torch.testing.assert_close(got, twin.dnc(rows, 3, factor))
    with pytest.raises(ConfigError, match="factor=0.0 of the rule 'dnc' must be above 0"):
        build_aggregator("dnc", num_faulty=1, arguments={"factor": 0.0})


def test_aksel_keeps_half_or_all_honest_rows():
    rows = draw(9, 5)
    rows[:2] += 5
    median = twin.median(rows)
    for keep, count in (("mid", 5), ("honest", 7)):
        want = rows[twin.nearest(median, rows, count)].mean(0)
        torch.testing.assert_close(aggregate(rows, "aksel", num_faulty=2, keep=keep), want)
    with pytest.raises(ConfigError, match="keep='all' of the rule 'aksel' must be 'mid' or 'honest'"):
        build_aggregator("aksel", num_faulty=1, arguments={"keep": "all"})


def test_caf_takes_all_trust_from_what_sticks_out():
    rows = draw(12, 5)
    rows[:3] += 30
    weights = build_aggregator("caf", num_faulty=3)([rows]).weights
    assert weights[:3].max() < 1e-6 and weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("rule", ["caf", "dnc", "mda", "smea"])
def test_equal_rows_but_one(rule):
    rows = torch.ones(7, 3)
    rows[4] = 1e6
    torch.testing.assert_close(aggregate(rows, rule, num_faulty=1), torch.ones(3))
