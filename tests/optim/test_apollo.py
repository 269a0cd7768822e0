"""APOLLO's rule: settings, state, and the laws of its step."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hardy.optim import apollo as module
from hardy.optim._rule import Member
from hardy.optim._sharded import Shard, Split
from hardy.optim.apollo import ApolloRule
from hardy.optim.optimizers import APOLLO, APOLLOMini


def gradients(shape, count, *, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(shape, generator=generator) for _ in range(count)]


def run(grads, cls=APOLLO, **settings):
    """Return the weights before and after each gradient, and the optimizer."""
    param = nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = cls([("weight", param)], **{"lr": 0.1, **settings})
    weights = [param.detach().clone()]
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        weights.append(param.detach().clone())
    return weights, optimizer


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank of a 'apollo' group must be a whole number, at least 1, got 0"),
        ({"rank": 2.0}, "rank .* a whole number"),
        ({"eps": -1e-8}, "eps .* at least 0"),
        ({"update_proj_gap": 0}, "update_proj_gap .* at least 1, got 0"),
        ({"limiter_gamma": 1.0}, "limiter_gamma .* above 1, got 1.0"),
        ({"scale": 0.0}, "scale .* above 0, or 'auto', got 0.0"),
        ({"scale_type": "row"}, "scale_type .* 'channel' or 'tensor', got 'row'"),
        ({"proj": "gauss"}, "proj .* 'normal' or 'rademacher' or 'svd', got 'gauss'"),
        ({"svd_method": "fast"}, "svd_method .* 'gram' or 'exact', got 'fast'"),
        ({"limiter": "on"}, "limiter .* 'reference' or 'corrected' or 'off', got 'on'"),
        ({"zero_grad": "keep"}, "zero_grad .* 'skip' or 'decay', got 'keep'"),
        ({"side": "left"}, "side .* 'auto' or 'shard_local', got 'left'"),
        ({"wide_state": "all"}, "wide_state .* 'shard' or 'replicate', got 'all'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        APOLLO([("w", nn.Parameter(torch.ones(2, 2)))], **settings)


@pytest.mark.parametrize("shape", [(5,), (), (0, 4)], ids=str)
def test_what_is_no_matrix_is_refused_by_name(shape):
    param = nn.Parameter(torch.ones(shape))
    optimizer = APOLLO([("norm.weight", param)])
    with pytest.raises(ValueError, match=r"needs matrices, and norm\.weight has shape .*kind='adamw'"):
        optimizer.materialize_state()


def test_a_rank_beyond_the_shorter_side_is_cut_with_one_warning(caplog, monkeypatch):
    monkeypatch.setattr(module, "_said", set())
    named = [(f"layers.{i}.w", nn.Parameter(torch.ones(9, 16))) for i in range(3)]
    optimizer = APOLLO(named, rank=12)
    with caplog.at_level(logging.WARNING):
        optimizer.materialize_state()
    (record,) = caplog.records
    assert "rank=12 exceeds a matrix' shorter side 9, which is taken; so for layers.0.w" in record.message
    assert optimizer.state[named[0][1]]["exp_avg"].shape == (9, 16)


def test_a_channel_needs_some_rank(caplog, monkeypatch):
    monkeypatch.setattr(module, "_said", set())
    named = [("w", nn.Parameter(torch.ones(9, 16)))]
    with caplog.at_level(logging.WARNING):
        APOLLO(named, rank=8)
        APOLLOMini(named)
        assert not caplog.records
        APOLLO(named, rank=7)
    assert "rank=7 is too low to tell a channel's length; use scale_type='tensor'" in caplog.text


@pytest.mark.parametrize(
    ("shape", "settings", "moment"),
    [
        ((12, 5), {}, (12, 3)),
        ((5, 12), {}, (3, 12)),
        ((4, 12, 5), {}, (4, 12, 3)),
        ((4, 5, 12), {}, (4, 3, 12)),
        ((4, 5, 12), {"stacked": False}, (3, 60)),
        ((6, 3, 2, 2), {}, (3, 12)),
    ],
)
def test_state_is_a_sketch_per_channel(shape, settings, moment):
    param = nn.Parameter(torch.ones(shape))
    optimizer = APOLLO([("w", param)], rank=3, proj="svd", **settings)
    optimizer.materialize_state()
    stack = (4,) if len(shape) == 3 and settings.get("stacked", True) else ()
    state = {key: tuple(value.shape) for key, value in optimizer.state[param].items()}
    assert state.pop("basis")[-2] == 3
    assert state == {
        "step": stack,
        "exp_avg": moment,
        "exp_avg_sq": moment,
        "limiter_norm": stack,
        "proj_key": (),
    }


def test_state_is_cut_where_channels_are():
    group = {**ApolloRule.defaults, "rank": 3, "kind": "apollo"}
    rows = Split(0, SimpleNamespace(size=lambda _: 2), 0)
    tall = ApolloRule().specs(Shard((12, 5), (6, 0), (6, 5), (rows,)), torch.float32, group, "w")
    assert tall["exp_avg"].dims == {0: 0}
    wide = ApolloRule().specs(Shard((6, 12), (3, 0), (3, 12), (rows,)), torch.float32, group, "w")
    assert wide["exp_avg"].dims == {1: 1, 0: 1}  # cut rows have their channels' state scattered
    group["wide_state"] = "replicate"
    wide = ApolloRule().specs(Shard((6, 12), (3, 0), (3, 12), (rows,)), torch.float32, group, "w")
    assert wide["exp_avg"].dims == {1: 1}
    stack = ApolloRule().specs(Shard((4, 12, 5), (0, 0, 0), (2, 12, 5), (rows,)), torch.float32, group, "w")
    assert stack["exp_avg"].dims == {1: 1, 0: 0} and stack["limiter_norm"].dims == {0: 0}


def test_temporaries_are_counted():
    rule, rows = ApolloRule(), Split(0, SimpleNamespace(size=lambda _: 2), 0)
    group = {**ApolloRule.defaults, "rank": 3}

    def counted(shard, device="cpu"):
        param = torch.empty(shard.local_shape, device=device)
        return rule.temporary_bytes(Member("w", param, group, rule, shard, 0, 0, {}, ()))

    # Nobody else has a part: eight numbers a channel, which may take a quarter of what sketches may.
    assert counted(Shard((12, 5), (0, 0), (12, 5))) == 4 * 8 * 4 * 12
    assert counted(Shard((12, 5), (0, 0), (6, 5), (rows,))) == 4 * 4 * 6
    wide = Shard((5, 12), (0, 0), (3, 12), (rows,))
    assert counted(wide) == 2 * 4 * 4 * 12  # once more for what is sent
    assert counted(wide, "meta") == 2 * 4 * 4 * 12 + 2 * 3 * 3  # and the projection


@pytest.mark.parametrize("shape", [(64, 48), (48, 64)], ids=["tall", "wide"])
def test_an_update_has_full_rank_and_each_channel_lies_along_its_gradient(shape):
    (grad,) = gradients(shape, 1)
    weights, _ = run([grad], rank=4)
    assert torch.linalg.matrix_rank(weights[1]) == 48
    factor = -weights[1] / grad
    along = factor if shape[0] >= shape[1] else factor.T
    torch.testing.assert_close(along, along[:, :1].expand_as(along), rtol=1e-5, atol=0)
    assert (along[:, 0] > 0).all() and along[:, 0].std() > 0


@pytest.mark.parametrize("limiter", ["reference", "corrected"])
@pytest.mark.parametrize("cls", [APOLLO, APOLLOMini])
def test_steps_never_grow_by_more_than_gamma(cls, limiter):
    grads = gradients((20, 12), 30)
    for step in (7, 8, 20):
        grads[step] *= 100.0
    grads[15].zero_()
    param = nn.Parameter(torch.zeros(20, 12))
    optimizer = cls([("weight", param)], limiter=limiter, limiter_gamma=1.05)
    memory = []
    for grad in grads:
        param.grad = grad
        optimizer.step()
        memory.append(optimizer.state[param]["limiter_norm"].item())
    ratios = [new / old for old, new in zip(memory, memory[1:], strict=False)]
    assert max(ratios) <= 1.05 * (1 + 1e-6) and max(ratios) > 1.049
    assert memory[15] == memory[14] > 0


@pytest.mark.parametrize("cls", [APOLLO, APOLLOMini])
def test_a_gradient_that_is_almost_zero_at_first_slows_no_later_step(cls):
    """As behind output projections that begin at zero; a larger eps would shorten all steps to come."""
    grads = gradients((20, 12), 12)
    small = [1e-8 * grads[0], *grads[1:]]
    lengths = []
    for each in (grads, small):
        weights, _ = run(each, cls, rank=1 if cls is APOLLOMini else 6)
        lengths.append((weights[-1] - weights[-2]).norm().item())
    assert lengths[1] > 0.5 * lengths[0]


def test_the_limiter_off_lets_a_spike_through():
    grads = gradients((20, 12), 6)
    grads[5] *= 100.0
    lengths = {}
    for limiter in ("reference", "off"):
        weights, _ = run(grads, rank=4, limiter=limiter)
        moved = [(new - old).norm() for old, new in zip(weights, weights[1:], strict=False)]
        lengths[limiter] = (moved[5] / moved[4]).item()
    assert lengths["off"] > 1.3 > 1.1 > lengths["reference"]


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_size_of_gradients_does_not_matter(scale):
    usual, _ = run(gradients((12, 8), 5), rank=4, eps=1e-30)
    scaled, _ = run(gradients((12, 8), 5, scale=scale), rank=4, eps=1e-30)
    torch.testing.assert_close(scaled[-1], usual[-1], rtol=1e-4, atol=1e-6)


def test_scale_auto_makes_up_for_the_rank():
    grads = gradients((24, 16), 5)
    for rank in (4, 16):
        plain, _ = run(grads, rank=rank, limiter="off")
        scaled, _ = run(grads, rank=rank, limiter="off", scale="auto")
        torch.testing.assert_close(scaled[-1], plain[-1] * math.sqrt(16 / rank), rtol=1e-5, atol=1e-6)


def test_an_expert_without_gradient_stands_still_beside_others():
    grads = gradients((3, 12, 5), 3)
    grads[1][2] = 0.0
    grads[1][0, 0, 0] = math.nan
    weights, optimizer = run(grads, rank=2, weight_decay=0.1)
    before, after = weights[1], weights[2]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]
    (entries,) = optimizer.state.values()
    assert entries["step"].tolist() == [2.0, 3.0, 2.0]


def test_an_eps_of_zero_bears_channels_without_gradient():
    (grad,) = gradients((12, 5), 1)
    grad[3] = 0.0
    for cls in (APOLLO, APOLLOMini):
        weights, _ = run([grad, grad], cls, eps=0.0)
        assert weights[-1].isfinite().all() and not weights[-1][3].any() and weights[-1][4].any()


def test_a_channel_that_all_but_vanishes_stays_finite():
    """Its squared ratio of lengths would be beyond fp32."""
    grads = gradients((12, 5), 4)
    for grad in grads[2:]:
        grad[3] *= 1e-21
    for limiter in ("reference", "off"):
        weights, _ = run(grads, rank=3, limiter=limiter)
        assert weights[-1].isfinite().all()


def test_decay_acts_on_the_old_weight_and_apart_from_the_gradient():
    grads = gradients((12, 5), 2)
    param = nn.Parameter(torch.ones(12, 5))
    decaying = nn.Parameter(torch.ones(12, 5))
    for p, decay in ((param, 0.0), (decaying, 0.5)):
        p.grad = grads[0].clone()
        APOLLO([("weight", p)], lr=0.1, rank=2, weight_decay=decay).step()
    torch.testing.assert_close(param - decaying, torch.full((12, 5), 0.05))
