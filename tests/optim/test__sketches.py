"""Sketches in one piece and in bands: the same weights, and never more memory than a step may hold."""

import pytest
import torch
from torch import nn

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


def test_bands_cover_each_row_once_and_keep_within_the_limit(monkeypatch):
    monkeypatch.setattr(_sketches, "TEMPORARY_BYTES", 1000)
    moment = torch.empty(37, 11)
    bands = _sketches._bands(moment)
    assert torch.cat([torch.arange(37)[band] for band in bands]).equal(torch.arange(37))
    assert max(moment[band].nbytes for band in bands) <= 500
