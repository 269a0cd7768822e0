"""A round's table and its numbers."""

import math

import pytest
import torch

from hardy.distributed.comm import Alone
from hardy.distributed.local.round import Pending, Table, describe
from hardy.distributed.simulation import SimWorld


def table_of():
    return Table(
        units=[0, 2],
        norms_NU=torch.tensor([[1.0, 2.0], [math.nan, 3.0]], dtype=torch.float64),
        flags_NU=torch.tensor([[False, True], [True, True]]),
        steps_N=torch.tensor([4.0, 2.0], dtype=torch.float64),
        weights_NU=torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64),
    )


def test_a_unit_is_empty_where_all_are_left_out_and_a_table_comes_back():
    table = table_of()
    assert table.is_empty == [False, True]
    again = Table.of([0, 2], table.tensors())
    assert again.is_empty == table.is_empty and torch.equal(again.steps_N, table.steps_N)


def pending_of(products):
    return Pending(
        table=table_of(),
        due_step=0,
        exchanged=[None, None],
        done=[True, True],
        products=[torch.tensor(x, dtype=torch.float64) for x in products],
        factors=[torch.tensor(0.5), torch.tensor(1.0)],
    )


def test_the_numbers_of_a_round():
    numbers = describe(pending_of([[4.0, 1.0, 9.0], [0.0, 0.0, 16.0]]), Alone(), me=0)
    assert (numbers["outer_grad_norm"], numbers["pseudo_grad_norm"]) == (2.0, 5.0)
    assert numbers["drift_cosine"] == pytest.approx(0.1)
    assert numbers["effective_replicas"] == 1.0 and numbers["weight"] == 0.5
    assert numbers["flagged_replicas"] == [0, 1] and numbers["nonfinite_units"] == 1
    assert numbers["clip_share"] == 0.5 and numbers["replica_steps"] == [4.0, 2.0]


def test_shards_add_up_and_a_standstill_has_no_direction():
    world = SimWorld(2)
    split_up = world.run(lambda comm: describe(pending_of([[4.0, 1.0, 9.0], [0.0, 0.0, 16.0]]), comm, me=1))
    assert split_up[0]["pseudo_grad_norm"] == pytest.approx(50**0.5)
    assert describe(pending_of([[0.0, 0.0, 9.0]]), Alone(), me=0)["drift_cosine"] is None
