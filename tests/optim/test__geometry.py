"""How a parameter is seen as matrices, whole and cut."""

from types import SimpleNamespace

import pytest

from hardy.optim._geometry import geometry_of, is_stack
from hardy.optim._sharded import Shard, Split

TWO = SimpleNamespace(size=lambda _: 2)
"""A mesh of which only the number of workers is asked."""
GROUP = {"rank": 4, "side": "auto", "wide_state": "shard", "stacked": True}
ROWS, COLS = Split(0, TWO, 0), Split(1, TWO, 1)


def see(shape, *, local=None, offset=None, splits=(), **settings):
    shard = Shard(shape, offset or (0,) * len(shape), local or shape, splits)
    return geometry_of(shard, {**GROUP, **settings}, "layers.0.weight")


@pytest.mark.parametrize(
    ("shape", "seen"),
    [
        ((12, 5), (1, 12, 5, "cols", 5, 12, 4)),
        ((5, 12), (1, 5, 12, "rows", 5, 12, 4)),
        ((6, 6), (1, 6, 6, "cols", 6, 6, 4)),  # square counts as tall
        ((1, 9), (1, 1, 9, "rows", 1, 9, 1)),  # no more directions than the shorter side has
        ((9, 3), (1, 9, 3, "cols", 3, 9, 3)),
        ((3, 8, 5), (3, 8, 5, "cols", 5, 8, 4)),  # a stack of experts
        ((4, 3, 2, 2), (1, 4, 12, "rows", 4, 12, 4)),  # filters
    ],
)
def test_the_shorter_side_is_contracted(shape, seen):
    g = see(shape)
    assert (g.stack, g.rows, g.cols, g.contracts, g.contracted, g.channels, g.rank) == seen
    assert (g.local_contracted, g.local_channels) == (g.contracted, g.channels)
    assert (g.contracted_begin, g.scattered, g.summed, g.channel_splits) == (0, None, (), ())


def test_three_dimensions_are_a_stack_unless_the_group_says_otherwise():
    assert is_stack((3, 8, 5), GROUP) and not is_stack((8, 5), GROUP) and not is_stack((4, 3, 2, 2), GROUP)
    g = see((3, 8, 5), stacked=False)
    assert (g.stack, g.rows, g.cols, g.contracts) == (1, 3, 40, "rows")


def test_channels_that_are_cut_need_no_sum_of_sketches():
    g = see((12, 5), local=(4, 5), offset=(8, 0), splits=(ROWS,))
    assert (g.rows, g.local_channels, g.channels) == (4, 4, 12)
    assert (g.contracted_begin, g.scattered, g.summed, g.channel_splits) == (0, None, (), (ROWS,))


def test_sketches_of_a_cut_contracted_side_are_scattered_or_summed():
    cut = {"local": (2, 12), "offset": (3, 0), "splits": (ROWS,)}
    g = see((5, 12), **cut)
    assert (g.local_contracted, g.contracted, g.contracted_begin) == (2, 5, 3)
    assert (g.scattered, g.summed, g.channel_splits) == (ROWS, (), (ROWS,))
    g = see((5, 12), wide_state="replicate", **cut)
    assert (g.scattered, g.summed, g.channel_splits) == (None, (ROWS,), ())


def test_both_sides_cut():
    g = see((12, 6), local=(6, 3), offset=(6, 3), splits=(ROWS, COLS))
    assert (g.contracted_begin, g.scattered, g.summed, g.channel_splits) == (3, None, (COLS,), (ROWS,))


def test_contracting_the_uncut_side():
    g = see((5, 12), local=(2, 12), offset=(3, 0), splits=(ROWS,), side="shard_local")
    assert (g.contracts, g.contracted, g.channels, g.summed, g.channel_splits) == ("cols", 12, 5, (), (ROWS,))
    assert see((5, 12), side="shard_local").contracts == "rows"  # uncut, it is 'auto'


def test_experts_cut_by_stack_and_by_row():
    experts, inner = Split(0, TWO, 0), Split(1, TWO, 0)
    g = see((4, 8, 5), local=(2, 8, 5), offset=(2, 0, 0), splits=(experts,))
    assert (g.stack, g.scattered, g.summed, g.channel_splits) == (2, None, (), ())
    g = see((4, 8, 5), local=(4, 4, 5), offset=(0, 4, 0), splits=(inner,))
    assert (g.stack, g.rows, g.channel_splits) == (4, 4, (inner,))


@pytest.mark.parametrize(("shape", "dim"), [((4, 3, 2, 2), 2), ((4, 3, 2, 2), 1)])
def test_a_cut_through_what_is_flattened_is_refused(shape, dim):
    with pytest.raises(
        ValueError, match=r"layers.0.weight of shape .* cut along a dimension .* cut dimension 0"
    ):
        see(shape, splits=(Split(dim, TWO, 0),))


def test_the_worker_with_most_is_what_memory_is_counted_by():
    for local, offset in (((4, 5), (0, 0)), ((3, 5), (4, 0))):
        g = see((7, 5), local=local, offset=offset, splits=(ROWS,))
        assert (g.most_channels, g.most_contracted) == (4, 5)
    g = see((3, 5, 9), local=(1, 5, 9), offset=(2, 0, 0), splits=(Split(0, TWO, 0),))
    assert (g.most_channels, g.most_contracted) == (2 * 9, 2 * 5)
