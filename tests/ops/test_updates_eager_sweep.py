"""SMMF's sweep of the eager back end against the reference twin, on tensors cut into uneven parts."""

from dataclasses import replace

import pytest
import torch

from hardy.ops import updates_eager
from hardy.ops.factorize import compress, matrix_shape
from hardy.ops.updates import Place, Rounding, SweepTask
from hardy.reference import smmf

SHAPES = [(96, 40), (40, 96), (33, 35), (16, 16), (16, 20), (1, 101), (101, 1), (7, 15), (3, 200)]
STEPS = 24


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gradients(shape, steps=STEPS):
    """Gradients, some exactly zero, a spike among them."""
    Gs = []
    for t in range(steps):
        keep = torch.rand(shape, generator=torch.Generator().manual_seed(1000 + t)) > 0.2
        Gs.append(draw(*shape, seed=t + 1) * keep * (30 if t == 4 else 1))
    return Gs


def pack(signs):
    """Signs [rows, cols] of 0 and 1 as bytes, bit b of byte q = column 8 q + b."""
    rows, cols = signs.shape
    bits = torch.nn.functional.pad(signs, (0, -cols % 8)).view(rows, -(-cols // 8), 8).long()
    return (bits << torch.arange(8)).sum(-1).to(torch.uint8)


def unpack(packed, cols):
    return (packed.unsqueeze(-1).long() >> torch.arange(8)).bitwise_and(1).flatten(1)[:, :cols]


def cut(shape, way):
    """Uneven parts of a matrix as (rows, cols); by rows one of them is empty."""
    rows, cols = shape
    if way == "whole":
        return [(slice(0, rows), slice(0, cols))]
    size = rows if way == "rows" else cols
    borders = sorted({0, min(1, size), min(5, size), size // 2, size}) + [size]
    pieces = [slice(a, b) for a, b in zip(borders, borders[1:], strict=False) if way == "rows" or a < b]
    if way == "rows":
        return [(piece, slice(0, cols)) for piece in pieces]
    return [(slice(0, rows), piece) for piece in pieces]


def eager_smmf(W, Gs, c, *, matrix, way="whole", packed=True, momentum=True):
    """Drive the sweep as an optimizer would, W in parts; return the weights and the last signs, 0 or 1."""
    W, dtype = W.clone(), W.dtype
    height, width = matrix
    factors = [torch.zeros(size, dtype=dtype) for size in (height, width, height, width)]
    pieces = cut(W.shape, way)
    signs = [torch.zeros(W[piece].shape, dtype=torch.uint8) for piece in pieces]
    signs = [pack(sign) if packed else sign for sign in signs]
    for t, G in enumerate(Gs, start=1):
        b1, b2 = smmf.schedules(t, c)
        l2 = c.lam if c.decay == "l2" else 0.0
        keep = 1.0 if c.decay == "l2" else 1 - c.eta * c.lam
        numbers = torch.tensor([1, b1, b2, c.eta, keep, l2, c.eps, 1, c.max_update], dtype=dtype)
        total = 0
        for piece, sign in zip(pieces, signs, strict=True):
            place = Place(base=piece[0].start * W.shape[1] + piece[1].start, stride=W.shape[1])
            sums = torch.full(((2 if momentum else 1) * (height + width) + 1,), float("nan"), dtype=dtype)
            task = SweepTask(
                param=W[piece],
                grad=G.to(dtype)[piece],
                row_m=factors[0] if momentum else None,
                col_m=factors[1] if momentum else None,
                row_v=factors[2],
                col_v=factors[3],
                sign=sign if momentum else None,
                packed=packed,
                coefficients=numbers,
                skip_zeros=c.mask,
                place=place,
                sums=sums,
                rounding=Rounding(mode="nearest", key=0, step=torch.tensor(0.0), place=place),
            )
            updates_eager.sweep([task])
            total = total + sums
        if not l2:
            assert total[-1].item() == pytest.approx(G.double().square().sum().item(), rel=1e-5)
        split = total[:-1].split([height, width] * (2 if momentum else 1))
        factors[2:] = compress(*split[-2:])
        if momentum:
            factors[:2] = compress(*split[:2])
    last = torch.zeros(W.shape, dtype=torch.int64)
    for piece, sign in zip(pieces, signs, strict=True):
        if sign.numel():
            last[piece] = unpack(sign, W[piece].shape[1]) if packed else sign.long()
    return W, last


@pytest.mark.parametrize("way", ["whole", "rows", "cols"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sweep_is_its_twin(shape, way, any_tiles):
    W, Gs, c = draw(*shape, seed=0), gradients(shape), smmf.Settings(eta=0.01, lam=0.1)
    matrix = smmf.shape(W.numel())
    exact = smmf.smmf(W, Gs, c)[-1]
    got, signs = eager_smmf(W, Gs, c, matrix=matrix, way=way)
    torch.testing.assert_close(got, exact.W, rtol=0, atol=1e-12)
    assert torch.equal(signs, (exact.m > 0).long())


@pytest.mark.parametrize(
    "c",
    [
        smmf.Settings(eta=0.01, mask=False),
        smmf.Settings(eta=0.01, lam=0.3, decay="l2"),
        smmf.Settings(eta=0.01, max_update=0.2),
        smmf.Settings(eta=0.01, growth=0.9, gamma=-0.5, beta1_floor=0.4),
    ],
    ids=["no mask", "l2", "clamped", "schedules"],
)
@pytest.mark.parametrize("policy", ["exact", "virtual"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "a byte each"])
def test_options_are_the_twins(c, policy, packed, any_tiles):
    W, Gs = draw(23, 29, seed=0), gradients((23, 29), steps=6)
    matrix = matrix_shape(23 * 29, policy=policy)
    exact = smmf.smmf(W, Gs, c, matrix=matrix)[-1].W
    for way in ("rows", "cols"):
        got, _ = eager_smmf(W, Gs, c, matrix=matrix, way=way, packed=packed)
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", ["whole", "rows", "cols"])
def test_without_momentum(way, any_tiles):
    W, Gs, c = draw(24, 40, seed=0), gradients((24, 40)), smmf.Settings(eta=0.01, beta=None)
    got, _ = eager_smmf(W, Gs, c, matrix=(32, 30), way=way, momentum=False)
    torch.testing.assert_close(got, smmf.smmf(W, Gs, c)[-1].W, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_loses_at_most_twice_what_the_naive_formulas_lose(shape, within_budget):
    W, Gs, c = draw(*shape, seed=0).float(), [G.float() for G in gradients(shape)], smmf.Settings(eta=0.01)
    exact = smmf.smmf(W, Gs, c)[-1].W
    x = smmf.start(W)
    x = replace(
        x,
        W=W,
        r_M=x.r_M.float(),
        c_M=x.c_M.float(),
        r_V=x.r_V.float(),
        c_V=x.c_V.float(),
        S=x.S.float(),
    )
    for G in Gs:
        x = smmf.step(x, G, c)
    assert x.W.dtype == torch.float32
    for way in ("whole", "rows", "cols"):
        got, _ = eager_smmf(W, Gs, c, matrix=smmf.shape(W.numel()), way=way)
        within_budget(got, x.W, exact)


# ---- One step on random state ------------------------------------------------------------------------------


def one_task(
    rows,
    cols,
    *,
    param=torch.float32,
    grad=torch.float32,
    compute=torch.float32,
    mode="nearest",
    device="cpu",
):
    """One step in the middle of a run, on part of a larger tensor."""
    height, width = matrix_shape(rows * cols * 2)

    def make(*size, seed, dtype=compute):
        if device == "meta":
            return torch.empty(size, dtype=dtype, device=device)
        return draw(*size, seed=seed).to(dtype)

    W, G = make(rows, cols, seed=0, dtype=param), make(rows, cols, seed=1, dtype=grad)
    place = Place(base=rows * cols // 2, stride=cols)
    rest = torch.zeros_like(W) if mode == "kahan" else None
    numbers = torch.tensor([1, 0.9, 0.99, 0.1, 0.99, 0.01, 1e-8, 2, 3], dtype=compute)
    return SweepTask(
        param=W,
        grad=G,
        row_m=make(height, seed=2).abs(),
        col_m=make(width, seed=3).abs(),
        row_v=make(height, seed=4).abs(),
        col_v=make(width, seed=5).abs(),
        sign=torch.full((rows, -(-cols // 8)), 0x5A, dtype=torch.uint8, device=device),
        packed=True,
        coefficients=numbers.to(device),
        skip_zeros=True,
        place=place,
        sums=make(2 * (height + width) + 1, seed=6),
        rounding=Rounding(mode=mode, key=7, step=torch.ones((), device=device), place=place, rest=rest),
    )


@pytest.mark.parametrize("mode", ["stochastic", "kahan", "nearest"])
@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16])
def test_an_inactive_step_writes_nothing_but_zero_sums(param, mode):
    task, old = (one_task(9, 10, param=param, mode=mode) for _ in range(2))
    task.coefficients[0], task.coefficients[6] = 0, 0.0
    task.grad[0, 0], task.grad[1, 1] = float("nan"), float("inf")
    task.row_v.zero_()  # with eps 0: 0 / 0
    updates_eager.sweep([task])
    assert torch.equal(task.param, old.param)
    assert torch.equal(task.sign, old.sign)
    assert torch.equal(task.sums, torch.zeros_like(task.sums))


def test_zero_gradients_on_a_fresh_state_leave_zeros_behind():
    for eps in (1e-8, 0.0):
        task = one_task(9, 10)
        for factor in (task.row_m, task.col_m, task.row_v, task.col_v, task.grad, task.sign):
            factor.zero_()
        old = task.param.clone()
        task.coefficients[1:8] = torch.tensor([0.9, 0.0, 0.1, 1.0, 0.0, eps, 1.0])
        updates_eager.sweep([task])
        assert torch.equal(task.param, old)
        assert torch.equal(task.sums, torch.zeros_like(task.sums))
        assert not task.sign.any()


@pytest.mark.parametrize(
    ("param", "grad", "compute"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.float32),
    ],
)
def test_any_mixture_of_dtypes_is_computed_in_the_coefficients_dtype(param, grad, compute):
    task, exact = (one_task(13, 24, param=param, grad=grad, compute=compute) for _ in range(2))
    exact.param, exact.grad = exact.param.to(compute), exact.grad.to(compute)
    updates_eager.sweep([task])
    updates_eager.sweep([exact])
    assert torch.equal(task.param, exact.param.to(param))
    assert torch.equal(task.sign, exact.sign)
    assert torch.equal(task.sums, exact.sums)


@pytest.mark.parametrize("mode", ["stochastic", "kahan"])
def test_runs_repeat_bit_for_bit_and_parts_round_as_the_whole(mode, any_tiles):
    tasks = [one_task(40, 64, param=torch.bfloat16, grad=torch.bfloat16, mode=mode) for _ in range(3)]
    old = tasks[0].grad.clone()
    updates_eager.sweep(tasks[:2])
    for name in ("param", "sign", "sums"):
        assert torch.equal(getattr(tasks[0], name), getattr(tasks[1], name))
    assert torch.equal(tasks[0].grad, old)
    for rows, cols in cut((40, 64), "rows") + [(slice(0, 0), slice(0, 64))]:
        task = tasks[2]
        place = replace(task.place, base=task.place.base + rows.start * 64)
        rest = None if task.rounding.rest is None else task.rounding.rest[rows]
        part = replace(
            task,
            param=task.param[rows, cols],
            grad=task.grad[rows, cols],
            sign=task.sign[rows],
            place=place,
            rounding=replace(task.rounding, place=place, rest=rest),
        )
        updates_eager.sweep([part])
    assert torch.equal(tasks[2].param, tasks[0].param)
    assert torch.equal(tasks[2].sign, tasks[0].sign)


def test_sums_of_ten_million_elements_are_right_to_fp32_rounding():
    rows, cols = 3200, 3200
    task = one_task(rows, cols)
    task.coefficients[5] = 0
    height, width = len(task.row_v), len(task.col_v)
    k = rows * cols // 2 + torch.arange(rows * cols)
    i, j = k // width, k % width
    g = 2 * task.grad.flatten().double()
    beta2 = task.coefficients[2].double()
    v = beta2 * task.row_v[i].double() * task.col_v[j].double() + (1 - beta2) * g * g
    updates_eager.sweep([task])
    row = torch.zeros(height, dtype=torch.float64).index_add(0, i, v)
    col = torch.zeros(width, dtype=torch.float64).index_add(0, j, v)
    ulp = 2.0**-24
    got_row, got_col, square = task.sums[height + width :].double().split([height, width, 1])
    # Each v is some roundings wrong; a sum of positive numbers must not be much worse than one of them.
    assert ((got_row - row).abs() / row.clamp(min=1e-30)).max() < 8 * ulp
    assert ((got_col - col).abs() / col).max() < 8 * ulp
    assert abs(square.item() / (g * g).sum().item() - 1) < 4 * ulp


@pytest.mark.parametrize(
    ("shape", "param"),
    [
        ((1 << 13, 1 << 12), torch.float32),
        ((1 << 12, (1 << 13) - 3), torch.bfloat16),
        ((2, 1 << 24), torch.bfloat16),
    ],
)
def test_no_value_is_read_and_temporaries_stay_small(shape, param, peak_bytes):
    # Tensors on "meta" have no values, so reading one raises.
    task = one_task(*shape, param=param, grad=param, mode="stochastic", device="meta")
    assert 1 << 20 < peak_bytes(lambda: updates_eager.sweep([task])) <= 64 << 20
