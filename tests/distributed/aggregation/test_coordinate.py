import pytest
import torch

from hardy.config import ConfigError
from hardy.distributed.aggregation import aggregate, build_aggregator
from hardy.distributed.aggregation.coordinate import Bulyan
from hardy.distributed.aggregation.rule import CoordinateRule
from hardy.reference import aggregation as twin


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_median_of_an_even_number_is_the_middle_or_the_lower_value():
    rows = column(4.0, 1.0, 3.0, 10.0)
    assert aggregate(rows, "median", num_faulty=1).item() == 3.5
    assert aggregate(rows, "median", num_faulty=1, even="lower").item() == 3.0 == rows.median(0).values.item()
    assert aggregate(rows[:3], "median", num_faulty=1).item() == 3.0


@pytest.mark.parametrize(
    ("rule", "want"),
    [("meamed", (0 + 1 + 2) / 3), ("phocas", (0 + 1 + 2) / 3)],
)
def test_of_two_equally_near_values_the_smaller_counts(rule, want):
    """Around 1.5: 1, 2, then 0 and 3 are as near as each other."""
    assert aggregate(column(3.0, 0.0, 2.0, 1.0), rule, num_faulty=1).item() == pytest.approx(want)


def test_mean_of_more_than_half_dropped_equals_its_twin():
    for num_rows, f in ((7, 1), (11, 2), (15, 3), (19, 4)):
        rows = torch.randn(num_rows, 30, generator=torch.Generator().manual_seed(f), dtype=torch.float64)
        torch.testing.assert_close(aggregate(rows, "bulyan", num_faulty=f), twin.bulyan(rows, f))


def test_signs_vote_and_a_tie_is_0():
    rows = torch.tensor([[1.0, -5.0, 0.0, 2.0], [2.0, -0.1, 0.0, -1.0], [-9.0, 3.0, 0.0, 0.0]])
    assert aggregate(rows, "sign_majority", num_faulty=1, scale=0.5).tolist() == [0.5, -0.5, 0.0, 0.0]


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_sums_of_huge_values_do_not_overflow(value):
    rows = torch.full((4, 3), value)
    for rule in ("median", "trimmed_mean", "meamed", "phocas"):
        assert aggregate(rows, rule, num_faulty=1).tolist() == pytest.approx([value] * 3, rel=1e-6)


def test_many_workers_are_sorted_column_by_column():
    rows = torch.randn(70, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for rule, plain in (
        ("trimmed_mean", twin.trimmed_mean),
        ("meamed", twin.meamed),
        ("phocas", twin.phocas),
    ):
        torch.testing.assert_close(aggregate(rows, rule, num_faulty=5), plain(rows, 5))
    torch.testing.assert_close(aggregate(rows, "median", num_faulty=5), twin.median(rows))


def test_which_rules_can_be_called_bucket_by_bucket():
    for rule in ("median", "trimmed_mean", "meamed", "phocas", "sign_majority"):
        assert build_aggregator(rule, num_faulty=1).is_coordinate
        assert not build_aggregator(rule, num_faulty=1, pre=["nnm"]).is_coordinate
    assert not build_aggregator("bulyan", num_faulty=1).is_coordinate
    assert issubclass(Bulyan, CoordinateRule) and Bulyan.needs_gram


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="median.even must be one of mid, lower, got 'upper'"):
        build_aggregator("median", num_faulty=1, arguments={"even": "upper"})
    with pytest.raises(ConfigError, match=r"sign_majority.scale must be a number above 0"):
        build_aggregator("sign_majority", num_faulty=1, arguments={"scale": 0.0})
