import itertools

import pytest
import torch

from hardy.distributed.aggregation.network import comparators, sort_rows, sort_rows_around


def zeros_and_ones(num_rows):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=num_rows))).T.contiguous()


@pytest.mark.parametrize("num_rows", range(1, 13))
def test_sorts_all_zeros_and_ones_and_so_everything(num_rows):
    """The 0-1 principle."""
    columns = zeros_and_ones(num_rows)
    got = torch.stack(sort_rows(columns.clone(), range(num_rows)))
    assert torch.equal(got, columns.sort(dim=0).values)


@pytest.mark.parametrize("num_rows", range(1, 13))
def test_places_of_one_kind_hold_what_belongs_there(num_rows):
    columns = zeros_and_ones(num_rows)
    want = columns.sort(dim=0).values
    for begin in range(num_rows):
        for end in range(begin + 1, num_rows + 1):
            got = sort_rows_around(columns.clone(), begin, end)
            assert torch.equal(sum(got), want[begin:end].sum(0))


@pytest.mark.parametrize("num_rows", [33, 64, 65, 100])
def test_many_rows(num_rows):
    rows = torch.randn(num_rows, 50, generator=torch.Generator().manual_seed(0))
    want = rows.sort(dim=0).values
    assert torch.equal(torch.stack(sort_rows(rows.clone(), range(num_rows))), want)
    got = sort_rows_around(rows.clone(), num_rows // 2, num_rows // 2 + 1)
    assert torch.equal(got[0], want[num_rows // 2])


def test_only_what_is_needed_is_compared():
    counts = {n: len(comparators(n, tuple(range(n)))) for n in (4, 5, 8, 16, 32)}
    assert counts == {4: 5, 5: 9, 8: 19, 16: 63, 32: 191}
    for n, at_most in ((8, 17), (16, 53), (32, 157)):
        middle = tuple(int(place in ((n - 1) // 2, n // 2)) for place in range(n))
        assert len(comparators(n, middle)) <= at_most
    assert comparators(16, (0,) * 16) == ()
