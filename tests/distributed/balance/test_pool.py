"""Groups are made once, by all workers alike, and found again."""

import pytest
import torch

from hardy.distributed.balance.pool import GroupPool
from hardy.distributed.comm import Alone
from hardy.distributed.simulation import SimWorld


def test_partitions_are_made_once_and_found_again():
    partitions = [
        [range(4)],
        [range(0, 2), range(2, 4)],
        [range(0, 2), (2,), (3,)],
        [(0,), (1,), (2,), (3,)],
    ]

    def body(comm):
        pool, seen = GroupPool(comm), []
        for _ in range(3):
            for partition in partitions:
                pool.prepare(partition)
                (mine,) = [group for group in partition if comm.rank in group]
                group = pool.group(mine)
                assert group.size == len(mine) and list(mine)[group.rank] == comm.rank
                total = group.sum(torch.tensor([float(comm.rank)])).item()
                assert total == sum(mine)
                seen.append(group)
        assert [a is b for a, b in zip(seen[:4], seen[8:], strict=True)] == [True] * 4
        return pool.num_made

    assert SimWorld(4).run(body) == [3] * 4  # {0..3}, {0,1}, {2,3}: groups of one are nobody else's business


def test_groups_that_share_workers_and_odd_groups_can_be_asked_for_together():
    def body(comm):
        pool = GroupPool(comm)
        pool.prepare([(0, 1), (1, 2), (0, 2, 1), (0, 1)])
        wanted = [ranks for ranks in ((0, 1), (1, 2), (0, 2, 1)) if comm.rank in ranks]
        return [pool.group(ranks).sum(torch.tensor(1)).item() for ranks in wanted], pool.num_made

    assert SimWorld(3).run(body) == [([2, 3], 3), ([2, 2, 3], 3), ([2, 3], 3)]


@pytest.mark.parametrize(("size", "groups"), [(1, 0), (2, 1), (6, 4), (8, 7)])
def test_warming_up_makes_every_aligned_group_and_later_steps_none(size, groups):
    def body(comm):
        pool = GroupPool(comm)
        pool.warm_up()
        before = pool.num_made
        if size == 8:
            pool.prepare([range(4), range(4, 6), (6,), (7,)])
        return before, pool.num_made

    assert SimWorld(size).run(body) == [(groups, groups)] * size


def test_warming_up_stops_at_the_largest_group_that_is_asked_for():
    def body(comm):
        pool = GroupPool(comm)
        assert pool.largest.size == 1
        pool.warm_up(2)
        return pool.num_made, pool.largest.size

    assert SimWorld(5).run(body) == [(2, 2)] * 4 + [(2, 1)]


def test_a_group_of_one_is_alone_and_others_groups_are_not_ours():
    def body(comm):
        pool = GroupPool(comm)
        pool.prepare([(0, 1)])
        assert isinstance(pool.group((comm.rank,)), Alone)
        with pytest.raises(KeyError, match="call prepare on all workers"):
            pool.group((1, 2))

    SimWorld(3).run(body)


@pytest.mark.parametrize("ranks", [(0, 0), (0, 2), (-1, 0), ()])
def test_groups_need_different_ranks_that_exist(ranks):
    def body(comm):
        with pytest.raises(ValueError, match="different ranks from 0 to 1"):
            GroupPool(comm).prepare([ranks])

    SimWorld(2).run(body)


def test_a_world_that_cannot_be_cut_is_refused():
    with pytest.raises(TypeError, match="object cannot be cut into groups"):
        GroupPool(object())
