"""AdamW's sweep and APOLLO's second by Triton kernels, in its interpreter, against the eager back end."""

import copy

import pytest
import torch

from hardy.ops import updates_eager
from hardy.ops.updates import AdamTask, Place, Rounding, ScaleTask

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [
    pytest.param((FP32, FP32, "nearest"), id="fp32"),
    pytest.param((FP32, BF16, "nearest"), id="fp32 weights, bf16 gradients"),
    pytest.param((FP16, FP16, "stochastic"), id="fp16, which is written as computed"),
    pytest.param((BF16, BF16, "stochastic"), id="bf16 stochastically"),
    pytest.param((BF16, FP32, "kahan"), id="bf16 with its rest"),
    pytest.param((BF16, BF16, "nearest"), id="bf16 to nearest"),
]
SHAPES = [(5, 24), (7, 13), (1, 2100), (40, 8), (7, 13), (5, 24), (3, 1)]
MIXED = [
    pytest.param(shape, dtypes.values[0], id=f"{shape} {dtypes.id}")
    for shape, dtypes in zip(SHAPES, [*DTYPES, DTYPES[0]], strict=True)
]


def draw(*shape, seed, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounding(param, mode, place):
    rest = draw(*param.shape, seed=9).mul(1e-3).bfloat16() if mode == "kahan" else None
    return Rounding(mode=mode, key=(1 << 63) + 5, step=torch.tensor(4.0), place=place, rest=rest)


def adam_task(shape, dtypes, *, active=1.0, l2=0.0, place=None):
    param, grad = draw(*shape, seed=0, dtype=dtypes[0]), draw(*shape, seed=1, dtype=dtypes[1])
    return AdamTask(
        param=param,
        grad=grad,
        exp_avg=draw(*shape, seed=2),
        exp_avg_sq=draw(*shape, seed=3).square(),
        coefficients=torch.tensor([active, 0.9, 0.99, 0.02, 1.3, 1e-8, 0.98, l2, 0.25]),
        rounding=rounding(param, dtypes[2], place or Place(base=0, stride=shape[1])),
    )


def scale_task(shape, dtypes, along, *, place=None):
    param, grad = draw(*shape, seed=0, dtype=dtypes[0]), draw(*shape, seed=1, dtype=dtypes[1])
    factor = draw({"rows": shape[0], "cols": shape[1], "all": 1}[along], seed=2).abs()
    return ScaleTask(
        param=param,
        grad=grad,
        factor=factor,
        along=along,
        keep=torch.tensor([0.98]),
        rounding=rounding(param, dtypes[2], place or Place(base=0, stride=shape[1])),
    )


def in_fp64(task):
    """The same task with every number in fp64, which the eager back end then computes in."""
    task = copy.deepcopy(task)
    for name in ("param", "grad", "exp_avg", "exp_avg_sq", "coefficients", "factor", "keep"):
        if hasattr(task, name):
            setattr(task, name, getattr(task, name).double())
    return task


def check(task, kernels, eager, nearly):
    """Compare what kernels and eager back end made of a task, by the task in fp64."""
    naive, exact = copy.deepcopy(task), in_fp64(task)
    kernels([task])
    eager([naive])
    eager([exact])
    for name in ("exp_avg", "exp_avg_sq"):
        if hasattr(task, name):
            nearly(getattr(task, name), getattr(naive, name), getattr(exact, name))
    if task.param.dtype == FP32:
        nearly(task.param, naive.param, exact.param)
    else:
        # Both round what differs in the last place of fp32: the same, but for a number on an edge.
        assert (task.param != naive.param).double().mean() <= 0.01
    if task.rounding.rest is not None:
        # A rest shows the last place of what was rounded; it differs more often, and by as little.
        assert (task.rounding.rest != naive.rounding.rest).double().mean() <= 0.05
        assert (task.rounding.rest - naive.rounding.rest).abs().max() <= 1e-4


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize(("shape", "dtypes"), MIXED)
def test_adam(shape, dtypes, nearly):
    from hardy.ops.updates_triton import adam

    check(adam_task(shape, dtypes), adam, updates_eager.adam, nearly)


@pytest.mark.usefixtures("triton_interpreter")
def test_adam_adds_l2_to_the_gradient(nearly):
    from hardy.ops.updates_triton import adam

    check(adam_task((4, 16), (FP32, FP32, "nearest"), l2=0.3), adam, updates_eager.adam, nearly)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_step_that_is_not_active_writes_nothing(dtypes):
    from hardy.ops.updates_triton import adam

    task = adam_task((5, 24), dtypes, active=0.0)
    task.grad.fill_(float("nan"))
    before = copy.deepcopy(task)
    adam([task])
    for name in ("param", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(task, name), getattr(before, name))
    assert task.rounding.rest is None or torch.equal(task.rounding.rest, before.rounding.rest)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("along", ["rows", "cols", "all"])
@pytest.mark.parametrize(("shape", "dtypes"), MIXED)
def test_scale(shape, along, dtypes, nearly):
    from hardy.ops.updates_triton import scale

    check(scale_task(shape, dtypes, along), scale, updates_eager.scale, nearly)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("along", ["rows", "cols"])
@pytest.mark.parametrize("shape", [(8, 2100), (3, 2051), (700, 12), (2, 3)], ids=str)
def test_scale_by_channels_where_rows_are_not_in_eights(shape, along, nearly):
    from hardy.ops.updates_triton import scale

    check(scale_task(shape, DTYPES[0].values[0], along), scale, updates_eager.scale, nearly)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("along", ["rows", "cols", "all"])
def test_a_gradient_is_not_looked_at_where_its_factor_is_zero(along):
    from hardy.ops.updates_triton import scale

    task = scale_task((5, 24), (FP32, FP32, "nearest"), along)
    part = {"rows": (slice(1, 2), slice(None)), "cols": (slice(None), slice(3, 4)), "all": ...}[along]
    task.factor[{"rows": 1, "cols": 3, "all": 0}[along]] = 0
    task.grad[part] = float("nan")
    kept = task.param.clone() * 0.98
    scale([task])
    assert torch.equal(task.param[part], kept[part]) and task.param.isfinite().all()
    assert along == "all" or not torch.equal(task.param, kept)


@pytest.mark.usefixtures("triton_interpreter")
def test_rows_may_lie_apart_in_memory_and_in_the_whole():
    from hardy.ops.updates_triton import adam, scale

    place = Place(base=24, stride=64)
    for task, sweep, eager in (
        (adam_task((6, 16), DTYPES[3].values[0], place=place), adam, updates_eager.adam),
        (scale_task((6, 16), DTYPES[4].values[0], "rows", place=place), scale, updates_eager.scale),
    ):
        whole = {name: torch.zeros(6, 40, dtype=getattr(task, name).dtype) for name in ("param", "grad")}
        for name, memory in whole.items():
            memory[:, 8:24] = getattr(task, name)
            setattr(task, name, memory[:, 8:24])
        naive = copy.deepcopy(task)
        sweep([task])
        eager([naive])
        assert torch.equal(task.param, naive.param)
        assert not whole["param"][:, :8].any() and not whole["param"][:, 24:].any()


@pytest.mark.usefixtures("triton_interpreter")
def test_nothing_is_done_to_empty_tensors():
    from hardy.ops.updates_triton import adam, scale

    adam([adam_task((0, 8), DTYPES[0].values[0]), adam_task((8, 0), DTYPES[3].values[0])])
    scale([scale_task((0, 8), DTYPES[0].values[0], "cols"), scale_task((8, 0), DTYPES[0].values[0], "rows")])
    adam([])
