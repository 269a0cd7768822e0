import pytest
import torch

from hardy.config import ConfigError
from hardy.distributed.aggregation import aggregate, build_aggregator

ROWS = [torch.tensor([1.0, 5.0]), torch.tensor([2.0, 4.0]), torch.tensor([90.0, -90.0])]


def test_a_list_of_vectors_or_a_stack():
    assert aggregate(ROWS, "median", num_faulty=1).tolist() == [2.0, 4.0]
    assert aggregate(torch.stack(ROWS), "median", num_faulty=1).tolist() == [2.0, 4.0]
    assert aggregate(ROWS, num_faulty=1).tolist() == [2.0, 4.0]
    assert aggregate(ROWS, "dstar", num_faulty=1, reference=torch.tensor([1.0, 4.0])).tolist() != [0, 0]


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="there is no aggregation rule 'crum'; did you mean 'krum'?"):
        build_aggregator("crum", num_faulty=1)
    with pytest.raises(
        ConfigError, match="no setting of the rule 'krum', 'neighbors'; did you mean 'neighbours'"
    ):
        build_aggregator("krum", num_faulty=1, arguments={"neighbors": "byzfl"})
    with pytest.raises(ConfigError, match="no pre-aggregator 'nmn'"):
        build_aggregator("krum", num_faulty=1, pre=["nmn"])


def test_nothing_to_aggregate_is_refused():
    with pytest.raises(ValueError, match="there are no rows to aggregate"):
        aggregate([], "median", num_faulty=1)
    with pytest.raises(ValueError, match=r"nothing is left to aggregate; rows removed: \[0, 1\]"):
        aggregate(torch.full((2, 3), torch.nan), "mean", num_faulty=2)
