"""The eager back end against the reference twins, step by step, on tensors cut into uneven parts.

SMMF's sweep has a file of its own, `test_updates_eager_sweep.py`.
"""

from dataclasses import replace

import pytest
import torch

from hardy.ops import philox, updates_eager
from hardy.ops.updates import AdamTask, FillTask, MomentTask, Place, Rounding, ScaleTask, SketchTask
from hardy.reference import adaptive, apollo

SHAPES = [(96, 40), (40, 96), (33, 33), (1, 101), (101, 1), (7, 13)]
STEPS = 24
B1, B2 = (torch.tensor(beta).item() for beta in (0.9, 0.999))
"""As fp32 holds them: a coefficient tensor cannot hold more, and the twin is given the same."""


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def nearest(stride, base=0):
    return Rounding(mode="nearest", key=0, step=torch.tensor(0.0), place=Place(base=base, stride=stride))


def uneven(rows):
    """Borders of uneven ranges of rows, one of them empty."""
    return sorted({0, min(1, rows), min(5, rows), rows} | {rows // 2}) + [rows]


def parts_of(rows):
    borders = uneven(rows)
    return [slice(a, b) for a, b in zip(borders, borders[1:], strict=False)]


# ---- AdamW -------------------------------------------------------------------------------------------------


def eager_adamw(W, gs, *, eta, eps, lam, scaled=1.0):
    W = W.clone()
    m, v = torch.zeros_like(W), torch.zeros_like(W)
    for t, g in enumerate(gs, start=1):
        numbers = [1, B1, B2, eta / (1 - B1**t), (1 - B2**t) ** -0.5, eps, 1 - eta * lam, 0, 1 / scaled]
        for part in parts_of(len(W)):
            task = AdamTask(
                param=W[part],
                grad=(g * scaled).to(W.dtype)[part],
                exp_avg=m[part],
                exp_avg_sq=v[part],
                coefficients=torch.tensor(numbers, dtype=W.dtype),
                rounding=nearest(W.shape[1]),
            )
            updates_eager.adam([task])
    return W


@pytest.mark.parametrize("shape", SHAPES)
def test_adam_is_its_twin(shape, any_tiles, within_budget):
    letters = {"eta": 0.01, "eps": 1e-8, "lam": 0.1}
    W, gs = draw(*shape, seed=0), [draw(*shape, seed=t) for t in range(1, STEPS + 1)]
    exact = adaptive.adamw(W, gs, b1=B1, b2=B2, **letters)[-1]
    torch.testing.assert_close(eager_adamw(W, gs, **letters), exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(eager_adamw(W, gs, **letters, scaled=8.0), exact, rtol=0, atol=1e-12)
    naive = torch.nn.Parameter(W.float())
    torch_adam = torch.optim.AdamW(
        [naive], lr=0.01, betas=(B1, B2), eps=1e-8, weight_decay=0.1, foreach=False
    )
    for g in gs:
        naive.grad = g.float()
        torch_adam.step()
    low = [g.float().double() for g in gs]
    exact = adaptive.adamw(W.float(), low, b1=B1, b2=B2, **letters)[-1]
    within_budget(eager_adamw(W.float(), low, **letters), naive.detach(), exact)


def test_adam_adds_l2_to_the_gradient():
    W, g = draw(6, 5, seed=0), draw(6, 5, seed=1)
    wanted = adaptive.adamw(W, [g + 0.3 * W], eta=0.1, b1=B1, b2=B2, eps=1e-8, lam=0.0)[-1]
    got, m, v = W.clone(), torch.zeros_like(W), torch.zeros_like(W)
    numbers = [1, B1, B2, 0.1 / (1 - B1), (1 - B2) ** -0.5, 1e-8, 1, 0.3, 1]
    coefficients = torch.tensor(numbers, dtype=torch.float64)
    task = AdamTask(
        param=got, grad=g, exp_avg=m, exp_avg_sq=v, coefficients=coefficients, rounding=nearest(5)
    )
    updates_eager.adam([task])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


# ---- APOLLO ------------------------------------------------------------------------------------------------


def eager_apollo(W, Gs, projection, c):
    """Drive the sweeps as an optimizer would, W in parts of rows; between them the twin's formulas."""
    W, dtype = W.clone(), W.dtype
    tall = W.shape[0] >= W.shape[1]
    r, nu, t = projection(0).shape[0], 0.0, 0
    M = torch.zeros((W.shape[0], r) if tall else (r, W.shape[1]), dtype=dtype)
    V = torch.zeros_like(M)
    for k, G in enumerate(Gs, start=1):
        G, P_KR = G.to(dtype), projection((k - 1) // c.T).T.to(dtype).contiguous()
        R, c2 = eager_sketch(G, P_KR, tall=tall)
        S2 = c2.double().sum().item()
        active = float(0 < S2 < float("inf"))
        numbers = torch.tensor([active, c.b1, c.b2, c.eps, r**-0.5], dtype=dtype)
        before, after = torch.empty_like(c2), torch.empty_like(c2)
        updates_eager.moments(
            [
                MomentTask(
                    sketch=R,
                    exp_avg=M,
                    exp_avg_sq=V,
                    channels="rows" if tall else "cols",
                    coefficients=numbers,
                    before=before,
                    after=after,
                )
            ]
        )
        if c.scale_type == "tensor":
            before, after = before.sum().view(1), after.sum().view(1)
        s = torch.where(before > 0, (after / before).sqrt(), 0.0)
        t += int(active)
        bc = (1 - c.b2**t) ** 0.5 / (1 - c.b1**t) if t and c.bias_correction else 1.0
        norm = c.alpha * (s * s * c2).sum().sqrt().item() * (bc if c.limiter == "corrected" else 1.0)
        L = max(norm / (c.gamma * nu), 1.0) if c.limiter != "off" and nu > 0 else 1.0
        nu = norm / L if active and norm > 0 else nu
        factor = active * torch.nan_to_num(c.eta * bc * c.alpha / L * s)
        keep = torch.tensor([1 - c.eta * c.lam * active], dtype=dtype)
        eager_scale(W, G, factor, keep, along="all" if len(factor) < len(c2) else "rows" if tall else "cols")
    return W


def eager_sketch(G, P_KR, *, tall):
    sketches, squares = [], []
    for part in parts_of(len(G)):
        P = P_KR if tall else P_KR[part]
        size = (part.stop - part.start, P.shape[1]) if tall else (P.shape[1], G.shape[1])
        sketches.append(torch.full(size, float("nan"), dtype=G.dtype))
        squares.append(torch.full((size[0] if tall else size[1],), float("nan"), dtype=G.dtype))
        contracts = "cols" if tall else "rows"
        task = SketchTask(
            grad=G[part], projection_KR=P, contracts=contracts, sketch=sketches[-1], squares=squares[-1]
        )
        updates_eager.sketch([task])
    if tall:
        return torch.cat(sketches), torch.cat(squares)
    return sum(sketches), sum(squares)


def eager_scale(W, G, factor, keep, *, along):
    tasks = [
        ScaleTask(
            param=W[part],
            grad=G[part],
            factor=factor[part] if along == "rows" else factor,
            along=along,
            keep=keep,
            rounding=nearest(W.shape[1]),
        )
        for part in parts_of(len(W))
    ]
    updates_eager.scale(tasks)


SETTINGS = [
    pytest.param(apollo.Settings(eta=0.01, b1=B1, b2=B2, lam=0.1, T=5), 4, id="channel"),
    pytest.param(
        apollo.Settings(eta=0.01, b1=B1, b2=B2, T=5, scale_type="tensor", alpha=11.0, limiter="corrected"),
        1,
        id="mini",
    ),
    pytest.param(
        apollo.Settings(eta=0.01, b1=B1, b2=B2, limiter="off", bias_correction=False), 3, id="plain"
    ),
]


def naive_apollo(W, Gs, projection, c):
    """The twin's formulas on whole matrices in fp32."""
    x = apollo.start(W, r=projection(0).shape[0])
    x = replace(x, W=x.W.float(), M=x.M.float(), V=x.V.float())
    for k, G in enumerate(Gs, start=1):
        x = apollo.step(x, G, projection((k - 1) // c.T).float(), c)
    return x.W


@pytest.mark.parametrize(("c", "r"), SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_apollo_is_its_twin(shape, c, r, any_tiles, within_budget):
    r = min(r, *shape)
    W, Gs = draw(*shape, seed=0), [draw(*shape, seed=t) for t in range(1, STEPS + 1)]
    Gs[7] = torch.zeros_like(W)
    Gs[11] = 50 * Gs[11]  # for the limiter
    Gs[13] = torch.full_like(W, float("nan"))
    if min(shape) > 1:
        Gs[4][0], Gs[4][:, 0] = 0, 0  # a channel without gradient

    def raw(epoch):
        return draw(r, min(shape), seed=100 + epoch)

    def projection(epoch):
        return raw(epoch) / r**0.5

    exact = apollo.apollo(W, Gs, projection, c)[-1].W
    torch.testing.assert_close(eager_apollo(W, Gs, raw, c), exact, rtol=0, atol=1e-12)
    low = [G.float() for G in Gs]
    exact = apollo.apollo(W.float(), low, lambda e: raw(e).float().double() / r**0.5, c)[-1].W
    within_budget(eager_apollo(W.float(), low, raw, c), naive_apollo(W.float(), low, projection, c), exact)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("contracts", ["rows", "cols"])
@pytest.mark.parametrize("shape", [(3, 5000), (5000, 3), (130, 170), (1, 1), (0, 4), (4, 0)])
def test_sketch_of_any_shape(shape, contracts, rank, any_tiles):
    G = draw(*shape, seed=0)
    P = draw(shape[1] if contracts == "cols" else shape[0], rank, seed=1)
    wanted = G @ P if contracts == "cols" else P.T @ G
    axis = 1 if contracts == "cols" else 0
    sketch, squares = torch.full_like(wanted, float("nan")), torch.full((shape[1 - axis],), float("nan"))
    squares = squares.double()
    updates_eager.sketch(
        [SketchTask(grad=G, projection_KR=P, contracts=contracts, sketch=sketch, squares=squares)]
    )
    torch.testing.assert_close(sketch, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(squares, (G * G).sum(axis), rtol=1e-13, atol=0)


# ---- What holds for every sweep ----------------------------------------------------------------------------


def tasks_of(
    shape,
    *,
    param=torch.float32,
    grad=torch.float32,
    compute=torch.float32,
    mode="nearest",
    rank=2,
    device="cpu",
):
    """One task for each sweep on the same data."""
    rows, cols = shape

    def make(*size, seed, dtype=compute):
        if device == "meta":
            return torch.empty(size, dtype=dtype, device=device)
        return draw(*size, seed=seed).to(dtype)

    W, G = make(*shape, seed=0, dtype=param), make(*shape, seed=1, dtype=grad)
    rest = torch.zeros_like(W) if mode == "kahan" else None
    step = torch.ones((), device=device)
    rounding = Rounding(mode=mode, key=5, step=step, place=Place(base=3 * cols, stride=cols), rest=rest)

    def numbers(*values):
        return make(len(values), seed=0) if device == "meta" else torch.tensor(values, dtype=compute)

    m, v = make(*shape, seed=2), make(*shape, seed=3).abs()
    adam = AdamTask(
        param=W,
        grad=G,
        exp_avg=m,
        exp_avg_sq=v,
        coefficients=numbers(1, 0.9, 0.99, 0.1, 1.2, 1e-8, 0.99, 0.01, 2),
        rounding=rounding,
    )
    factor = make(rows, seed=4)
    scale = ScaleTask(param=W, grad=G, factor=factor, along="rows", keep=numbers(0.99), rounding=rounding)
    sketch = SketchTask(
        grad=G,
        projection_KR=make(cols, rank, seed=5),
        contracts="cols",
        sketch=make(rows, rank, seed=0),
        squares=make(rows, seed=0),
    )
    moments = MomentTask(
        sketch=make(rows, rank, seed=6),
        exp_avg=make(rows, rank, seed=7),
        exp_avg_sq=make(rows, rank, seed=8).abs(),
        channels="rows",
        coefficients=numbers(1, 0.9, 0.99, 1e-6, 2),
        before=make(rows, seed=0),
        after=make(rows, seed=0),
    )
    return {"adam": adam, "scale": scale, "sketch": sketch, "moments": moments}


SWEEPS = ["adam", "scale", "sketch", "moments"]
MIXTURES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.float16, torch.float32),
    (torch.float64, torch.float64, torch.float64),
    (torch.float64, torch.float32, torch.float64),
    (torch.float32, torch.float64, torch.float32),
]


@pytest.mark.parametrize("sweep", ["adam", "scale"])
@pytest.mark.parametrize(("param", "grad", "compute"), MIXTURES)
def test_any_mixture_of_dtypes_is_computed_in_the_coefficients_dtype(param, grad, compute, sweep):
    task = tasks_of((13, 11), param=param, grad=grad, compute=compute)[sweep]
    exact = tasks_of((13, 11), param=param, grad=grad, compute=compute)[sweep]
    exact.param, exact.grad = exact.param.to(compute), exact.grad.to(compute)
    getattr(updates_eager, sweep)([task])
    getattr(updates_eager, sweep)([exact])
    assert torch.equal(task.param, exact.param.to(param))


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("mode", ["stochastic", "kahan"])
def test_runs_repeat_bit_for_bit_and_leave_gradients_alone(sweep, mode, any_tiles):
    first, second = (
        tasks_of((70, 90), param=torch.bfloat16, grad=torch.bfloat16, mode=mode)[sweep] for _ in range(2)
    )
    for task in (first, second):
        getattr(updates_eager, sweep)([task])
    for name in ("param", "exp_avg", "exp_avg_sq", "sketch", "squares", "before", "after"):
        if hasattr(first, name):
            assert torch.equal(getattr(first, name), getattr(second, name))
    if hasattr(first, "grad"):
        assert torch.equal(first.grad, tasks_of((70, 90), grad=torch.bfloat16)[sweep].grad)


@pytest.mark.parametrize("mode", ["stochastic", "kahan"])
@pytest.mark.parametrize("sweep", ["adam", "scale"])
def test_parts_of_a_bf16_weight_round_as_the_whole(sweep, mode, any_tiles):
    whole = tasks_of((20, 30), param=torch.bfloat16, grad=torch.bfloat16, mode=mode)[sweep]
    cut = tasks_of((20, 30), param=torch.bfloat16, grad=torch.bfloat16, mode=mode)[sweep]
    getattr(updates_eager, sweep)([whole])
    pieces = [(slice(0, 7), slice(0, 30)), (slice(7, 20), slice(0, 11)), (slice(7, 20), slice(11, 30))]
    for rows, cols in pieces:
        part = replace(cut, param=cut.param[rows, cols], grad=cut.grad[rows, cols])
        if sweep == "adam":
            part.exp_avg, part.exp_avg_sq = cut.exp_avg[rows, cols], cut.exp_avg_sq[rows, cols]
        else:
            part.factor = cut.factor[rows]
        place = Place(base=(3 + rows.start) * 30 + cols.start, stride=30)
        rest = None if cut.rounding.rest is None else cut.rounding.rest[rows, cols]
        part.rounding = replace(cut.rounding, place=place, rest=rest)
        getattr(updates_eager, sweep)([part])
    assert torch.equal(cut.param, whole.param)
    assert not torch.equal(whole.param, tasks_of((20, 30), param=torch.bfloat16)[sweep].param)


@pytest.mark.parametrize("mode", ["stochastic", "kahan", "nearest"])
def test_an_inactive_step_writes_nothing(mode):
    for param in (torch.float32, torch.bfloat16):
        task, old = (tasks_of((9, 10), param=param, mode=mode)["adam"] for _ in range(2))
        task.coefficients[0], task.coefficients[5] = 0, 0.0  # not active; eps 0
        task.grad[0, 0], task.exp_avg[1, 1], task.exp_avg_sq[1, 1] = float("nan"), 0, 0  # 0 / 0
        old.exp_avg[1, 1], old.exp_avg_sq[1, 1] = 0, 0
        updates_eager.adam([task])
        for name in ("param", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(task, name), getattr(old, name))


def test_inactive_moments_do_not_read_the_sketch():
    task, old = (tasks_of((9, 10))["moments"] for _ in range(2))
    task.coefficients[0], task.sketch[:] = 0, float("nan")
    updates_eager.moments([task])
    assert torch.equal(task.exp_avg, old.exp_avg)
    assert torch.equal(task.exp_avg_sq, old.exp_avg_sq)
    assert torch.equal(task.before, torch.zeros(9))
    assert torch.equal(task.after, torch.zeros(9))


@pytest.mark.parametrize("along", ["rows", "cols", "all"])
def test_a_factor_of_zero_does_not_look_at_the_gradient(along):
    task = tasks_of((4, 5))["scale"]
    before = task.param.clone()
    task.along, task.keep = along, torch.ones(1)
    task.factor = torch.zeros({"rows": 4, "cols": 5, "all": 1}[along])
    task.grad[1, 2] = float("nan")
    if along == "rows":
        task.factor[3] = 2.0
    updates_eager.scale([task])
    if along == "rows":
        before[3] -= 2 * task.grad[3]
    assert torch.equal(task.param, before)


@pytest.mark.parametrize("name", ["normals", "signs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fills_with_the_numbers_of_a_flat_range(name, dtype, monkeypatch):
    monkeypatch.setattr(updates_eager, "_NUMBERS_AT_ONCE", 100)
    out = torch.empty(7, 43, dtype=dtype)
    distribution = {"normals": "normal", "signs": "rademacher"}[name]
    updates_eager.fill([FillTask(out=out, distribution=distribution, key=99, start=5, epoch=2, slice=3)])
    wanted = getattr(philox, name)(99, start=5, count=301, third=2, fourth=3)
    assert torch.equal(out.flatten(), wanted.to(dtype))


# ---- What a device must not be asked, and memory -----------------------------------------------------------


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize(("param", "grad", "compute"), [MIXTURES[0], MIXTURES[1], MIXTURES[5]])
def test_no_value_is_read_and_temporaries_stay_small(sweep, param, grad, compute, peak_bytes):
    # Tensors on "meta" have no values, so reading one raises; 64 to 256 MiB of them cost nothing.
    dtypes = {"param": param, "grad": grad, "compute": compute}
    task = tasks_of((1 << 13, 1 << 12), **dtypes, mode="stochastic", rank=1 << 12, device="meta")[sweep]
    assert 1 << 20 < peak_bytes(lambda: getattr(updates_eager, sweep)([task])) <= 64 << 20
