import itertools
import math
from functools import partial

import pytest
import torch

from hardy.config import UserError
from hardy.ops import attention
from hardy.ops.attention import BACKENDS, CUDA_ONLY, choose_backend, packed_attention
from hardy.ops.attention_backends import AttentionRule
from hardy.ops.packed import DocumentLayout

ON_CPU = sorted(BACKENDS.keys() - CUDA_ONLY)
CASES = [  # lengths of queries, lengths of keys
    ((5,), (5,)),
    ((4, 4, 4), (4, 4, 4)),
    ((1, 60, 7, 33, 1, 32, 7, 31), (1, 60, 7, 33, 1, 32, 7, 31)),
    ((1, 3, 2, 1, 5), (60, 3, 9, 1, 6)),
    ((2, 2), (5, 5)),
]
RULES = [
    AttentionRule(),
    AttentionRule(window=0),
    AttentionRule(window=3),
    AttentionRule(window=1000, scale=0.3),
    AttentionRule(causal=False),
]


def tensors(queries, keys, *, heads, kv_heads, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = [(sum(queries), heads, 8), (sum(keys), kv_heads, 8), (sum(keys), kv_heads, 8)]
    return [
        torch.randn(size, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for size in sizes
    ]


def one_by_one(query_THK, key_THK, value_THK, queries, *, keys, rule):
    """Write attention out: for each document, query and head, a softmax over the keys that are seen."""
    group = query_THK.shape[1] // key_THK.shape[1]
    scale = rule.scale or 1 / math.sqrt(query_THK.shape[-1])
    rows, start, first = [], 0, 0
    for num_queries, num_keys in zip(queries.lengths, keys.lengths, strict=True):
        for x in range(num_queries):
            place = num_keys - num_queries + x
            least = 0 if rule.window is None else max(0, place - rule.window)
            seen = slice(first + least, first + (place + 1 if rule.causal else num_keys))
            heads = []
            for head in range(query_THK.shape[1]):
                scores = key_THK[seen, head // group] @ query_THK[start + x, head] * scale
                heads.append(scores.softmax(0) @ value_THK[seen, head // group])
            rows.append(torch.stack(heads))
        start, first = start + num_queries, first + num_keys
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("lengths", CASES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_attention_written_out(backend, rule, lengths, kv_heads):
    inputs = tensors(*lengths, heads=4, kv_heads=kv_heads)
    queries, keys = (DocumentLayout.from_lengths(x) for x in lengths)
    got_THK = packed_attention(*inputs, queries, keys=keys, rule=rule, backend=backend)
    exact_THK = one_by_one(*inputs, queries, keys=keys, rule=rule)
    torch.testing.assert_close(got_THK, exact_THK, rtol=0, atol=1e-12)
    slope = torch.randn(exact_THK.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, exact = (torch.autograd.grad(out, inputs, slope) for out in (got_THK, exact_THK))
    for mine, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_equals_each_document_alone_for_all_lengths(backend, heads):
    lengths = tuple(range(1, 61))
    layout = DocumentLayout.from_lengths(lengths)
    inputs = tensors(lengths, lengths, heads=heads, kv_heads=heads)
    packed = packed_attention(*inputs, layout, backend=backend).split(lengths)
    for length, out, *alone in zip(lengths, packed, *(x.split(lengths) for x in inputs), strict=True):
        batched = [x.transpose(0, 1).unsqueeze(0) for x in alone]
        right = torch.nn.functional.scaled_dot_product_attention(*batched, is_causal=True)
        assert out.shape[0] == length
        torch.testing.assert_close(out, right[0].transpose(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("lengths", [(6, 6, 6), (6, 9, 40)], ids=str)
def test_nothing_leaks_between_documents(backend, lengths):
    layout = DocumentLayout.from_lengths(lengths)
    inputs = tensors(lengths, lengths, heads=2, kv_heads=1, dtype=torch.float32)
    before = packed_attention(*inputs, layout, backend=backend)
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[3] += 5.0
    after = packed_attention(*changed, layout, backend=backend)
    assert torch.equal(before[lengths[0] :], after[lengths[0] :])
    assert torch.equal(before[:3], after[:3])  # nor backwards in time
    assert not torch.isclose(before[3:6], after[3:6]).any()


def test_a_nan_stays_in_its_document():
    lengths = (6, 9, 40)
    inputs = tensors(lengths, lengths, heads=2, kv_heads=2)
    with torch.no_grad():
        for x in inputs:
            x[3] = math.nan
    out = packed_attention(*inputs, DocumentLayout.from_lengths(lengths), backend="reference")
    assert out[6:].isfinite().all()


def test_tokens_at_the_end_of_a_cache_see_what_they_would_in_one_go():
    whole = DocumentLayout.from_lengths([9])
    inputs = tensors([9], [9], heads=2, kv_heads=1)
    last = packed_attention(inputs[0][6:], *inputs[1:], DocumentLayout.from_lengths([3]), keys=whole)
    torch.testing.assert_close(last, packed_attention(*inputs, whole)[6:], rtol=0, atol=1e-12)


def test_equal_documents_are_not_copied():
    layout = DocumentLayout.from_lengths([4, 4])
    inputs = tensors((4, 4), (4, 4), heads=2, kv_heads=2, dtype=torch.float32)
    with torch.profiler.profile(acc_events=True) as profile, torch.no_grad():
        packed_attention(*inputs, layout, backend="reference")
    called = {event.key for event in profile.key_averages()}
    assert any("scaled_dot_product" in name for name in called)  # that the profile saw the call
    assert not called & {"aten::copy_", "aten::cat", "aten::stack", "aten::index_select"}


def test_documents_of_like_length_share_a_call():
    lengths = (30, 31, 32, 60, 5)
    layout = DocumentLayout.from_lengths(lengths)
    inputs = tensors(lengths, lengths, heads=1, kv_heads=1)
    with torch.profiler.profile(acc_events=True) as profile, torch.no_grad():
        packed_attention(*inputs, layout, backend="reference")
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::scaled_dot_product_attention"] == 2


def test_auto_is_the_reference_on_a_cpu():
    assert choose_backend("cpu", dtype=torch.float32, head_size=32) == "reference"


@pytest.mark.parametrize("backend", sorted(CUDA_ONLY))
def test_a_cuda_back_end_on_a_cpu_names_the_setting(backend):
    layout = DocumentLayout.from_lengths([2])
    with pytest.raises(
        UserError, match=f"model.attention='{backend}' needs a CUDA device.*use model.attention='auto'"
    ):
        packed_attention(*tensors([2], [2], heads=1, kv_heads=1), layout, backend=backend)


def test_an_unknown_back_end_gets_the_nearest_name():
    layout = DocumentLayout.from_lengths([2])
    with pytest.raises(
        UserError, match="model.attention: there is no back end 'varlenn'; did you mean 'varlen'?"
    ):
        packed_attention(*tensors([2], [2], heads=1, kv_heads=1), layout, backend="varlenn")


def test_dense_refuses_long_packs():
    layout = DocumentLayout.from_lengths([8193])
    x_THK = torch.zeros(8193, 1, 2)
    with pytest.raises(
        UserError, match="model.attention='dense' takes at most 8192 tokens at once, got 8193"
    ):
        packed_attention(x_THK, x_THK, x_THK, layout, backend="dense")


def test_shapes_that_do_not_fit_are_named():
    layout, longer = DocumentLayout.from_lengths([2]), DocumentLayout.from_lengths([3])
    call = partial(packed_attention, backend="reference")
    with pytest.raises(ValueError, match=r"have \(3, 3, 3\) tokens, their layouts 2 and 2"):
        call(*tensors([3], [3], heads=1, kv_heads=1), layout)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        call(*tensors([2], [2], heads=3, kv_heads=2), layout)
    with pytest.raises(ValueError, match="document 0 has 3 queries but 2 keys"):
        call(*tensors([3], [2], heads=1, kv_heads=1), longer, keys=layout)
    with pytest.raises(ValueError, match="1 documents of queries, 2 of keys"):
        call(*tensors([2], [2], heads=1, kv_heads=1), layout, keys=DocumentLayout.from_lengths([1, 1]))


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_a_kernel_that_fails_the_probe_is_not_taken(monkeypatch, caplog, fault):
    def kernel(query_THK, *args, **kwargs):
        if fault == "raises":
            raise RuntimeError("no kernel image")
        return 2 * BACKENDS["reference"](query_THK, *args, **kwargs)

    attention._works.cache_clear()
    monkeypatch.setitem(BACKENDS, "varlen", kernel)
    assert not attention._works("varlen", "cpu", torch.float32)
    attention._works.cache_clear()


def test_a_kernel_that_passes_the_probe_is_taken_and_asked_once(monkeypatch):
    calls = itertools.count()

    def kernel(*args, **kwargs):
        next(calls)
        return BACKENDS["reference"](*args, **kwargs)

    attention._works.cache_clear()
    monkeypatch.setitem(BACKENDS, "varlen", kernel)
    assert attention._works("varlen", "cpu", torch.float32)
    assert attention._works("varlen", "cpu", torch.float32)
    attention._works.cache_clear()
    assert next(calls) == 1


def test_a_probe_within_a_checkpointed_block_is_none_of_its_business(monkeypatch):
    from torch.utils.checkpoint import checkpoint

    monkeypatch.setitem(attention.BACKENDS, "varlen", attention.BACKENDS["reference"])
    attention._works.cache_clear()

    def block(x):
        assert attention._works("varlen", "cpu", torch.float32)  # the first time by running it
        return x.sin().square()

    x = torch.ones(3, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    attention._works.cache_clear()
    assert torch.allclose(x.grad, (2 * torch.ones(3)).sin())
