"""Attention over rows on several workers equals attention over the pack, forward and backward."""

import pytest
import torch

from hardy.config import UserError
from hardy.distributed.balance.attention import check_heads, context_parallel_attention
from hardy.distributed.balance.layouts import gather_layout, ulysses_layout
from hardy.distributed.simulation import SimWorld
from hardy.ops.attention import packed_attention
from hardy.ops.attention_backends import AttentionRule
from hardy.ops.packed import DocumentLayout
from hardy.rng import generator_for

PACKS = [(37, 1, 64, 2, 9), (3, 3), (1,)]
HEADS = [(8, 8), (8, 2), (8, 1), (24, 6)]
SCHEMES = {
    "gather": lambda lengths, comm: gather_layout(lengths, comm, split_tokens=0),
    "gather-long": lambda lengths, comm: gather_layout(lengths, comm, split_tokens=2),
    "ulysses": ulysses_layout,
}


def inputs(lengths, heads, *, dtype=torch.float64, head_size=4):
    """Return queries, keys, values and the output's gradient of a whole pack."""
    counts = (heads[0], heads[1], heads[1], heads[0])
    return [
        torch.randn(
            sum(lengths), count, head_size, generator=generator_for(0, "attention", i), dtype=torch.float64
        ).to(dtype)
        for i, count in enumerate(counts)
    ]


def whole(lengths, tensors, rule):
    """Return the output and the gradients of the pack in one piece."""
    *leaves, out_grad = tensors
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = packed_attention(*leaves, DocumentLayout.from_lengths(lengths), rule=rule)
    out.backward(out_grad)
    return [out.detach(), *(x.grad for x in leaves)]


def shared(lengths, tensors, rule, *, scheme, size):
    """Return the same, put together from the rows of `size` workers."""

    def body(comm):
        layout = SCHEMES[scheme](lengths, comm)
        real = layout.token_of_T < sum(lengths)
        rows = [torch.cat((x, torch.full_like(x[:1], 2.0)))[layout.token_of_T] for x in tensors]
        leaves = [x.requires_grad_() for x in rows[:3]]
        out = context_parallel_attention(*leaves, layout, rule=rule)
        assert out.dtype == leaves[0].dtype and out.shape == leaves[0].shape
        out.backward(rows[3] * real[:, None, None])
        parts = [out.detach(), *(x.grad for x in leaves)]
        home = layout.token_of_T[real]
        return [torch.zeros_like(x).index_copy_(0, home, p[real]) for x, p in zip(order, parts, strict=True)]

    order = [tensors[3], *tensors[:3]]
    return [sum(parts) for parts in zip(*SimWorld(size).run(body), strict=True)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_number_of_workers_attends_as_one(scheme, size, heads):
    for lengths in PACKS:
        tensors = inputs(lengths, heads)
        rule = AttentionRule()
        for got, want in zip(
            shared(lengths, tensors, rule, scheme=scheme, size=size),
            whole(lengths, tensors, rule),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", ["gather", "ulysses"])
@pytest.mark.parametrize("rule", [AttentionRule(window=5), AttentionRule(scale=0.3), AttentionRule(window=0)])
def test_windows_and_scales_hold_across_workers(scheme, rule):
    tensors = inputs(PACKS[0], (4, 2))
    for got, want in zip(
        shared(PACKS[0], tensors, rule, scheme=scheme, size=4), whole(PACKS[0], tensors, rule), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bf16_loses_at_most_twice_what_one_worker_loses(scheme):
    rule = AttentionRule()
    exact = whole(PACKS[0], inputs(PACKS[0], (8, 2)), rule)
    half = inputs(PACKS[0], (8, 2), dtype=torch.bfloat16)
    naive, ours = whole(PACKS[0], half, rule), shared(PACKS[0], half, rule, scheme=scheme, size=4)
    for got, alone, right in zip(ours, naive, exact, strict=True):
        lost, lost_alone = ((x.double() - right).abs().max() for x in (got, alone))
        assert got.dtype == torch.bfloat16 and 0 < lost <= 2 * lost_alone


def test_three_workers_share_keys_of_heads_that_do_not_divide():
    tensors = inputs(PACKS[0], (6, 2))
    for got, want in zip(
        shared(PACKS[0], tensors, AttentionRule(), scheme="ulysses", size=3),
        whole(PACKS[0], tensors, AttentionRule()),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_ulysses_refuses_heads_that_do_not_divide_by_name():
    with pytest.raises(UserError, match=r"scheme='ulysses'.* 6 query heads do not divide by 4 workers; use"):
        check_heads(6, num_workers=4)
    with pytest.raises(UserError, match="6 query heads do not divide by 4"):
        shared(PACKS[0], inputs(PACKS[0], (6, 2)), AttentionRule(), scheme="ulysses", size=4)


def test_gathering_refuses_what_looks_ahead_and_ulysses_does_it():
    both_ways = AttentionRule(causal=False)
    tensors = inputs(PACKS[0], (4, 2))
    with pytest.raises(UserError, match=r"needs causal attention; use scheme='ulysses'"):
        shared(PACKS[0], tensors, both_ways, scheme="gather", size=2)
    for got, want in zip(
        shared(PACKS[0], tensors, both_ways, scheme="ulysses", size=2),
        whole(PACKS[0], tensors, both_ways),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_plain_layout_is_packed_attention_and_keys_are_passed_on():
    query, key, value, _ = inputs((6,), (4, 2))
    queries, keys = DocumentLayout.from_lengths([2]), DocumentLayout.from_lengths([6])
    got = context_parallel_attention(query[:2], key, value, queries, keys=keys)
    assert torch.equal(got, packed_attention(query[:2], key, value, queries, keys=keys))
