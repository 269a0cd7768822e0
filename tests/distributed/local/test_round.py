"""A round's table and its numbers."""

import math

import torch

from hardy.distributed.local.averaging import SoftmaxNorm
from hardy.distributed.local.round import CONTROL, Table


def table_of():
    return Table(
        units=[0, 2],
        norms_NU=torch.tensor([[1.0, 2.0], [math.nan, 3.0]], dtype=torch.float64),
        flags_NU=torch.tensor([[False, True], [True, True]]),
        steps_N=torch.tensor([4.0, 2.0], dtype=torch.float64),
        rates_N=torch.tensor([0.4, 0.2], dtype=torch.float64),
        cosines_N=torch.tensor([0.9, math.nan], dtype=torch.float64),
        weights_NU=torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64),
    )


def test_a_unit_is_empty_where_all_are_left_out_and_a_table_comes_back():
    table = table_of()
    assert table.is_empty == [False, True]
    again = Table.of([0, 2], table.tensors())
    assert again.is_empty == table.is_empty and torch.equal(again.steps_N, table.steps_N)
    assert torch.equal(again.rates_N, table.rates_N) and again.cosines_N.isnan().tolist() == [False, True]


def test_a_table_follows_from_the_rows_of_all():
    numbers = [[4.0, 0.0, 0.0, 9.0, 0.4, 0.9], [2.0, 1.0, 0.0, 7.0, 0.2, math.nan]]
    assert {len(row) for row in numbers} == {CONTROL}
    rows_N = torch.tensor(
        [[*numbers[0], 1.0, 2.0, 0.0, 0.0], [*numbers[1], 5.0, 3.0, 1.0, 0.0]], dtype=torch.float64
    )
    table = Table.gathered([0, 2], rows_N, SoftmaxNorm(1.0))
    assert table.units == [0, 2] and table.steps_N.tolist() == [4.0, 2.0]
    assert table.rates_N.tolist() == [0.4, 0.2] and table.cosines_N.nan_to_num(0.5).tolist() == [0.9, 0.5]
    assert table.flags_NU.tolist() == [[False, False], [True, False]]
    assert table.norms_NU.tolist() == [[1.0, 2.0], [5.0, 3.0]]
    share = 1 / (1 + math.e)
    expected = torch.tensor([[1.0, 1 - share], [0.0, share]], dtype=torch.float64)
    assert torch.allclose(table.weights_NU, expected)
