"""Sketches in one piece and in bands: the same weights, and never more memory than a step may hold."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hardy.optim import _sketches
from hardy.optim._geometry import geometry_of
from hardy.optim._sharded import shard_of
from hardy.optim.apollo import ApolloRule
from hardy.optim.optimizers import APOLLO

SHAPES = {"tall": (40, 12), "wide": (12, 40), "experts": (3, 20, 6)}


def weights_after(num_steps, **settings):
    generator = torch.Generator().manual_seed(0)
    params = {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for name, shape in SHAPES.items()
    }
    optimizer = APOLLO(list(params.items()), lr=0.01, rank=5, weight_decay=0.1, **settings)
    for step in range(num_steps):
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        if step == 1:
            params["tall"].grad.zero_()
        if step == 2:
            params["wide"].grad[3, 4] = torch.nan
        optimizer.step()
    return {name: param.detach() for name, param in params.items()}


@pytest.mark.parametrize("proj", ["normal", "svd"])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("limit_bytes", [1, 700])
def test_bands_change_nothing_but_rounding(monkeypatch, proj, scale_type, limit_bytes):
    settings = {"proj": proj, "scale_type": scale_type}
    whole = weights_after(5, **settings)
    monkeypatch.setattr(_sketches, "TEMPORARY_BYTES", limit_bytes)
    banded = weights_after(5, **settings)
    for name, expected in whole.items():
        torch.testing.assert_close(banded[name], expected, rtol=1e-12, atol=1e-14)


def test_only_what_is_too_large_and_all_here_is_cut():
    group = {**ApolloRule.defaults, "kind": "apollo"}
    large = geometry_of(shard_of(torch.empty(128_000, 512, device="meta"), "head"), group, "head")
    small = geometry_of(shard_of(torch.empty(4096, 4096, device="meta"), "query"), group, "query")
    assert (_sketches.is_banded(large), _sketches.is_banded(small)) == (True, False)
    assert _sketches.sketch_bytes(large) == 4 * 257 * 128_000


def step_of(count, **settings):
    """Return an optimizer of matrices alike, and a call that takes a step with new gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [
        (f"w{i}", nn.Parameter(torch.randn(40, 24, generator=generator), requires_grad=True))
        for i in range(count)
    ]
    optimizer = APOLLO(params, lr=0.01, rank=24, **settings)

    def step(scale=1.0):
        for _, param in params:
            param.grad = scale * torch.randn(param.shape, generator=generator)
        params[2][1].grad.zero_()
        optimizer.step()
        return [param.detach().clone() for _, param in params]

    return optimizer, step


@pytest.mark.parametrize("settings", [{}, {"scale_type": "tensor", "zero_grad": "decay"}, {"proj": "svd"}])
def test_sketches_by_parts_are_the_same_bits(monkeypatch, settings):
    (_, whole), (_, cut) = step_of(7, **settings), step_of(7, **settings)
    each = 4 * 25 * 40
    for most in (1, 3, 7):
        monkeypatch.setattr(_sketches, "TEMPORARY_BYTES", most * each)
        found = cut()
        monkeypatch.undo()
        assert all(map(torch.equal, found, whole()))


def test_parts_cover_members_once_and_keep_within_the_limit(monkeypatch):
    optimizer, _ = step_of(7)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.zeros_like(param)
    (bundle,) = optimizer._bundles(optimizer._all_members())
    geometry = geometry_of(bundle.members[0].shard, bundle.group, "w")
    assert list(_sketches._parts(bundle, geometry)) == [range(7)]
    monkeypatch.setattr(_sketches, "TEMPORARY_BYTES", 3 * 4 * 25 * 40 + 1)
    assert list(_sketches._parts(bundle, geometry)) == [range(3), range(3, 6), range(6, 7)]
    monkeypatch.setattr(_sketches, "TEMPORARY_BYTES", 10)
    assert list(_sketches._parts(bundle, geometry)) == [range(i, i + 1) for i in range(7)]


class Operations(TorchDispatchMode):
    """Counts operations of torch that compute."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and not str(func).startswith(("aten.new_empty", "aten.detach"))
        return func(*args, **(kwargs or {}))


def test_a_further_part_takes_few_operations(monkeypatch):
    """Each is a launch on a GPU, which is what a step of small numbers costs there."""
    counts = []
    for most in (12, 6, 1):
        monkeypatch.setattr(_sketches, "TEMPORARY_BYTES", most * 4 * 25 * 40)
        _, step = step_of(12)
        step()
        with Operations() as seen:
            step()
        counts.append(seen.count)
    assert counts[1] - counts[0] <= 12 and counts[2] - counts[0] <= 11 * 10
    assert counts[0] <= 110  # 12 gradients drawn and one cleared, and the copies returned, among them


def test_bands_cover_each_row_once_and_keep_within_the_limit(monkeypatch):
    monkeypatch.setattr(_sketches, "TEMPORARY_BYTES", 1000)
    moment = torch.empty(37, 11)
    bands = _sketches._bands(moment)
    assert torch.cat([torch.arange(37)[band] for band in bands]).equal(torch.arange(37))
    assert max(moment[band].nbytes for band in bands) <= 500
