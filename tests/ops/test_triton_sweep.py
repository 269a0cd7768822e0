"""Launches of SMMF's sweep: how many, which way, the workspace, and that the cut is the task's own."""

import pytest
import torch

from hardy.ops.factorize import matrix_shape
from hardy.ops.updates import Place, Rounding, SweepTask


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def task_of(rows, cols, *, place=None, numel=None, packed=True, momentum=True):
    place = place or Place(base=0, stride=cols)
    height, width = matrix_shape(numel or rows * cols)
    return SweepTask(
        param=meta(rows, cols, dtype=torch.bfloat16),
        grad=meta(rows, cols, dtype=torch.bfloat16),
        row_m=meta(height) if momentum else None,
        col_m=meta(width) if momentum else None,
        row_v=meta(height),
        col_v=meta(width),
        sign=meta(rows, -(-cols // 8) if packed else cols, dtype=torch.uint8) if momentum else None,
        packed=packed,
        coefficients=meta(9),
        skip_zeros=True,
        place=place,
        sums=meta((1 + momentum) * (height + width) + 1),
        rounding=Rounding(mode="stochastic", key=3, step=meta(), place=place),
    )


def launches_of(tasks):
    from hardy.ops.triton_sweep import SWEEP

    entries = [SWEEP.describe(task) for task in tasks]
    assert len({group for group, _ in entries}) == 1
    return list(SWEEP.launches(entries[0][0], [row for _, row in entries]))


def names_of(launches):
    return [getattr(launch.kernel, "fn", launch.kernel).__name__ for launch in launches]


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize(
    "shape", [(4096, 4096), (11008, 4096), (4096, 11008), (32000, 4096), (768, 2048)], ids=str
)
def test_weights_of_language_models_take_two_launches_in_eights(shape):
    launches = launches_of([task_of(*shape)] * 2)
    assert names_of(launches) == ["sweep_tiles", "fold_kernel"]
    config = launches[0].config
    assert config.flat and config.eights and config.pairs and config.sign == "groups"


@pytest.mark.usefixtures("triton_interpreter")
def test_shapes_of_one_size_share_their_launches():
    from hardy.ops.triton_sweep import SWEEP

    groups = {SWEEP.describe(task_of(*shape))[0] for shape in ((11008, 4096), (4096, 11008))}
    assert len(groups) == 1


@pytest.mark.usefixtures("triton_interpreter")
def test_bytes_that_two_programs_would_share_take_three_launches():
    launches = launches_of([task_of(2048, 5461)])
    assert names_of(launches) == ["sweep_tiles", "fold_kernel", "sweep_signs"]
    config = launches[0].config
    assert config.sign == "bits" and config.eights and config.pairs and config.vector and not config.narrow
    assert 4 * (launches[0].floats - launches[0].rows[0][config.SIGNS]) >= 2048 * 5461 // 8
    for other in (task_of(2048, 5461, packed=False), task_of(2048, 5461, momentum=False)):
        assert names_of(launches_of([other])) == ["sweep_tiles", "fold_kernel"]


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("shape", [(2048, 5461), (300, 299), (101, 1), (4096, 12)], ids=str)
def test_all_bytes_of_signs_are_put_together(shape):
    launch = launches_of([task_of(*shape)])[-1]
    config, bytes_a_row = launch.config, -(-shape[1] // 8)
    tiles = -(-launch.rows[0][config.ROWS] // config.tile_rows) * -(-bytes_a_row // config.groups)
    assert launch.programs == tiles and config.narrow == (matrix_shape(shape[0] * shape[1])[1] < 8)


@pytest.mark.usefixtures("triton_interpreter")
def test_columns_of_a_worker_stay_in_eights():
    place = Place(base=1376, stride=11008)
    launches = launches_of([task_of(4096, 1376, place=place, numel=4096 * 11008)])
    config = launches[0].config
    assert names_of(launches) == ["sweep_tiles", "fold_kernel"]
    assert not config.flat and config.eights and config.sign == "groups" and not config.narrow


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize(("shape", "count"), [((4096, 4096), 128), ((151936, 8192), 1), ((2048, 5461), 24)])
def test_partial_sums_stay_in_the_workspace(shape, count):
    from hardy.ops.triton_launch import WORKSPACE_FLOATS

    launches = launches_of([task_of(*shape)] * count)
    numel, floats = shape[0] * shape[1] * count, sum(launch.floats for launch in launches)
    assert max(launch.floats for launch in launches) <= WORKSPACE_FLOATS
    signs = 1 / 8 if shape[1] % 8 else 0
    assert 4 * floats / numel < 0.15 + signs  # bytes for a weight, written and then read
    assert len(launches) <= 3 + 2 * (floats // (WORKSPACE_FLOATS // 2))


@pytest.mark.usefixtures("triton_interpreter")
def test_a_tensor_beyond_the_workspace_is_cut_into_ranges_of_matrix_rows(monkeypatch):
    from hardy.ops import triton_sweep

    monkeypatch.setattr(triton_sweep, "WORKSPACE_FLOATS", 1 << 16)
    launches = launches_of([task_of(4096, 4096)])
    tiles, folds = launches[::2], launches[1::2]
    fields = triton_sweep.Sweep
    ranges = [(launch.rows[0][fields.FIRST], launch.rows[0][fields.LAST]) for launch in tiles]
    assert len(ranges) > 1 and ranges[0][0] == 0 and ranges[-1][1] == 4096
    assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:], strict=False))
    assert [fold.config.add for fold in folds] == [False, *[True] * (len(folds) - 1)]


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("shape", [(4096, 4096), (300, 299), (96, 40)], ids=str)
def test_how_a_task_is_cut_does_not_depend_on_its_neighbours(shape):
    one, many = launches_of([task_of(*shape)]), launches_of([task_of(*shape)] * 30)
    assert [launch.config for launch in one] == [launch.config for launch in many]
    assert [launch.programs for launch in one] == [launch.programs for launch in many]


@pytest.mark.usefixtures("triton_interpreter")
def test_one_matrix_makes_enough_programs_for_a_device():
    assert launches_of([task_of(4096, 4096)])[0].programs >= 256
    assert launches_of([task_of(8192, 8192)])[0].programs >= 256
