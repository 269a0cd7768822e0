"""Launches of APOLLO's first sweep and of its moments: how many, how large, cut by the task alone."""

from math import prod

import pytest
import torch

from hardy.ops.updates import MomentTask, SketchTask


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def sketch_task(rows, cols, rank, dtype=torch.bfloat16):
    tall = rows >= cols
    return SketchTask(
        grad=meta(rows, cols, dtype=dtype),
        projection_KR=meta(min(rows, cols), rank),
        contracts="cols" if tall else "rows",
        sketch=meta(rows, rank) if tall else meta(rank, cols),
        squares=meta(max(rows, cols)),
    )


def launches_of(kind, tasks):
    entries = [kind.describe(task) for task in tasks]
    assert len({group for group, _ in entries}) == 1
    return list(kind.launches(entries[0][0], [row for _, row in entries]))


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("rank", [1, 256])
@pytest.mark.parametrize(
    "shape", [(4096, 4096), (11008, 4096), (4096, 11008), (64, 48), (8, 100_000)], ids=str
)
def test_at_most_two_launches_and_a_small_workspace(shape, rank):
    from hardy.ops.triton_launch import WORKSPACE_FLOATS
    from hardy.ops.triton_sketch import SKETCH

    rank = min(rank, *shape)
    launches = launches_of(SKETCH, [sketch_task(*shape, rank)] * 32)
    assert len(launches) <= 2 and sum(launch.floats for launch in launches) <= WORKSPACE_FLOATS
    assert len(launches) == 1 + (launches[0].config.splits > 1)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("rank", [1, 128])
@pytest.mark.parametrize("shape", [(4096, 512), (300, 299), (512, 4096)], ids=str)
def test_how_a_task_is_cut_does_not_depend_on_its_neighbours(shape, rank):
    from hardy.ops.triton_sketch import SKETCH

    one = launches_of(SKETCH, [sketch_task(*shape, rank)])
    many = launches_of(SKETCH, [sketch_task(*shape, rank)] * 50)
    assert [launch.config for launch in one] == [launch.config for launch in many]
    assert [launch.programs for launch in one] == [launch.programs for launch in many]


@pytest.mark.usefixtures("triton_interpreter")
def test_few_tiles_are_made_more_by_cutting_the_contracted_axis():
    from hardy.ops.triton_launch import BLOCKS
    from hardy.ops.triton_sketch import SKETCH

    (first, fold) = launches_of(SKETCH, [sketch_task(4096, 11008, 1)])
    tiles = -(-11008 // (8 * first.config.groups))
    assert (
        first.config.splits > 1
        and first.programs == tiles * first.config.splits >= BLOCKS["vector"]["programs"]
    )
    assert fold.rows[0][1] == 11008 and fold.rows[0][4] == first.config.splits


@pytest.mark.usefixtures("triton_interpreter")
def test_ranks_beyond_a_tile_take_several_programs():
    from hardy.ops.triton_sketch import SKETCH

    config = launches_of(SKETCH, [sketch_task(4096, 4096, 1024)])[0]
    assert config.config.ranks < 1024
    assert (
        config.programs
        == 4096 // config.config.channels * (1024 // config.config.ranks) * config.config.splits
    )


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("shape", [(7, 1), (4096, 1), (300, 12), (11008, 256)], ids=str)
@pytest.mark.parametrize("channels", ["rows", "cols"])
def test_moments_take_one_launch_that_covers_all_channels(shape, channels):
    from hardy.ops.triton_sketch import MOMENTS

    shape = shape if channels == "rows" else shape[::-1]
    task = MomentTask(
        sketch=meta(*shape),
        exp_avg=meta(*shape),
        exp_avg_sq=meta(*shape),
        channels=channels,
        coefficients=meta(5),
        before=meta(max(shape)),
        after=meta(max(shape)),
    )
    (launch,) = launches_of(MOMENTS, [task] * 3)
    config = launch.config
    along = config.tile_rows if config.channels == "rows" else 8 * config.groups
    assert launch.programs * along >= max(shape) > (launch.programs - 1) * along
    assert prod(launch.rows[0][:2]) == prod(shape) and len(launch.rows) == 3
