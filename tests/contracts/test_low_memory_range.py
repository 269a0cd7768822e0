"""What every low-memory optimizer promises about numbers.

Gradients of any size in range keep weights finite; bf16 weights take in updates far below their spacing.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.optim.optimizers import APOLLO, SMMF, AdaptiveAdamW, APOLLOMini

RULES = {
    "adamw": lambda named, **kw: AdaptiveAdamW(named, **kw),
    "apollo": lambda named, **kw: APOLLO(named, rank=2, update_proj_gap=2, **kw),
    "apollo, corrected": lambda named, **kw: APOLLO(named, rank=9, limiter="corrected", **kw),
    "apollo, no limiter": lambda named, **kw: APOLLO(named, rank=1, limiter="off", zero_grad="decay", **kw),
    "apollo, svd": lambda named, **kw: APOLLO(named, rank=2, proj="svd", update_proj_gap=2, **kw),
    "apollo mini": lambda named, **kw: APOLLOMini(named, **kw),
    "smmf": lambda named, **kw: SMMF(named, **kw),
    "smmf, no mask": lambda named, **kw: SMMF(named, mask_zero_grad=False, per_slice=True, **kw),
    "smmf, no momentum": lambda named, **kw: SMMF(named, beta1=None, growth_rate=1.0, **kw),
}
exponents = st.integers(-30, 15)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=25, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    steps=st.lists(st.tuples(exponents, exponents), min_size=2, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    backend=st.sampled_from(["foreach", "auto"]),
)
def test_gradients_of_any_size_keep_weights_finite(rule, shape, steps, dtype, backend):
    """Each step has a scale for its first row and one for the others, so single channels swell and vanish."""
    generator = torch.Generator().manual_seed(sum(shape))
    param = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    optimizer = RULES[rule]([("weight", param)], lr=0.01, backend=backend)
    for first, others in steps:
        grad = torch.randn(shape, generator=generator)
        grad[:1] *= 10.0**first
        grad[1:] *= 10.0**others
        param.grad = grad.to(dtype)
        optimizer.step()
        assert param.isfinite().all()
    state = [value for value in optimizer.state[param].values() if value.is_floating_point()]
    assert all(value.isfinite().all() for value in state)


@pytest.mark.parametrize("mode", ["stochastic", "kahan", "nearest"])
@pytest.mark.parametrize("entry", ["adamw", "apollo", "apollo mini", "smmf"])
def test_bf16_weights_take_in_updates_below_half_their_spacing(entry, mode):
    """Weights of 1, where bf16 has steps of 2^-7, moved up by less than 2^-9 a step."""
    cls = {"adamw": AdaptiveAdamW, "apollo": APOLLO, "apollo mini": APOLLOMini, "smmf": SMMF}[entry]
    settings = {"rank": 4} if cls is APOLLO else {}

    def run(dtype, lr, steps):
        param = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
        optimizer = cls([("weight", param)], lr=lr, weight_decay=0.0, bf16_update=mode, **settings)
        for _ in range(steps):
            param.grad = -torch.ones_like(param)
            optimizer.step()
        return param.detach().double() - 1

    lr = 1e-3 * 40 / float(run(torch.float64, 1e-3, 40).mean()) * 1e-3  # 40 steps of 1e-3 in the mean
    exact = run(torch.float64, lr, 40).mean()
    moved = run(torch.bfloat16, lr, 40)
    assert 0.039 < exact < 0.041
    if mode == "nearest":
        assert not moved.any()
    else:
        # Stochastic: each of 4096 weights is off by at most sqrt(40) 2^-8, the mean by a 64th of that.
        allowed = 4 * 40**0.5 * 2**-8 / 64 if mode == "stochastic" else 2**-8
        assert abs(moved.mean() - exact) < allowed
