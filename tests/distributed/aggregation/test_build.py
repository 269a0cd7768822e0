import dataclasses
import math
import re

import numpy as np
import pytest
import torch

from hardy.config import ConfigError
from hardy.distributed.aggregation import RULES, aggregate, build_aggregator

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


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("num_faulty", [1.0, True, "1", -1, math.nan, None])
def test_f_is_a_whole_number_to_every_rule(rule, num_faulty):
    says = f"num_faulty must be a whole number at least 0, got {num_faulty!r}"
    with pytest.raises(ConfigError, match=re.escape(says)):
        aggregate(torch.ones(9, 2), rule, num_faulty=num_faulty, reference=torch.ones(2), own_row=0)


SETTINGS = [(rule, field.name) for rule in sorted(RULES) for field in dataclasses.fields(RULES[rule])]


@pytest.mark.parametrize(("rule", "setting"), SETTINGS)
@pytest.mark.parametrize("value", ["abc", True, math.nan, -1, [1]])
def test_every_setting_of_every_rule_is_checked(rule, setting, value):
    with pytest.raises(ConfigError, match=f"^{rule}.{setting} must be .*, got {re.escape(repr(value))}$"):
        build_aggregator(rule, num_faulty=1, arguments={setting: value})


def test_numbers_of_numpy_are_numbers():
    got = aggregate(torch.tensor([[1.0], [2.0], [90.0]]), "median", num_faulty=np.int64(1))
    assert got.tolist() == [2.0]
    assert type(RULES["centered_clip"](tau=np.float32(0.5), rounds=np.int32(2)).tau) is float
    with pytest.raises(ConfigError, match="num_faulty must be a whole number at least 0, got 1.0"):
        build_aggregator("median", num_faulty=np.float64(1))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([torch.ones(3), torch.ones(3), torch.ones(2)], "row 0 is [3] on cpu, row 2 is [2] on cpu"),
        ([torch.ones(3), torch.ones(3, device="meta")], "row 0 is [3] on cpu, row 1 is [3] on meta"),
        ([torch.ones(3), [1.0, 1.0, 1.0]], "row 1 is no tensor but a list"),
        ([[1.0], [1.0]], "row 0 is no tensor but a list"),
        ([torch.tensor(1.0), torch.tensor(2.0)], "row 0 is [] on cpu"),
        ([torch.ones(1, 3), torch.ones(1, 3)], "row 0 is [1, 3] on cpu"),
        (torch.ones(3), "a stack [N, d] or a list of vectors, got shape [3]"),
        (torch.ones(3, 2, 2), "a stack [N, d] or a list of vectors, got shape [3, 2, 2]"),
    ],
)
def test_rows_that_make_no_stack_are_named(rows, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        aggregate(rows, "median", num_faulty=0)


def test_rows_of_several_dtypes_are_stacked_in_the_widest():
    rows = [torch.ones(2).bfloat16(), torch.ones(2), torch.ones(2).double()]
    assert aggregate(rows, "median", num_faulty=1).dtype == torch.float64


def test_a_word_is_no_list_of_pre_aggregators():
    with pytest.raises(ConfigError, match=r"pre='nnm' must be a list, such as \['nnm'\]"):
        build_aggregator("median", num_faulty=1, pre="nnm")
