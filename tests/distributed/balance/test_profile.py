"""Times of micro-batches: every row once, the slowest worker counts, warm-up and gradients leave no trace."""

import pytest
import torch
from torch import nn

from hardy.distributed.balance.layouts import GatherLayout
from hardy.distributed.balance.profile import measure, rows_to_measure
from hardy.distributed.balance.scheme import Sharer
from hardy.distributed.comm import Alone
from hardy.distributed.simulation import SimWorld

SHARER = Sharer(num_heads=2, num_kv_heads=2, scheme="gather", split_tokens=0)
ROWS = [(8,), (2, 2)]


class Sleeper(nn.Module):
    """Takes a second for each row of its input, and as much more as it is told."""

    def __init__(self, clock, *, factor=1.0, first_s=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.clock, self.factor, self.first_s, self.layouts = clock, factor, first_s, []

    def forward(self, tokens_T, layout, labels_T):
        self.layouts.append(layout)
        self.clock.sleep(self.factor * tokens_T.numel() + self.first_s)
        self.first_s = 0.0
        return self.weight * labels_T.sum()


def test_rows_are_each_length_alone_and_the_longest_filled():
    rows = rows_to_measure(2048, shortest=64)
    assert rows[0] == (64,) and rows[1] == (64,) * 32 and rows[-1] == (2048,)
    assert all(sum(row) <= 2048 for row in rows) and len(set(rows)) == len(rows)


def test_the_slowest_worker_counts_and_the_first_round_does_not():
    def body(comm):
        model = Sleeper(comm.clock, factor=1.0 + comm.rank, first_s=100.0)
        found = measure(model, comm, ROWS, sharer=SHARER, repeats=1)
        assert model.weight.grad is None
        return [(each.lengths, each.time, each.scheme.context) for each in found]

    for found in SimWorld(2).run(body):
        assert found == [((8,), pytest.approx(16_000.0), 1), ((2, 2), pytest.approx(8_000.0), 1)]


def test_groups_share_each_row():
    def body(comm):
        model = Sleeper(comm.clock)
        found = measure(model, comm, ROWS, sharer=SHARER, degree=2, repeats=1)
        assert all(isinstance(layout, GatherLayout) for layout in model.layouts)
        return [(each.time, each.scheme.context) for each in found]

    for found in SimWorld(4).run(body):
        assert found == [(pytest.approx(4_000.0), 2), (pytest.approx(2_000.0), 2)]


def test_one_worker_alone_measures_on_its_own_clock():
    class Steps:
        now_s = 0.0

        def now(self):
            return self.now_s

        def sleep(self, seconds):
            self.now_s += seconds

    clock = Steps()
    found = measure(Sleeper(clock), Alone(), [(3,)], sharer=SHARER, repeats=1, clock=clock)
    assert [each.time for each in found] == [3_000.0]
