"""SMMF's sweep by Triton kernels, in its interpreter, against the eager back end."""

import copy
from dataclasses import replace

import pytest
import torch

from hardy.ops import updates_eager
from hardy.ops.factorize import matrix_shape
from hardy.ops.updates import Place, Rounding, SweepTask

BF16, FP32 = torch.bfloat16, torch.float32


def draw(*shape, seed, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def signs_of(rows, cols, *, packed):
    signs = (draw(rows, cols, seed=7) > 0).to(torch.uint8)
    if not packed:
        return signs
    eights = torch.nn.functional.pad(signs, (0, -cols % 8)).view(rows, -(-cols // 8), 8)
    return (eights << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)


def task_of(
    rows,
    cols,
    *,
    place=None,
    numel=None,
    policy="exact",
    dtypes=(FP32, FP32, "nearest"),
    signs="packed",
    **numbers,
):
    """A sweep over a view of `numel` elements; a tenth of the gradient is exactly 0, the sums hold 5."""
    place = place or Place(base=0, stride=cols)
    numel = numel or place.base + max(rows - 1, 0) * place.stride + cols
    height, width = matrix_shape(numel, policy=policy)
    param, grad = draw(rows, cols, seed=0, dtype=dtypes[0]), draw(rows, cols, seed=1, dtype=dtypes[1])
    grad[draw(rows, cols, seed=2) < -1.3] = 0
    rest = draw(rows, cols, seed=3).mul(1e-3).bfloat16() if dtypes[2] == "kahan" else None
    momentum = signs != "none"
    usual = {"active": 1, "b1": 0.8, "b2": 0.95, "lr": 0.01, "keep": 0.99, "l2": 0, "eps": 1e-8, "q": 0.5}
    usual |= {"most": float("inf"), "skip_zeros": True} | numbers
    skip_zeros = usual.pop("skip_zeros")
    return SweepTask(
        param=param,
        grad=grad,
        row_m=draw(height, seed=4).abs() if momentum else None,
        col_m=draw(width, seed=5).abs() if momentum else None,
        row_v=draw(height, seed=6).abs(),
        col_v=draw(width, seed=8).abs(),
        sign=signs_of(rows, cols, packed=signs == "packed") if momentum else None,
        packed=signs == "packed",
        coefficients=torch.tensor(list(usual.values())),
        skip_zeros=skip_zeros,
        place=place,
        sums=torch.full(((1 + momentum) * (height + width) + 1,), 5.0),
        rounding=Rounding(mode=dtypes[2], key=1 << 40, step=torch.tensor(4.0), place=place, rest=rest),
    )


def in_fp64(task):
    names = ("param", "grad", "row_m", "col_m", "row_v", "col_v", "coefficients", "sums")
    given = {name: getattr(task, name) for name in names}
    task = replace(task, **{name: None if x is None else x.double() for name, x in given.items()})
    return replace(task, sign=None if task.sign is None else task.sign.clone())


def check(task, nearly):
    from hardy.ops.updates_triton import sweep

    naive, exact = copy.deepcopy(task), in_fp64(task)
    sweep([task])
    updates_eager.sweep([naive])
    updates_eager.sweep([exact])
    nearly(task.sums, naive.sums, exact.sums)
    if task.param.dtype == FP32:
        nearly(task.param, naive.param, exact.param)
    else:
        assert (task.param != naive.param).double().mean() <= 0.01
    if task.rounding.rest is not None:
        # A rest shows the last place of what was rounded; it differs more often, and by as little.
        assert (task.rounding.rest != naive.rounding.rest).double().mean() <= 0.05
        assert (task.rounding.rest - naive.rounding.rest).abs().max() <= 1e-4
    if task.sign is not None:
        assert torch.equal(task.sign, naive.sign)


WHOLE = [
    pytest.param({"rows": 16, "cols": 16}, id="square, all in eights"),
    pytest.param({"rows": 64, "cols": 24}, id="a matrix row is no tensor row, in eights"),
    pytest.param({"rows": 24, "cols": 40}, id="width no multiple of 8"),
    pytest.param({"rows": 5, "cols": 7}, id="odd rows, padded bytes"),
    pytest.param({"rows": 24, "cols": 37}, id="bytes beside groups"),
    pytest.param({"rows": 8, "cols": 9}, id="bytes beside groups, narrow"),
    pytest.param({"rows": 101, "cols": 1}, id="prime, a vector"),
    pytest.param({"rows": 1, "cols": 101}, id="prime, one row"),
    pytest.param({"rows": 13, "cols": 7, "policy": "virtual"}, id="the matrix ends early"),
    pytest.param({"rows": 1, "cols": 1}, id="one element"),
]
PARTS = {
    "rows, in eights": (3, 24, Place(base=72, stride=24), 240),
    "within matrix rows": (2, 24, Place(base=24, stride=24), 576),
    "rows, odd": (3, 7, Place(base=35, stride=7), 84),
    "rows, bytes beside groups": (8, 37, Place(base=296, stride=37), 888),
    "columns, in eights": (6, 8, Place(base=16, stride=24), 192),
    "columns, odd": (4, 5, Place(base=3, stride=11), 120),
    "far apart": (3, 40, Place(base=8, stride=320), 1600),
}
CUTS = [
    pytest.param({"rows": rows, "cols": cols, "place": place, "numel": numel}, id=name)
    for name, (rows, cols, place, numel) in PARTS.items()
]
BF16_WAYS = [(BF16, BF16, "stochastic"), (BF16, FP32, "kahan"), (BF16, BF16, "nearest")]


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("shape", WHOLE + CUTS)
def test_sweep(shape, nearly):
    check(task_of(**shape), nearly)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("shape", [(24, 80), (23, 99)], ids=["in eights", "a strip of one column"])
def test_several_strips_and_bands(shape, nearly, monkeypatch):
    from hardy.ops import triton_sweep

    block = triton_sweep.BLOCKS["sweep"] | {"groups": 4, "strip": 4, "band": 16}
    monkeypatch.setitem(triton_sweep.BLOCKS, "sweep", block)
    task = task_of(*shape)
    entry = triton_sweep.SWEEP.describe(task)
    (tiles,) = [
        launch for launch in triton_sweep.SWEEP.launches(entry[0], [entry[1]]) if launch.block == "sweep"
    ][:1]
    height, width = matrix_shape(shape[0] * shape[1], policy="exact")
    assert tiles.programs == -(-width // 32) * -(-height // 16) and min(width // 32, height // 16) >= 1
    check(task, nearly)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("signs", ["bytes", "none"])
@pytest.mark.parametrize("shape", [*WHOLE[:5], *CUTS[4:]])
def test_sweep_with_a_byte_for_each_sign_or_none(shape, signs, nearly):
    check(task_of(**shape, signs=signs), nearly)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("dtypes", BF16_WAYS, ids=str)
@pytest.mark.parametrize("shape", [WHOLE[2], WHOLE[3], CUTS[3], CUTS[4]])
def test_weights_in_bf16(shape, dtypes, nearly):
    check(task_of(**shape, dtypes=dtypes), nearly)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("shape", [WHOLE[1], WHOLE[4], WHOLE[5], CUTS[5]])
def test_draws_of_a_view_are_those_of_the_whole(shape, nearly):
    check(task_of(**shape, dtypes=BF16_WAYS[0]), nearly)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("shape", [WHOLE[0], WHOLE[3], WHOLE[5], CUTS[5]])
def test_l2_and_a_largest_update(shape, nearly):
    check(task_of(**shape, l2=0.1, most=0.5), nearly)
    check(task_of(**shape, l2=0.1, most=0.5, skip_zeros=False, dtypes=(FP32, BF16, "nearest")), nearly)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("signs", ["packed", "bytes", "none"])
@pytest.mark.parametrize("shape", [WHOLE[0], WHOLE[3], WHOLE[5], CUTS[5]])
def test_a_sweep_that_is_not_active_writes_zeros_to_the_sums_and_nothing_else(shape, signs):
    from hardy.ops.updates_triton import sweep

    task = task_of(**shape, signs=signs, active=0, dtypes=(BF16, FP32, "kahan"))
    task.grad.fill_(float("nan"))
    before = copy.deepcopy(task)
    sweep([task])
    assert torch.equal(task.param, before.param) and torch.equal(task.rounding.rest, before.rounding.rest)
    assert task.sign is None or torch.equal(task.sign, before.sign)
    assert not task.sums.any()


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("shape", [WHOLE[0], WHOLE[3]])
def test_zero_gradients_move_nothing_but_by_decay(shape):
    from hardy.ops.updates_triton import sweep

    for skip_zeros in (True, False):
        task = task_of(**shape, skip_zeros=skip_zeros)
        task.grad.zero_()
        decayed = task.param * 0.99
        sweep([task])
        moved = not torch.allclose(task.param, decayed, rtol=1e-6, atol=0)
        assert moved is not skip_zeros


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("shape", [WHOLE[0], WHOLE[3]])
def test_a_nan_reaches_its_weight_and_its_sums_through_the_clamp(shape):
    from hardy.ops.updates_triton import sweep

    task = task_of(**shape, most=0.5)
    task.grad[1, 2] = float("nan")
    naive = copy.deepcopy(task)
    sweep([task])
    updates_eager.sweep([naive])
    assert torch.equal(task.param.isnan(), naive.param.isnan()) and task.param.isnan().sum() == 1
    assert torch.equal(task.sums.isnan(), naive.sums.isnan())
    assert torch.equal(task.sign, naive.sign)


@pytest.mark.usefixtures("triton_interpreter")
def test_sums_of_parts_are_the_sums_of_the_whole():
    from hardy.ops.updates_triton import sweep

    whole = task_of(10, 24)
    exact = in_fp64(whole)
    updates_eager.sweep([exact])
    total = torch.zeros_like(exact.sums)
    for first, last in ((0, 3), (3, 3), (3, 4), (4, 10)):
        place = Place(base=24 * first, stride=24)
        part = replace(
            whole,
            param=whole.param[first:last],
            grad=whole.grad[first:last],
            sign=whole.sign[first:last],
            place=place,
            sums=torch.full_like(whole.sums, 5.0),
            rounding=replace(whole.rounding, place=place),
        )
        sweep([part])
        total += part.sums
    assert torch.allclose(total, exact.sums, rtol=1e-6)
    assert torch.equal(whole.sign, exact.sign)
    assert torch.allclose(whole.param.double(), exact.param, rtol=1e-6)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("shape", [(30, 44), (110, 12), (40, 32)], ids=str)
def test_a_matrix_in_several_launches_is_the_same_matrix(shape, nearly, monkeypatch):
    from hardy.ops import triton_sweep

    block = triton_sweep.BLOCKS["sweep"] | {"band": 16}
    monkeypatch.setitem(triton_sweep.BLOCKS, "sweep", block)
    monkeypatch.setattr(triton_sweep, "WORKSPACE_FLOATS", 1 << 8)
    task = task_of(*shape)
    kind = triton_sweep.SWEEP
    entry = kind.describe(task)
    names = [
        getattr(launch.kernel, "fn", launch.kernel).__name__ for launch in kind.launches(entry[0], [entry[1]])
    ]
    assert names.count("sweep_tiles") > 1 and names.count("sweep_signs") == (shape[1] % 8 > 0) * names.count(
        "sweep_tiles"
    )
    check(task, nearly)


@pytest.mark.usefixtures("triton_interpreter")
def test_an_empty_part_has_no_sums():
    from hardy.ops.updates_triton import sweep

    for signs in ("packed", "none"):
        task = task_of(0, 8, numel=64, signs=signs)
        sweep([task])
        assert not task.sums.any()


@pytest.mark.slow
@pytest.mark.usefixtures("triton_interpreter")
def test_a_view_that_lies_beyond_two_to_the_32(nearly, monkeypatch):
    from hardy.ops import triton_launch

    # Factors are long then; in few large blocks the interpreter adds up their sums in a second.
    monkeypatch.setitem(triton_launch.BLOCKS, "fold", triton_launch.BLOCKS["fold"] | {"entries": 1 << 15})
    height, width = 1_048_600, 4096
    place = Place(base=1_048_590 * width - 8, stride=64)
    task = task_of(3, 64, place=place, signs="none", numel=64)
    row_v, col_v = draw(height, seed=6).abs(), draw(width, seed=8).abs()
    check(replace(task, row_v=row_v, col_v=col_v, sums=torch.full((height + width + 1,), 5.0)), nearly)
