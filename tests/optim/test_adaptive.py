"""The AdamW rule: state, settings, its gate, and how any shape is seen as rows."""

import math

import pytest
import torch
from torch import nn

from hardy.ops.updates import Place
from hardy.optim._sharded import Shard
from hardy.optim.adaptive import (
    AdamWRule,
    as_swept,
    flat_place,
    flat_rows,
    gate,
    may_stand_still,
    moment_spec,
    norms,
)
from hardy.optim.optimizers import AdaptiveAdamW


def whole(*shape):
    return Shard(shape, (0,) * len(shape), shape)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"betas": (0.9, 1.0)},
            r"betas of a 'adamw' group must be two numbers in \[0, 1\), got \(0.9, 1.0\)",
        ),
        ({"betas": (0.9,)}, "betas .* two numbers"),
        ({"betas": (-0.1, 0.9)}, "betas .* two numbers"),
        ({"eps": 0.0}, "eps of a 'adamw' group must be above 0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        AdaptiveAdamW([("w", nn.Parameter(torch.ones(2)))], **settings)


def test_state_is_two_moments_cut_as_the_weights_are():
    specs = AdamWRule().specs(whole(3, 4), torch.float32, {}, "w")
    assert specs["step"].shape == () and specs["step"].dims == {}
    assert specs["exp_avg"] == specs["exp_avg_sq"] == moment_spec(whole(3, 4), torch.float32)
    assert specs["exp_avg"].shape == (3, 4) and specs["exp_avg"].dims == {0: 0, 1: 1}
    assert AdamWRule().temporary_bytes(None) == 0 and AdamWRule().alike(whole(3)) == AdamWRule().alike(
        whole(4, 5)
    )


@pytest.mark.parametrize(
    ("shard", "rows", "place"),
    [
        (whole(), (1, 1), (0, 1)),
        (whole(7), (7, 1), (0, 1)),
        (whole(5, 4), (5, 4), (0, 4)),
        (whole(5, 4, 3), (5, 12), (0, 12)),
        (Shard((7,), (4,), (3,)), (3, 1), (4, 1)),
        (Shard((5, 4, 3), (2, 0, 0), (2, 4, 3)), (2, 12), (24, 12)),
        (Shard((5, 4, 3), (1, 2, 0), (4, 2, 3)), (4, 6), (18, 12)),
    ],
)
def test_any_shape_is_rows_at_a_place_in_the_whole(shard, rows, place):
    assert flat_rows(shard) == rows
    assert flat_place(shard) == Place(base=place[0], stride=place[1])
    # The place says where the elements are: look them up in a whole tensor that counts its elements.
    counted = torch.arange(math.prod(shard.shape)).view(shard.shape)
    for dim, (begin, length) in enumerate(zip(shard.offset, shard.local_shape, strict=True)):
        counted = counted.narrow(dim, begin, length)
    found = place[0] + place[1] * torch.arange(rows[0]).unsqueeze(1) + torch.arange(rows[1])
    assert torch.equal(counted.reshape(rows), found)


@pytest.mark.parametrize("lr", [0.0, 0.1, torch.tensor(0.0), torch.tensor(0.1)], ids=str)
def test_the_gate_lets_zero_gradients_through_unless_the_rate_is_zero(lr):
    squares = torch.tensor([0.0, 1.0, math.inf, math.nan])
    moving = float(lr) != 0
    assert may_stand_still(lr) == (isinstance(lr, torch.Tensor) or not moving)
    assert gate(squares, {"lr": lr, "nonfinite": "propagate"}).tolist() == [moving, 1, 1, 1]
    assert gate(squares, {"lr": lr, "nonfinite": "skip"}).tolist() == [moving, 1, 0, 0]


def test_decays_are_those_of_the_sweeps():
    assert as_swept(0.999, torch.float64) == 0.999
    assert as_swept(0.999, torch.float32) == torch.tensor(0.999).double()
    assert as_swept(0.5, torch.float32) == 0.5


def test_the_first_step_is_a_step_of_lr():
    """|m / sqrt(v)| is 1; the moments' fp32 rates and the bias corrections must cancel to fp32 rounding."""
    param = nn.Parameter(torch.zeros(64))
    param.grad = torch.linspace(-3, 3, 64)
    AdaptiveAdamW([("w", param)], lr=1.0, eps=1e-12, weight_decay=0.0).step()
    torch.testing.assert_close(param.detach(), -param.grad.sign(), rtol=3e-7, atol=0)


def test_norms_add_up_in_the_dtype_asked_for():
    x = torch.full((10_000,), 0.01, dtype=torch.bfloat16)
    (norm,) = norms([x], torch.float32)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), x.double().norm(), rtol=1e-6, atol=0)


def test_nan_spoils_one_parameter_or_none():
    results = {}
    for nonfinite in ("propagate", "skip"):
        named = [(name, nn.Parameter(torch.ones(2))) for name in ("good", "bad")]
        optimizer = AdaptiveAdamW(named, lr=0.1, nonfinite=nonfinite)
        for _, param in named:
            param.grad = torch.ones(2)
        named[1][1].grad[0] = math.nan
        optimizer.step()
        results[nonfinite] = [param.isfinite().all().item() for _, param in named]
        assert torch.equal(named[0][1], torch.full((2,), 1 - 0.1 * 0.01) - 0.1)
    assert results == {"propagate": [True, False], "skip": [True, True]}
