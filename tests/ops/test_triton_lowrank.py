"""Sketches and their moments by Triton kernels, in its interpreter, against the eager back end in fp64."""

import copy

import pytest
import torch

from hardy.ops import updates_eager
from hardy.ops.updates import MomentTask, SketchTask

SKETCHES = [
    (5, 24, 1),
    (90, 8, 1),
    (12, 300, 1),
    (33, 13, 1),
    (300, 12, 1),
    (16, 16, 4),
    (33, 70, 20),
    (24, 130, 17),
]


def draw(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sketch_task(rows, cols, rank, contracts, dtype):
    """All that is to be written holds 7 before."""
    tall = contracts == "cols"
    return SketchTask(
        grad=draw(rows, cols, seed=0, dtype=dtype),
        projection_KR=draw(cols if tall else rows, rank, seed=1).bfloat16().float(),
        contracts=contracts,
        sketch=torch.full((rows, rank) if tall else (rank, cols), 7.0),
        squares=torch.full((rows if tall else cols,), 7.0),
    )


def in_fp64(task):
    task = copy.deepcopy(task)
    for name in (
        "sketch",
        "projection_KR",
        "squares",
        "exp_avg",
        "exp_avg_sq",
        "coefficients",
        "before",
        "after",
    ):
        if hasattr(task, name):
            setattr(task, name, getattr(task, name).double())
    if hasattr(task, "grad"):
        task.grad = task.grad.double()
    return task


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("contracts", ["cols", "rows"])
@pytest.mark.parametrize(
    ("rows", "cols", "rank", "dtype"),
    [
        *((*sizes, torch.float32) for sizes in SKETCHES),
        *((*sizes, torch.bfloat16) for sizes in SKETCHES[3::3]),
    ],
)
def test_sketch(rows, cols, rank, contracts, dtype, nearly):
    from hardy.ops.updates_triton import sketch

    task = sketch_task(rows, cols, rank, contracts, dtype)
    naive, exact = copy.deepcopy(task), in_fp64(task)
    before = task.grad.clone()
    sketch([task])
    updates_eager.sketch([naive])
    updates_eager.sketch([exact])
    # numpy adds the lines of a tile one after the other, where the device and torch add in a tree.
    nearly(task.sketch, naive.sketch, exact.sketch, factor=8.0)
    nearly(task.squares, naive.squares, exact.squares, factor=8.0)
    assert torch.equal(task.grad, before)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("contracts", ["cols", "rows"])
@pytest.mark.parametrize("rank", [1, 5])
def test_a_projection_in_bf16_gives_the_same_bits(contracts, rank):
    from hardy.ops.updates_triton import sketch

    task = sketch_task(24, 40, rank, contracts, torch.bfloat16)
    other = copy.deepcopy(task)
    other.projection_KR = other.projection_KR.bfloat16()
    sketch([task])
    sketch([other])
    assert torch.equal(task.sketch, other.sketch) and torch.equal(task.squares, other.squares)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("rank", [1, 4])
def test_what_is_contracted_over_nothing_is_zero(rank):
    from hardy.ops.updates_triton import sketch

    for rows, cols, contracts in ((0, 8, "rows"), (8, 0, "cols"), (0, 8, "cols"), (8, 0, "rows")):
        task = sketch_task(rows, cols, rank, contracts, torch.float32)
        sketch([task])
        assert not task.sketch.any() and not task.squares.any()


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("contracts", ["cols", "rows"])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_gradient_may_be_part_of_another(contracts, rank):
    from hardy.ops.updates_triton import sketch

    task = sketch_task(12, 16, rank, contracts, torch.float32)
    other = copy.deepcopy(task)
    memory = torch.full((12, 40), float("nan"))
    memory[:, 16:32] = task.grad
    other.grad = memory[:, 16:32]
    sketch([task])
    sketch([other])
    assert torch.equal(task.sketch, other.sketch) and torch.equal(task.squares, other.squares)


@pytest.mark.usefixtures("triton_interpreter")
def test_nan_stays_in_its_channel():
    from hardy.ops.updates_triton import sketch

    task = sketch_task(12, 16, 1, "cols", torch.float32)
    task.grad[3, 5] = float("nan")
    sketch([task])
    assert task.squares.isnan().nonzero().flatten().tolist() == [3]


def moment_task(channels, rank, along, *, active=1.0):
    shape = (channels, rank) if along == "rows" else (rank, channels)
    return MomentTask(
        sketch=draw(*shape, seed=0),
        exp_avg=draw(*shape, seed=1),
        exp_avg_sq=draw(*shape, seed=2).square(),
        channels=along,
        coefficients=torch.tensor([active, 0.9, 0.99, 1e-6, 0.25]),
        before=torch.full((channels,), 7.0),
        after=torch.full((channels,), 7.0),
    )


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("along", ["rows", "cols"])
@pytest.mark.parametrize(("channels", "rank"), [(7, 1), (300, 1), (9, 16), (70, 20), (24, 300), (1, 1)])
def test_moments(channels, rank, along, nearly):
    from hardy.ops.updates_triton import moments

    task = moment_task(channels, rank, along)
    naive, exact = copy.deepcopy(task), in_fp64(task)
    moments([task])
    updates_eager.moments([naive])
    updates_eager.moments([exact])
    for name in ("exp_avg", "exp_avg_sq", "before", "after"):
        nearly(getattr(task, name), getattr(naive, name), getattr(exact, name))


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("along", ["rows", "cols"])
@pytest.mark.parametrize("rank", [1, 12])
def test_moments_that_are_not_active_stay(rank, along):
    from hardy.ops.updates_triton import moments

    task = moment_task(40, rank, along, active=0.0)
    task.sketch.fill_(float("nan"))
    before = copy.deepcopy(task)
    moments([task])
    assert torch.equal(task.exp_avg, before.exp_avg) and torch.equal(task.exp_avg_sq, before.exp_avg_sq)
    assert not task.before.any() and not task.after.any()


@pytest.mark.usefixtures("triton_interpreter")
def test_moments_of_part_of_a_state():
    from hardy.ops.updates_triton import moments

    task = moment_task(24, 6, "cols")
    other = copy.deepcopy(task)
    memory = torch.full((6, 40), 3.0)
    memory[:, 8:32] = task.exp_avg
    other.exp_avg = memory[:, 8:32]
    moments([task])
    moments([other])
    assert torch.equal(task.exp_avg, other.exp_avg) and torch.equal(task.after, other.after)
    assert (memory[:, :8] == 3).all() and (memory[:, 32:] == 3).all()
    moments([moment_task(0, 4, "rows")])
