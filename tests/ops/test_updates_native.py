"""The C++ back end against formulas in fp64 and the eager back end in fp32.

SMMF's sweep has a file of its own, `test_updates_native_smmf.py`.
"""

import math
from dataclasses import fields, replace
from itertools import product

import pytest
import torch

from hardy.ops import native_build, native_ops, philox, updates_eager, updates_native
from hardy.ops.updates import (
    AdamTask,
    FillTask,
    MomentTask,
    Place,
    Rounding,
    ScaleTask,
    SketchTask,
    choose_backend,
)

native = pytest.mark.skipif(not updates_native.available(), reason="needs a C++ compiler")
pytestmark = native

NAN, INF = float("nan"), float("inf")
FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = [(96, 40), (40, 96), (33, 35), (1, 101), (101, 1), (3, 5000), (5000, 3), (0, 8), (8, 0)]


def draw(*shape, seed, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rule(shape, mode="nearest", *, base=0, rest=None, step=5.0):
    place = Place(base=base, stride=shape[1])
    return Rounding(mode=mode, key=2**64 - 3, step=torch.tensor(step), place=place, rest=rest)


def copied(task, dtype=None):
    """The same task on tensors of its own, in another dtype if wished."""
    own = {}
    for field in fields(task):
        value = getattr(task, field.name)
        if torch.is_tensor(value):
            own[field.name] = value.to(dtype or value.dtype, copy=True)
    if "param" in own:
        rest = task.rounding.rest
        own["rounding"] = replace(task.rounding, rest=None if rest is None else rest.clone())
    return replace(task, **own)


def three(task, sweep):
    """The task done by C++, by eager torch in the same dtypes, and by eager torch in fp64."""
    tasks = copied(task), copied(task), copied(task, torch.float64)
    for backend, own in zip((updates_native, updates_eager, updates_eager), tasks, strict=True):
        getattr(backend, sweep)([own])
    return tasks


# ---- Sketches ----------------------------------------------------------------------------------------------


def sketch_task(shape, rank, contracts, dtype=FP32):
    rows, cols = shape
    length, channels = (cols, rows) if contracts == "cols" else (rows, cols)
    return SketchTask(
        grad=draw(rows, cols, seed=1, dtype=dtype),
        projection_KR=draw(length, rank, seed=2, dtype=BF16).float(),
        contracts=contracts,
        sketch=torch.full((channels, rank) if contracts == "cols" else (rank, channels), NAN),
        squares=torch.full((channels,), NAN),
    )


def one_after_the_other(x, axis):
    """The sum as the shortest program takes it; torch's own sums are in pieces, or in fp64."""
    return (
        torch.from_numpy(x.numpy().cumsum(axis, dtype=x.numpy().dtype)).select(axis, -1) if x.numel() else x
    )


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("contracts", ["rows", "cols"])
@pytest.mark.parametrize(("rank", "way"), [(1, ""), (7, ""), *product((8, 33), ("products", "tiles"))])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sketches(shape, rank, way, contracts, dtype, nearly, monkeypatch):
    if way == "tiles" and not native_ops.has_tiles():
        pytest.skip("needs a processor, a system and a compiler with AMX")
    if way == "products":
        monkeypatch.setattr(native_ops, "has_tiles", lambda: False)
        monkeypatch.setattr(native_ops, "COPY_BYTES", 4096)  # bf16 in bands
    task = sketch_task(shape, rank, contracts, dtype)
    updates_native.sketch([task])
    contracted = 1 if contracts == "cols" else 0
    naive, exact = [], []
    for dtype, results in ((FP32, naive), (torch.float64, exact)):
        grad = task.grad.to(dtype)
        for factors in [grad, *task.projection_KR.to(dtype).T]:
            products = grad * (factors if factors.dim() == 2 or contracts == "cols" else factors[:, None])
            results.append(one_after_the_other(products, contracted))
    if task.grad.numel():
        nearly(task.squares, naive[0], exact[0])
        sketches = task.sketch.T if contracts == "cols" else task.sketch
        nearly(sketches, torch.stack(naive[1:]), torch.stack(exact[1:]))
    else:
        assert not task.sketch.any() and not task.squares.any()


@pytest.mark.parametrize("contracts", ["rows", "cols"])
def test_a_nan_in_a_gradient_reaches_its_channel_alone(contracts):
    task = sketch_task((30, 20), 2, contracts)
    task.grad[3, 7] = NAN
    updates_native.sketch([task])
    channel = 3 if contracts == "cols" else 7
    assert task.squares.isnan().nonzero().tolist() == [[channel]]
    assert task.sketch.isnan().sum() == 2


@pytest.mark.parametrize("contracts", ["rows", "cols"])
@pytest.mark.parametrize("rank", [1, 16])
def test_gradients_with_gaps_between_rows(rank, contracts):
    task = sketch_task((30, 20), rank, contracts)
    gaps = torch.full((30, 50), NAN)[:, 11:31]
    gaps.copy_(task.grad)
    other = replace(copied(task), grad=gaps)
    updates_native.sketch([task, other])
    assert torch.equal(task.sketch, other.sketch) and torch.equal(task.squares, other.squares)


def test_long_sums_of_sketches_keep_their_precision():
    task = sketch_task((20000, 40), 1, "rows")
    task.grad.abs_().add_(1)
    task.projection_KR.abs_()
    updates_native.sketch([task])
    exact = task.projection_KR.double().T @ task.grad.double()
    assert ((task.sketch - exact) / exact).abs().max() < 3e-7
    assert (task.squares / task.grad.double().square().sum(0) - 1).abs().max() < 3e-7


# ---- Moments -----------------------------------------------------------------------------------------------


def moment_task(shape, channels, *, active=1.0):
    count = shape[0] if channels == "rows" else shape[1]
    return MomentTask(
        sketch=draw(*shape, seed=1),
        exp_avg=draw(*shape, seed=2),
        exp_avg_sq=draw(*shape, seed=3).square(),
        channels=channels,
        coefficients=torch.tensor([active, 0.9, 0.99, 1e-6, 0.25]),
        before=torch.full((count,), NAN),
        after=torch.full((count,), NAN),
    )


@pytest.mark.parametrize("channels", ["rows", "cols"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments(shape, channels, nearly):
    ours, naive, exact = three(moment_task(shape, channels), "moments")
    for name in ("exp_avg", "exp_avg_sq", "before", "after"):
        if getattr(ours, name).numel():
            nearly(getattr(ours, name), getattr(naive, name), getattr(exact, name))


@pytest.mark.parametrize("channels", ["rows", "cols"])
@pytest.mark.parametrize("shape", [(30, 20), (20, 1), (1, 9000)], ids=str)
def test_inactive_moments_stay(shape, channels):
    task = moment_task(shape, channels, active=0)
    task.sketch.fill_(NAN)
    before = copied(task)
    updates_native.moments([task])
    assert torch.equal(task.exp_avg, before.exp_avg) and torch.equal(task.exp_avg_sq, before.exp_avg_sq)
    assert task.before.eq(0).all() and task.after.eq(0).all()


# ---- Scaling and AdamW -------------------------------------------------------------------------------------


def scale_task(shape, along, dtypes=(FP32, FP32), **more):
    sizes = {"all": 1, "rows": shape[0], "cols": shape[1]}
    settings = {
        "param": draw(*shape, seed=1, dtype=dtypes[0]),
        "grad": draw(*shape, seed=2, dtype=dtypes[1]),
        "factor": 0.1 * draw(sizes[along], seed=3).abs(),
        "along": along,
        "keep": torch.tensor([0.99]),
        "rounding": rule(shape),
    }
    return ScaleTask(**settings | more)


def adam_task(shape, dtypes=(FP32, FP32), *, active=1.0, l2=0.1, **more):
    settings = {
        "param": draw(*shape, seed=1, dtype=dtypes[0]),
        "grad": draw(*shape, seed=2, dtype=dtypes[1]),
        "exp_avg": draw(*shape, seed=3),
        "exp_avg_sq": draw(*shape, seed=4).square(),
        "coefficients": torch.tensor([active, 0.9, 0.99, 0.01, 3.0, 1e-6, 0.99, l2, 0.5]),
        "rounding": rule(shape),
    }
    return AdamTask(**settings | more)


DTYPES = [(FP32, FP32), (FP32, BF16), (BF16, FP32), (BF16, BF16)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("along", ["all", "rows", "cols"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scale(shape, along, dtypes, nearly):
    ours, naive, exact = three(scale_task(shape, along, dtypes), "scale")
    if ours.param.numel():
        nearly(ours.param, naive.param, exact.param)


@pytest.mark.parametrize("along", ["all", "rows", "cols"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_where_the_factor_is_zero_the_gradient_is_not_looked_at(along, keep):
    task = scale_task((20, 30), along, keep=torch.tensor([keep]))
    where = {"all": (slice(None), slice(None)), "rows": (3, slice(None)), "cols": (slice(None), 4)}[along]
    task.factor[{"all": 0, "rows": 3, "cols": 4}[along]] = 0
    task.grad[where] = NAN
    before = task.param.clone()
    updates_native.scale([task])
    assert not task.param.isnan().any()
    assert torch.equal(task.param[where], before[where] * keep)


def test_a_nan_or_infinity_of_a_gradient_reaches_its_weight_alone():
    task = scale_task((20, 30), "rows")
    task.grad[3, 4], task.grad[5, 6] = NAN, INF
    updates_native.scale([task])
    assert task.param.isnan().nonzero().tolist() == [[3, 4]]
    assert task.param.isinf().nonzero().tolist() == [[5, 6]]


@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adam(shape, dtypes, l2, nearly):
    ours, naive, exact = three(adam_task(shape, dtypes, l2=l2), "adam")
    for name in ("param", "exp_avg", "exp_avg_sq"):
        if ours.param.numel():
            nearly(getattr(ours, name), getattr(naive, name), getattr(exact, name))


def test_an_inactive_adam_step_writes_nothing():
    task = adam_task((20, 30), active=0)
    task.grad.fill_(NAN)
    before = copied(task)
    updates_native.adam([task])
    for name in ("param", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(task, name), getattr(before, name))


def test_a_vector_of_columns_one_wide_and_gaps_between_rows():
    shape = (20, 30)
    task = adam_task(shape)
    gaps = torch.zeros(20, 64)[:, 5:35]
    gaps.copy_(task.param)
    other = replace(copied(task), param=gaps)
    updates_native.adam([task, other])
    assert torch.equal(task.param, gaps)
    assert gaps.untyped_storage().size() == 4 * 20 * 64 and torch.zeros(20, 64)[:, :5].eq(0).all()


# ---- Rounding ----------------------------------------------------------------------------------------------


def without_rounding_errors(shape, mode, base, **more):
    """A task whose new weight w - g is one operation, so that both back ends round the same fp32 value."""
    rest = draw(*shape, seed=5, dtype=BF16) * 1e-3 if mode == "kahan" else None
    rounding = rule(shape, mode, base=base, rest=rest, **more)
    ones = {"factor": torch.ones(1), "keep": torch.ones(1)}
    return scale_task(shape, "all", (BF16, FP32), rounding=rounding, **ones)


@pytest.mark.parametrize("base", [0, 1, 2, 3, 2**34 + 5])
@pytest.mark.parametrize("mode", ["stochastic", "kahan", "nearest"])
@pytest.mark.parametrize("shape", [(33, 35), (1, 9001), (50, 8)], ids=str)
def test_weights_round_to_the_same_bits_as_in_eager_torch(shape, mode, base):
    task = without_rounding_errors(shape, mode, base)
    task.grad[0, 0], task.grad[0, 5], task.grad[0, 6] = NAN, INF, 3.4e38
    ours, eager = copied(task), copied(task)
    updates_native.scale([ours])
    updates_eager.scale([eager])
    assert torch.equal(ours.param.nan_to_num(7), eager.param.nan_to_num(7))
    assert torch.equal(ours.param.isnan(), eager.param.isnan()) and ours.param[0, 0].isnan()
    if mode == "kahan":
        finite = ours.param.isfinite()
        assert torch.equal(ours.rounding.rest[finite], eager.rounding.rest[finite])
    else:
        assert (ours.param.float() != (task.param.float() - task.grad)).any(), "something was rounded"


def test_random_bits_depend_on_step_key_and_place_alone():
    whole = without_rounding_errors((12, 40), "stochastic", 0)
    updates_native.scale([part := copied(whole)])
    lower, left = copied(whole), copied(whole)
    lower.param, lower.grad = lower.param[5:], lower.grad[5:]
    lower.rounding = rule((12, 40), "stochastic", base=200)
    left.param, left.grad = left.param[:, 3:17], left.grad[:, 3:17]
    left.rounding = rule((12, 40), "stochastic", base=3)
    updates_native.scale([lower, left])
    assert torch.equal(lower.param, part.param[5:]) and torch.equal(left.param, part.param[:, 3:17])
    for changed in (rule((12, 40), "stochastic", step=6.0), replace(whole.rounding, key=4)):
        other = copied(whole)
        other.rounding = changed
        updates_native.scale([other])
        assert not torch.equal(other.param, part.param)


def test_the_step_may_be_a_whole_number_of_any_dtype():
    tasks = [without_rounding_errors((12, 40), "stochastic", 0) for _ in range(3)]
    for task, dtype in zip(tasks, (torch.float32, torch.int64, torch.float64), strict=True):
        task.rounding = replace(task.rounding, step=torch.tensor(70000, dtype=dtype))
    updates_native.scale(tasks)
    assert all(torch.equal(task.param, tasks[0].param) for task in tasks)


def test_weights_that_do_not_move_keep_weight_and_rest():
    task = without_rounding_errors((12, 40), "kahan", 0)
    task.grad.zero_()
    before = copied(task)
    updates_native.scale([task])
    assert torch.equal(task.param, before.param) and torch.equal(task.rounding.rest, before.rounding.rest)


@pytest.mark.parametrize(
    ("mode", "mean", "spread"), [("nearest", 1.0, 0), ("stochastic", 1.1, 0.03), ("kahan", 1.1, 0)]
)
def test_small_updates_of_bf16_weights_add_up(mode, mean, spread):
    """Specification 3.8: weight 1.0, 1000 updates of 1e-4, far below the bf16 step of 0.0078."""
    shape = (8, 512)
    task = scale_task(shape, "all", (BF16, FP32), factor=torch.ones(1), keep=torch.ones(1))
    task.param.fill_(1)
    task.grad.fill_(-1e-4)
    task.rounding = rule(shape, mode, rest=torch.zeros(shape, dtype=BF16) if mode == "kahan" else None)
    for step in range(1000):
        task.rounding.step.fill_(step)
        updates_native.scale([task])
    assert math.isclose(task.param.double().mean(), mean, abs_tol=0.003)
    assert task.param.double().std() <= spread


@pytest.mark.parametrize("sweep", ["adam", "sketch", "scale"])
def test_threads_change_no_bit(sweep):
    shape = (701, 900)
    makers = {
        "adam": lambda: [adam_task(shape, (BF16, FP32), rounding=rule(shape, "stochastic"))],
        "scale": lambda: [scale_task(shape, along, (BF16, FP32)) for along in ("rows", "cols")],
        "sketch": lambda: [sketch_task(shape, rank, axis) for rank in (1, 3) for axis in ("rows", "cols")],
    }
    results = []
    for threads in (1, 2, 3):
        tasks = makers[sweep]()
        torch.set_num_threads(threads)
        getattr(updates_native, sweep)(tasks)
        torch.set_num_threads(1)
        results.append([task.sketch if sweep == "sketch" else task.param for task in tasks])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# ---- Random numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "count"),
    [*product((0, 1, 2, 3, 4, 8191, 2**33 + 1), (0, 1, 2, 5, 4099)), (0, 140001), (2**33 + 1, 140001)],
)
def test_random_numbers_are_those_of_philox(start, count):
    torch.set_num_threads(2)
    key, where = 2**64 - 5, {"third": 3, "fourth": 2**31 + 1}
    normals, signs = torch.full((count,), NAN), torch.full((1, count), NAN)
    updates_native.fill(
        [FillTask(out=normals, distribution="normal", key=key, start=start, epoch=3, slice=2**31 + 1)]
    )
    updates_native.fill(
        [
            FillTask(
                out=signs, distribution="rademacher", key=key - 2**64, start=start, epoch=3, slice=2**31 + 1
            )
        ]
    )
    assert torch.equal(signs[0], philox.signs(key, start=start, count=count, **where))
    eager = philox.normals(key, start=start, count=count, **where)
    assert (normals - eager).abs().max() < 1e-6 if count else True


def test_normal_numbers_of_the_specification():
    key = philox.key_for(0, "layers.0.attn.q_proj.weight", purpose="hardy.proj.v1")
    out = torch.empty(8)
    updates_native.fill([FillTask(out=out, distribution="normal", key=key, start=0, epoch=0, slice=0)])
    wanted = [-1.800323974, -1.508014957, -0.241374750, 0.718324816]
    wanted += [-0.325353203, -0.393200133, 0.124405446, 0.445541697]
    assert out.tolist() == pytest.approx(wanted, abs=1e-6)
    updates_native.fill([FillTask(out=out, distribution="rademacher", key=key, start=0, epoch=0, slice=0)])
    assert out.tolist() == [1, -1, -1, 1, -1, -1, -1, 1]
    updates_native.fill([FillTask(out=out[:4], distribution="normal", key=key, start=0, epoch=1, slice=0)])
    assert out[:4].tolist() == pytest.approx([-1.796708061, 1.185046860, 0.666958144, -1.256078439], abs=1e-6)


def test_normal_numbers_are_rounded_once(within_budget):
    """Against Box-Muller in fp64 on the same words."""
    count = 1 << 16
    words = philox.words(1, start=0, count=count, third=0)
    uniform = ((words >> 9) * 2 + 1).double() * 2.0**-24
    length, angle = (-2 * uniform[0::2].log()).sqrt(), 2 * math.pi * uniform[1::2]
    exact = torch.stack([length * angle.cos(), length * angle.sin()], dim=1).flatten()
    out = torch.empty(count)
    updates_native.fill([FillTask(out=out, distribution="normal", key=1, start=0, epoch=0, slice=0)])
    within_budget(out, exact.float(), exact, factor=1.01)


# ---- What is not ours --------------------------------------------------------------------------------------


def test_other_dtypes_and_layouts_go_to_eager_torch():
    fp64, fp16 = (
        scale_task((12, 40), "rows", (torch.float64,) * 2),
        scale_task((12, 40), "rows", (torch.float16,) * 2),
    )
    fp64.factor, fp64.keep = fp64.factor.double(), fp64.keep.double()
    turned = scale_task((12, 40), "rows")
    turned.param = turned.param.T.contiguous().T
    ours = scale_task((12, 40), "rows")
    tasks, eager = [fp64, ours, fp16, turned], [copied(task) for task in (fp64, ours, fp16, turned)]
    updates_native.scale(tasks)
    updates_eager.scale(eager)
    for task, other in zip(tasks, eager, strict=True):
        assert task.param.dtype == other.param.dtype
        exact = task is not ours
        assert torch.equal(task.param, other.param) or not exact
        assert torch.allclose(task.param, other.param, rtol=1e-6)
    doubles, floats = torch.empty(9, dtype=torch.float64), torch.empty(9)
    for distribution in ("normal", "rademacher"):
        numbers = {"distribution": distribution, "key": 1, "start": 0, "epoch": 0, "slice": 0}
        updates_native.fill([FillTask(out=out, **numbers) for out in (doubles, floats)])
        assert torch.allclose(doubles, floats.double(), atol=1e-6)


def test_no_tasks_are_no_work():
    for sweep in (updates_native.sketch, updates_native.moments, updates_native.scale, updates_native.adam):
        sweep([])
    updates_native.sweep([])


def test_it_is_the_back_end_of_cpu_tensors():
    assert choose_backend("auto", torch.device("cpu")) is updates_native
    assert choose_backend("native", torch.device("cpu")) is updates_native


def test_without_a_compiler_it_is_not_available(monkeypatch):
    monkeypatch.setattr(native_build, "loaded_library", lambda: None)
    monkeypatch.setattr(native_ops, "functions", native_ops.functions.__wrapped__)
    assert not updates_native.available()
