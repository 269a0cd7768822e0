import pytest
import torch

from hardy.config import ConfigError
from hardy.distributed.aggregation.coordinate import Median
from hardy.distributed.aggregation.rule import CoordinateRule, Rule, WeightRule, average_of, one_hot, smallest


def test_of_equal_values_the_first_are_smallest():
    assert smallest(torch.tensor([2.0, 1.0, 1.0, 0.0, 1.0]), 3).tolist() == [3, 1, 2]


def test_weights():
    assert one_hot(1, 3).tolist() == [0, 1, 0] and one_hot(1, 3).dtype == torch.float64
    assert average_of(torch.tensor([0, 2]), 3).tolist() == [0.5, 0, 0.5]


def test_what_a_rule_is_by_default():
    assert Rule().least_rows(3) == 7 and Rule().is_feasible(10**6, 3) and Rule().start() == {}
    assert Rule().moved({"a": 1}, 2.0) == {"a": 1}
    with pytest.raises(NotImplementedError):
        WeightRule().weigh(None, 0, {})
    with pytest.raises(NotImplementedError):
        CoordinateRule().reduce(torch.ones(1, 1), 0)
    assert CoordinateRule().pick(None, 0) is None
    with pytest.raises(ConfigError, match="median.even must be one of mid, lower, got 'x'"):
        Median(even="x")
