"""The choice between gathering and exchanging heads, and the bytes it rests on."""

import pytest
import torch

from hardy.config import ConfigError, UserError
from hardy.distributed.balance.attention import context_parallel_attention
from hardy.distributed.balance.layouts import GatherLayout, UlyssesLayout
from hardy.distributed.balance.scheme import SCHEMES, Sharer
from hardy.distributed.simulation import SimWorld

LENGTHS = (64, 5, 27)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1)])
@pytest.mark.parametrize("size", [2, 4])
def test_the_bytes_foretold_are_the_bytes_sent(size, heads, scheme):
    sharer = Sharer(num_heads=heads[0], num_kv_heads=heads[1], scheme=scheme, split_tokens=3)
    head_size = 4

    def body(comm):
        layout = sharer.layout(LENGTHS, comm)
        query, key, value = (
            torch.ones(layout.num_tokens, count, head_size) for count in (heads[0], heads[1], heads[1])
        )
        before = comm.bytes_sent
        with_grad = [x.requires_grad_() for x in (query, key, value)]
        out = context_parallel_attention(*with_grad, layout)
        forward = comm.bytes_sent - before
        out.sum().backward()
        return forward, comm.bytes_sent - before - forward

    foretold = sharer.heads_sent(scheme, LENGTHS, num_workers=size) * head_size * 4
    assert SimWorld(size).run(body) == [(foretold, foretold)] * size


def test_auto_takes_what_sends_less_and_gathers_where_heads_do_not_divide():
    for heads in (8, 2, 1):
        sharer = Sharer(num_heads=8, num_kv_heads=heads, split_tokens=0)
        for size in (2, 4, 8):
            sent = {s: sharer.heads_sent(s, LENGTHS, num_workers=size) for s in SCHEMES}
            assert sent[sharer.choose(LENGTHS, num_workers=size)] == min(sent.values())
    assert Sharer(num_heads=6, num_kv_heads=6).choose((10**5,), num_workers=4) == "gather"
    assert Sharer(num_heads=32, num_kv_heads=32).choose((10**5,), num_workers=8) == "ulysses"
    assert (
        Sharer(num_heads=32, num_kv_heads=32).choose((100,) * 1000, num_workers=8) == "gather"
    )  # none is cut


def test_a_sharer_gives_the_layout_of_its_scheme():
    def kind(scheme):
        sharer = Sharer(num_heads=4, num_kv_heads=4, scheme=scheme)
        return {type(layout) for layout in SimWorld(2).run(lambda comm: sharer.layout(LENGTHS, comm))}

    assert kind("gather") == {GatherLayout} and kind("ulysses") == {UlyssesLayout}


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match="scheme.*ulises.*did you mean 'ulysses'|scheme.*ulises"):
        Sharer(num_heads=4, num_kv_heads=4, scheme="ulises")
    with pytest.raises(ConfigError, match="split_tokens must be at least 0, got -1; 0 cuts"):
        Sharer(num_heads=4, num_kv_heads=4, split_tokens=-1)
    with pytest.raises(UserError, match="3 query heads do not divide by 2 workers"):
        sharer = Sharer(num_heads=3, num_kv_heads=3, scheme="ulysses")
        SimWorld(2).run(lambda comm: sharer.layout(LENGTHS, comm))
