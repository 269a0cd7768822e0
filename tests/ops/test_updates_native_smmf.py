"""SMMF's sweep of the C++ back end against its formula in fp64 and the eager back end in fp32.

The same weights go through whole and cut, in one row and in many, on one thread and on more.
"""

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.ops import native_build, native_ops, updates_eager, updates_native
from hardy.ops.updates import Place, Rounding, SweepTask

pytestmark = pytest.mark.skipif(not updates_native.available(), reason="needs a C++ compiler")

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16)
NUMBERS = {"active": 1, "beta1": 0.9, "beta2": 0.97, "lr": 0.01, "keep": 0.999, "l2": 0.0, "eps": 1e-8}
NUMBERS |= {"inverse_scale": 0.5, "max_update": INF}


def draw(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(
    shape, matrix, *, base=0, stride=None, packed=True, momentum=True, dtypes=(torch.float32,) * 2, **more
):
    """A task in the middle of training: factors, signs and gradients as they might be, some exactly zero."""
    (rows, cols), (height, width) = shape, matrix
    stride = cols if stride is None else stride
    numbers = NUMBERS | {key: more.pop(key) for key in NUMBERS if key in more}
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(7)) > 0.2
    signs = torch.randint(0, 2, (rows, cols), dtype=torch.uint8, generator=torch.Generator().manual_seed(8))
    factors = [draw(size, seed=9 + k).abs() for k, size in enumerate((height, width, height, width))]
    place = Place(base=base, stride=stride)
    settings = {
        "param": draw(rows, cols, seed=1, dtype=dtypes[0]),
        "grad": (draw(rows, cols, seed=2) * keep).to(dtypes[1]),
        "row_m": factors[0] if momentum else None,
        "col_m": factors[1] if momentum else None,
        "row_v": factors[2],
        "col_v": factors[3],
        "sign": (pack(signs) if packed else signs) if momentum else None,
        "packed": packed,
        "coefficients": torch.tensor(list(numbers.values()), dtype=torch.float32),
        "skip_zeros": True,
        "place": place,
        "sums": torch.full(((height + width) * (2 if momentum else 1) + 1,), NAN),
        "rounding": Rounding(mode="nearest", key=2**64 - 3, step=torch.tensor(5.0), place=place),
    }
    return SweepTask(**settings | more)


def pack(signs):
    """Signs [rows, cols] of 0 and 1 as bytes, bit b of byte q = column 8 q + b."""
    rows, cols = signs.shape
    bits = torch.nn.functional.pad(signs, (0, -cols % 8)).view(rows, -(-cols // 8), 8).long()
    return (bits << torch.arange(8)).sum(-1).to(torch.uint8)


def signs_of(task):
    """The signs as 0 and 1, and that no byte holds anything behind the last column."""
    rows, cols = task.param.shape
    if not task.packed:
        return task.sign.long()
    bits = (task.sign.unsqueeze(-1).long() >> torch.arange(8)).bitwise_and(1).flatten(1)
    assert not bits[:, cols:].any()
    return bits[:, :cols]


def copied(task, dtype=None):
    """The same task on tensors of its own, in another dtype if wished."""
    own = {}
    for field in fields(task):
        value = getattr(task, field.name)
        if torch.is_tensor(value):
            own[field.name] = value.to(
                dtype if dtype and value.is_floating_point() else value.dtype, copy=True
            )
    rest = task.rounding.rest
    rounding = replace(task.rounding, rest=None if rest is None else rest.clone())
    return replace(task, rounding=rounding, **own)


def by_formula(task):
    """The sweep in fp64 on whole matrices, as updates.SweepTask says it; returns (param, sign, |m|, sums)."""
    active, b1, b2, lr, keep, l2, eps, inverse, most = task.coefficients.double().tolist()
    rows, cols = task.param.shape
    height, width = len(task.row_v), len(task.col_v)
    k = task.place.base + torch.arange(rows)[:, None] * task.place.stride + torch.arange(cols)
    i, j = k // width, k % width
    w, raw = task.param.double(), task.grad.double()
    g = raw * inverse + l2 * w
    m = g
    if task.row_m is not None:
        s = 2.0 * signs_of(task) - 1
        m = b1 * s * task.row_m.double()[i] * task.col_m.double()[j] + (1 - b1) * g
    v = b2 * task.row_v.double()[i] * task.col_v.double()[j] + (1 - b2) * g * g
    u = (m / (v.sqrt() + eps)).clamp(-most, most)
    if task.skip_zeros:
        u = torch.where(raw == 0, 0, u)
    sums = []
    for values in ([m.abs()] if task.row_m is not None else []) + [v]:
        for index, size in ((i, height), (j, width)):
            sums.append(torch.zeros(size, dtype=torch.float64).index_add_(0, index.view(-1), values.view(-1)))
    return keep * w - lr * u, m, torch.cat([*sums, (g * g).sum().view(1)])


def check(task, within, *, also=()):
    """Run a task in C++, in eager fp32 and by the formula, and compare; return the task that C++ did."""
    ours, naive = copied(task), copied(task)
    for name, tensor in also:
        setattr(ours, name, tensor)
    param, m, sums = by_formula(task)
    updates_native.sweep([ours])
    updates_eager.sweep([naive])
    within(ours.param, naive.param, param)
    within(ours.sums, naive.sums, sums)
    if task.sign is not None:
        clear = m.abs() > 1e-5 * m.abs().mean() if m.numel() else m.abs() > 0
        assert torch.equal(signs_of(ours)[clear], (m > 0).long()[clear])
    return ours


WHOLE = [  # shape, matrix
    ((64, 48), (64, 48)),
    ((48, 64), (64, 48)),
    ((33, 35), (35, 33)),
    ((7, 15), (15, 7)),
    ((101, 1), (101, 1)),
    ((1, 101), (101, 1)),
    ((4096, 1), (64, 64)),
    ((1, 1), (1, 1)),
    ((3, 9000), (180, 150)),
    ((2, 5000), (2, 5000)),
    ((10, 1009), (101, 100)),  # a virtual matrix, longer than the tensor
    ((300, 70), (150, 140)),
]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize(("shape", "matrix"), WHOLE, ids=str)
def test_a_whole_tensor(shape, matrix, packed, nearly):
    check(make(shape, matrix, packed=packed), nearly)


@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "none"])
@pytest.mark.parametrize("skip_zeros", [True, False], ids=["skips", "moves"])
def test_options(momentum, skip_zeros, within_budget):
    more = {"l2": 0.1, "max_update": 1.5, "skip_zeros": skip_zeros, "momentum": momentum}
    ours = check(make((40, 96), (64, 60), **more), within_budget)
    still = (make((40, 96), (64, 60)).param * 0.999)[ours.grad == 0]
    moved = ours.param[ours.grad == 0]
    assert torch.allclose(moved, still, rtol=1e-6) == (skip_zeros)


CUTS = [  # local shape, base, row length of the whole, matrix of the whole
    ((15, 24), 5 * 24, 24, (32, 30)),
    ((15, 24), 7, 24, (32, 30)),
    ((40, 16), 8, 40, (40, 40)),
    ((40, 13), 27, 40, (50, 32)),
    ((9, 5), 3, 16, (12, 12)),
    ((3, 4096), 4096 * 3, 4096 * 2, (256, 200)),
]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize(("shape", "base", "stride", "matrix"), CUTS, ids=str)
def test_a_part_cut_through_matrix_rows(shape, base, stride, matrix, packed, nearly):
    check(make(shape, matrix, base=base, stride=stride, packed=packed), nearly)


def test_rows_that_do_not_follow_each_other_in_memory(nearly):
    task = make((20, 24), (24, 20))
    wide = torch.full((20, 40), NAN)
    gaps, grad_gaps = wide[:, 3:27], wide.clone()[:, 9:33]
    gaps.copy_(task.param)
    grad_gaps.copy_(task.grad)
    ours = check(task, nearly, also=[("param", gaps), ("grad", grad_gaps)])
    assert ours.param is gaps
    assert wide.isnan().sum() == 20 * 16


@given(
    rows=st.integers(0, 20),
    cols=st.integers(0, 70),
    width=st.integers(1, 40),
    base=st.integers(0, 50),
    gap=st.integers(0, 9),
    packed=st.booleans(),
)
@settings(max_examples=60)
def test_any_part_of_any_matrix(rows, cols, width, base, gap, packed):
    height = (base + max(rows - 1, 0) * (cols + gap) + cols) // width + 1
    task = make((rows, cols), (height, width), base=base, stride=cols + gap, packed=packed)

    def near(ours, _naive, exact):
        # One unit for each operation that the largest values pass through.
        assert torch.allclose(ours.double(), exact, rtol=3e-6, atol=3e-6)

    check(task, near)


@pytest.mark.parametrize("param", DTYPES, ids=["fp32 weight", "bf16 weight"])
@pytest.mark.parametrize("grad", DTYPES, ids=["fp32 gradient", "bf16 gradient"])
def test_dtypes(param, grad, within_budget):
    task = make((50, 70), (70, 50), dtypes=(param, grad))
    ours = check(task, within_budget)
    assert (ours.param.dtype, ours.grad.dtype) == (param, grad)
    assert torch.equal(ours.grad, task.grad)


@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "none"])
def test_large_sums_keep_their_precision(momentum):
    """Ten thousand rows of a column add up as precisely as fp32 can hold."""
    task = make((10000, 64), (10000, 64), momentum=momentum)
    _, _, sums = by_formula(task)
    updates_native.sweep([task])
    assert ((task.sums.double() - sums).abs() / sums).max() < 5e-7


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("cols", [700, 703])
def test_threads_change_no_bit(cols, packed):
    shape = (3 << 18) // cols, cols
    width = 333
    tasks = [make(shape, (shape[0] * cols // width + 1, width), packed=packed, base=11)]
    tasks += [make((30, 5), (15, 10), base=0), make((3, 0), (5, 5)), make((600, 500), (600, 500))]
    results = []
    for threads in (1, 2, 3):
        own = [copied(task) for task in tasks]
        torch.set_num_threads(threads)
        updates_native.sweep(own)
        results.append([x for task in own for x in (task.param, task.sign, task.sums)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_packed_is_unpacked():
    packed, unpacked = (make((37, 41), (41, 37), packed=way) for way in (True, False))
    updates_native.sweep([packed, unpacked])
    assert torch.equal(packed.param, unpacked.param) and torch.equal(packed.sums, unpacked.sums)
    assert torch.equal(signs_of(packed), signs_of(unpacked))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_inactive_step_writes_nothing_but_zero_sums(dtype):
    task = make((40, 24), (32, 30), active=0, dtypes=(dtype, dtype))
    task.grad.fill_(NAN)
    before = copied(task)
    updates_native.sweep([task])
    assert torch.equal(task.param, before.param)
    assert torch.equal(task.sign, before.sign)
    assert task.sums.eq(0).all()


@pytest.mark.parametrize("max_update", [INF, 1.5])
def test_nan_and_infinity_stay_where_they_are(max_update):
    task = make((20, 24), (24, 20), max_update=max_update)
    task.grad[3, 5], task.grad[4, 6], task.grad[5, 7] = NAN, INF, -INF
    ours, eager = copied(task), copied(task)
    updates_native.sweep([ours])
    updates_eager.sweep([eager])
    assert torch.equal(ours.param.isnan(), eager.param.isnan())
    assert ours.param.isnan().sum() >= 1
    assert torch.equal(ours.sums.isnan(), eager.sums.isnan())
    assert torch.equal(ours.sums.isinf(), eager.sums.isinf())
    assert torch.equal(signs_of(ours), signs_of(eager))
    assert signs_of(ours)[3, 5] == 0


def test_the_first_step_moves_by_a_share_of_the_rate():
    """With factors of zero and beta2 = 0 the step is (1 - beta1) g / (|g| + eps)."""
    task = make((16, 16), (16, 16), beta2=0, keep=1, skip_zeros=False)
    for factor in (task.row_m, task.col_m, task.row_v, task.col_v):
        factor.zero_()
    before = task.param.clone()
    updates_native.sweep([task])
    g = 0.5 * task.grad.double()
    step = 0.01 * (1 - task.coefficients[1].double()) * g / (g.abs() + 1e-8)
    assert torch.allclose(task.param.double(), before - step, rtol=0, atol=2e-7)
    assert torch.equal(signs_of(task), (task.grad > 0).long())  # where m is 0 the sign is not set


def test_steps_are_clamped():
    task = make((16, 16), (16, 16), max_update=0.25, keep=1, skip_zeros=False)
    before = task.param.clone()
    updates_native.sweep([task])
    assert math.isclose((task.param - before).abs().max(), 0.0025, rel_tol=1e-4)


@pytest.mark.slow
def test_processors_without_avx512_do_the_same(tmp_path, monkeypatch, nearly):
    """There another source steps the elements."""
    library = native_build.load_library(native_build.SOURCES, cache_dir=tmp_path, machine_flags=[()])
    functions = native_ops.functions()
    library.native_sweep.argtypes = functions["sweep"].argtypes
    monkeypatch.setattr(native_ops, "functions", lambda: functions | {"sweep": library.native_sweep})
    for packed in (True, False):
        for shape, matrix in WHOLE:
            check(make(shape, matrix, packed=packed), nearly)
        for shape, base, stride, matrix in CUTS:
            check(make(shape, matrix, base=base, stride=stride, packed=packed), nearly)
    check(make((40, 96), (64, 60), l2=0.1, max_update=1.5, skip_zeros=False, momentum=False), nearly)
