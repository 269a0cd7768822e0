"""Where the low-memory optimizers must be something else: their twins, Adam, themselves in another guise."""

import copy
import math

import pytest
import torch
from torch import nn

from hardy.ops.factorize import matrix_shape
from hardy.ops.philox import key_for, normals, signs, words
from hardy.optim.optimizers import APOLLO, SMMF, AdaptiveAdamW, APOLLOMini
from hardy.reference import adaptive as adaptive_twin
from hardy.reference import apollo as apollo_twin
from hardy.reference import smmf as smmf_twin

STEPS = 24
SHAPES = {
    "tall": (13, 6),
    "wide": (5, 16),
    "square": (8, 8),
    "row": (1, 9),
    "column": (11, 1),
    "prime": (101, 3),
}


def weight_and_gradients(shape, *, seed=0, eventful=True):
    """Return a weight and 24 fp64 gradients; eventful ones begin with zero, have a spike and zero entries."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(STEPS)]
    if eventful:
        grads[0].zero_()
        grads[9].mul_(100.0)
        grads[15].zero_()
        for grad in grads[3:12]:
            grad.view(-1)[::3] = 0.0
    return weight, grads


def run(make, weight, grads, *, dtype, **settings):
    """Return the weights after each gradient."""
    param = nn.Parameter(weight.to(dtype, copy=True))
    optimizer = make([("weight", param)], **settings)
    weights = []
    for grad in grads:
        param.grad = grad.to(dtype)
        optimizer.step()
        weights.append(param.detach().clone())
    return weights


def compare(make, twin, naive, weight, grads, *, factor=3.0):
    """Hold our weights against the twin: in fp64 to 1e-12, in fp32 within what naive fp32 loses."""
    exact = torch.stack(twin)
    far = (torch.stack(run(make, weight, grads, dtype=torch.float64)) - exact).abs().max()
    assert far <= 1e-12 * exact.abs().max(), far
    theirs = (torch.stack(naive).double() - exact).abs().max()
    for backend in ("foreach", "auto"):
        ours = torch.stack(run(make, weight, grads, dtype=torch.float32, backend=backend)).double()
        assert (ours - exact).abs().max() <= factor * theirs + 1e-12, backend


def gaussian(rank, contracted, draw=normals):
    """Return the projection of an epoch by the documented counters, scaled as it multiplies."""
    key = key_for(0, "weight", purpose="hardy.proj.v1")

    def projection(epoch):
        flat = draw(key, start=0, count=contracted * rank, third=epoch)
        return flat.view(contracted, rank).T.double() / math.sqrt(rank)

    return projection


APOLLOS = {
    "channel": {},
    "tensor": {"scale_type": "tensor", "alpha": 2.0},
    "corrected": {"limiter": "corrected", "gamma": 1.5},
    "no limiter": {"limiter": "off", "lam": 0.1},
    "decay": {"zero_grad": "decay", "lam": 0.1, "alpha": 0.5},
    "uncorrected": {"bias_correction": False, "b1": 0.5, "b2": 0.9},
}
"""Letters of the twin beside eta = 0.01."""


@pytest.mark.parametrize("letters", APOLLOS)
@pytest.mark.parametrize("shape", SHAPES)
def test_apollo_is_its_twin(shape, letters):
    weight, grads = weight_and_gradients(SHAPES[shape])
    settings = apollo_twin.Settings(eta=0.01, T=5, **APOLLOS[letters])
    rank = min(3, *SHAPES[shape])
    projection = gaussian(rank, min(SHAPES[shape]))

    def make(named, **backend):
        return APOLLO(
            named,
            lr=settings.eta,
            betas=(settings.b1, settings.b2),
            eps=settings.eps,
            weight_decay=settings.lam,
            rank=3,
            scale=settings.alpha,
            scale_type=settings.scale_type,
            limiter=settings.limiter,
            limiter_gamma=settings.gamma,
            zero_grad=settings.zero_grad,
            bias_correction=settings.bias_correction,
            update_proj_gap=settings.T,
            **backend,
        )

    exact = apollo_twin.apollo(weight, grads, projection, settings)
    x = apollo_twin.start(weight, r=rank)
    state = apollo_twin.State(W=x.W.float(), M=x.M.float(), V=x.V.float())
    naive = []
    for k, grad in enumerate(grads):
        state = apollo_twin.step(state, grad, projection(k // 5).float(), settings)
        naive.append(state.W)
    compare(make, [x.W for x in exact], naive, weight, grads)


def test_apollo_mini_and_random_signs_are_their_twins():
    weight, grads = weight_and_gradients((6, 13))
    for proj, draw in (("normal", normals), ("rademacher", signs)):
        settings = apollo_twin.mini(eta=0.01)
        twin = apollo_twin.apollo(weight, grads, gaussian(1, 6, draw), settings)
        ours = run(
            lambda named, p=proj: APOLLOMini(named, lr=0.01, proj=p), weight, grads, dtype=torch.float64
        )
        torch.testing.assert_close(ours[-1], twin[-1].W, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["gram", "exact"])
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_apollo_svd_is_its_twin(shape, method):
    weight, grads = weight_and_gradients(SHAPES[shape], eventful=False)
    settings = apollo_twin.Settings(eta=0.01, T=5)
    twin = apollo_twin.apollo(weight, grads, lambda e: apollo_twin.svd_basis(grads[5 * e], 3), settings)

    def make(named):
        return APOLLO(named, lr=0.01, rank=3, update_proj_gap=5, proj="svd", svd_method=method)

    ours = run(make, weight, grads, dtype=torch.float64)
    torch.testing.assert_close(ours[-1], twin[-1].W, rtol=1e-10, atol=1e-10)


SMMFS = {
    "masked": {},
    "as published": {"mask": False},
    "no momentum": {"beta": None},
    "l2": {"decay": "l2", "lam": 0.1, "beta1_floor": 0.5, "growth": 0.9},
    "limited": {"max_update": 0.3, "lam": 0.1, "gamma": -0.5},
}
"""Letters of the twin beside eta = 0.01."""


@pytest.mark.parametrize("letters", SMMFS)
@pytest.mark.parametrize("shape", [(12, 6), (1, 9), (101, 3), (7, 5, 3), (101,), ()], ids=str)
def test_smmf_is_its_twin(shape, letters):
    weight, grads = weight_and_gradients(shape)
    settings = smmf_twin.Settings(eta=0.01, **SMMFS[letters])
    matrix = matrix_shape(max(1, weight.numel()), policy="virtual" if shape == (101,) else "exact")

    def make(named, **backend):
        return SMMF(
            named,
            lr=settings.eta,
            beta1=settings.beta,
            weight_decay=settings.lam,
            decay_rate=settings.gamma,
            growth_rate=settings.growth,
            weight_decay_mode=settings.decay,
            beta1_floor=settings.beta1_floor,
            max_update=None if settings.max_update == math.inf else settings.max_update,
            mask_zero_grad=settings.mask,
            shape_policy="virtual" if shape == (101,) else "exact",
            **backend,
        )

    exact = smmf_twin.smmf(weight, grads, settings, matrix=matrix)
    x = smmf_twin.start(weight, matrix=matrix)
    factors = {key: getattr(x, key).float() for key in ("W", "r_M", "c_M", "r_V", "c_V", "S")}
    state = smmf_twin.State(**factors)
    naive = []
    for grad in grads:
        state = smmf_twin.step(state, grad, settings)
        naive.append(state.W)
    compare(make, [x.W for x in exact], naive, weight, grads)


def test_smmf_with_dense_vectors_is_the_dense_recursion():
    weight, grads = weight_and_gradients((9,), eventful=False)
    settings = smmf_twin.Settings(eta=0.01, lam=0.1)
    ours = run(
        lambda named: SMMF(named, lr=0.01, weight_decay=0.1, vector_reshape=False),
        weight,
        grads,
        dtype=torch.float64,
    )
    torch.testing.assert_close(ours[-1], smmf_twin.dense(weight, grads, settings)[-1], rtol=1e-12, atol=1e-12)


def test_smmf_of_a_slice_is_smmf_of_the_matrix():
    weight, grads = weight_and_gradients((3, 4, 6))
    stack = run(lambda named: SMMF(named, lr=0.01, per_slice=True), weight, grads, dtype=torch.float64)
    for level in range(3):
        alone = run(lambda n: SMMF(n, lr=0.01), weight[level], [g[level] for g in grads], dtype=torch.float64)
        torch.testing.assert_close(stack[-1][level], alone[-1], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adaptive_adamw_is_torchs_adamw_and_its_twin(weight_decay):
    weight, grads = weight_and_gradients((13, 6), eventful=False)
    letters = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    twin = adaptive_twin.adamw(weight, grads, eta=0.01, b1=0.8, b2=0.95, eps=1e-6, lam=weight_decay)

    def torchs(named):
        return torch.optim.AdamW([param for _, param in named], **letters)

    naive = run(torchs, weight, grads, dtype=torch.float32)
    compare(lambda named, **backend: AdaptiveAdamW(named, **letters, **backend), twin, naive, weight, grads)
    theirs = run(torchs, weight, grads, dtype=torch.float64)
    torch.testing.assert_close(torch.stack(twin), torch.stack(theirs), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("shape", [(1, 9), (11, 1)], ids=["row", "column"])
def test_apollo_of_rank_one_on_one_row_is_adam(shape, beta1):
    """Equal in magnitude where |P| is 1; with beta1 = 0 the gradient's sign is Adam's too."""
    weight, grads = weight_and_gradients(shape, eventful=False)
    betas = (beta1, 0.99)
    ours = run(
        lambda named: APOLLO(named, lr=0.01, betas=betas, eps=0.0, rank=1, limiter="off", proj="rademacher"),
        weight,
        grads,
        dtype=torch.float64,
    )
    theirs = run(
        lambda named: torch.optim.Adam([p for _, p in named], lr=0.01, betas=betas, eps=0.0),
        weight,
        grads,
        dtype=torch.float64,
    )
    moved, wanted = (torch.stack([weight, *weights]).diff(dim=0) for weights in (ours, theirs))
    torch.testing.assert_close(moved.abs(), wanted.abs(), rtol=1e-9, atol=1e-13)
    assert torch.equal(moved.sign(), -torch.stack(grads).sign())
    if beta1 == 0.0:
        torch.testing.assert_close(moved, wanted, rtol=1e-9, atol=1e-13)
    else:
        assert not torch.equal(moved.sign(), wanted.sign())


class TwoLayers(nn.Module):
    """An input projection has no gradient while the output projection is zero; random features do not do."""

    def __init__(self, *, seed, zero):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.up = nn.Parameter(torch.randn(6, 8, generator=generator))
        self.down = nn.Parameter(torch.randn(4, 6, generator=generator) * (0.0 if zero else 1.0))

    def forward(self, x):
        return torch.tanh(x @ self.up.T) @ self.down.T


def learn(make, *, zero, freeze=False):
    """Return the mean loss of the last 20 of 150 steps."""
    model, teacher = TwoLayers(seed=1, zero=zero), TwoLayers(seed=0, zero=False)
    optimizer = make(model.named_parameters())
    losses = []
    for step in range(150):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (model(x) - teacher(x).detach()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if freeze and step == 0:
            optimizer.state[model.up]["limiter_norm"].fill_(1e-8)  # what the released code remembers
    return sum(losses[-20:]) / 20


@pytest.mark.parametrize(
    "make",
    [
        lambda named: APOLLO(named, lr=0.02, rank=4),
        lambda named: APOLLO(named, lr=0.02, rank=4, proj="svd", update_proj_gap=10),
        lambda named: APOLLOMini(named, lr=0.02, scale=2.0),
    ],
    ids=["apollo", "svd", "mini"],
)
def test_output_projections_that_begin_at_zero_learn_as_fast(make):
    assert learn(make, zero=True) < 1.02 * learn(make, zero=False)
    assert learn(make, zero=True, freeze=True) > 1.5 * learn(make, zero=False)


class Branches(nn.Module):
    """A branch that only some batches take; its weights get no gradient in the others."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"tall": (12, 6), "wide": (6, 12), "side": (6, 6), "bias": (6,)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, x, *, side):
        y = torch.tanh(x @ self.tall.T) @ self.wide.T + self.bias
        return (y @ self.side if side else y).square().mean()


def mixed(model):
    named = dict(model.named_parameters())
    kinds = {"tall": "apollo", "wide": "apollo", "side": "smmf", "bias": "adamw"}
    return APOLLO(
        [{"params": [(n, p)], "kind": kinds[n]} for n, p in named.items()], lr=0.02, update_proj_gap=2
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        mixed,
        lambda model: AdaptiveAdamW(model.named_parameters(), lr=0.02),
        lambda model: SMMF(model.named_parameters(), lr=0.02),
    ],
    ids=["mixed", "adamw", "smmf"],
)
def test_released_gradients_give_the_bits_of_the_ordinary_step(make, accumulate):
    """With a schedule, accumulation, and weights that some batches leave out."""
    ends = []
    for released in (False, True):
        model = Branches()
        optimizer = make(model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        if released:
            optimizer.enable_release(model, accumulation_steps=accumulate)
        for step in range(6):
            for micro in range(accumulate):
                x = torch.randn(5, 6, generator=torch.Generator().manual_seed(10 * step + micro))
                model(x, side=(step + micro) % 3 == 0).backward()
            assert not released or all(p.grad is None for p in (model.tall, model.wide, model.bias))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        ends.append((model.state_dict(), copy.deepcopy(optimizer.state_dict())))
    for name, value in ends[0][0].items():
        assert torch.equal(value, ends[1][0][name]), name
    assert ends[0][1]["param_groups"] == ends[1][1]["param_groups"]
    torch.testing.assert_close(ends[0][1]["state"], ends[1][1]["state"], rtol=0, atol=0)


ROUNDED = {
    "adamw": lambda named, **kw: AdaptiveAdamW(named, **kw),
    "smmf": lambda named, **kw: SMMF(named, **kw),
    "apollo": lambda named, **kw: APOLLO(named, rank=2, proj="rademacher", **kw),
}
"""Random signs are exact in bf16, so the step in fp32 is that of fp32 weights."""


@pytest.mark.parametrize("backend", ["foreach", "auto"])
@pytest.mark.parametrize(
    ("rule", "shape"),
    [(rule, shape) for rule in ROUNDED for shape in [(6, 10), (3, 4, 5)]] + [("adamw", (7,)), ("smmf", (7,))],
    ids=str,
)
def test_bf16_weights_are_fp32_weights_rounded_by_the_documented_numbers(rule, shape, backend):
    """Words are those of (seed, name, step, flat index)."""
    generator = torch.Generator().manual_seed(0)
    low = nn.Parameter(torch.randn(shape, generator=generator).bfloat16())
    wide = nn.Parameter(low.detach().float())
    optimizers = [ROUNDED[rule]([("weight", p)], lr=0.02, backend=backend, seed=3) for p in (low, wide)]
    key = key_for(3, "weight", purpose="hardy.sr.v1")
    for step in range(1, 4):
        low.grad = torch.randn(shape, generator=generator).bfloat16()
        wide.grad = low.grad.float()
        for optimizer in optimizers:
            optimizer.step()
        bits = words(key, start=0, count=low.numel(), third=step).view(shape) >> 16
        rounded = (wide.detach().view(torch.int32) + bits.int()) & -0x10000
        assert torch.equal(low.detach().float(), rounded.view(torch.float32)), step
        wide.data.copy_(low.detach())
