"""What can be said of the CUDA kernels without a GPU: how they are called. tests/gpu runs them."""

import pytest
import torch

from hardy.config import UserError
from hardy.ops import attention_kernels
from hardy.ops.attention_backends import AttentionRule, reference_attention
from hardy.ops.attention_kernels import _block_mask, varlen_attention
from hardy.ops.packed import DocumentLayout

QUERIES = DocumentLayout.from_lengths([2, 3])
KEYS = DocumentLayout.from_lengths([4, 3])


def call(monkeypatch, *, takes_groups=True, dtype=torch.bfloat16, rule=AttentionRule(), head_size=8):  # noqa: B008 - frozen
    """Return the arguments torch's kernel gets."""
    seen = {}

    def kernel(query, key, value, cu_q, cu_k, max_q, max_k, **more):
        seen.update(key=key, cu_q=cu_q.tolist(), cu_k=cu_k.tolist(), longest=(max_q, max_k), **more)
        seen["contiguous"] = all(x.is_contiguous() for x in (query, key, value))
        return query

    monkeypatch.setattr(attention_kernels, "torch_varlen_attention", lambda: (kernel, takes_groups))
    query_THK = torch.zeros(4, 5, head_size, dtype=dtype).transpose(0, 1)
    key_THK = torch.arange(2 * 7 * head_size).reshape(2, 7, head_size).to(dtype).transpose(0, 1)
    out_THK = varlen_attention(query_THK, key_THK, key_THK, QUERIES, keys=KEYS, rule=rule)
    assert (out_THK.shape, out_THK.dtype) == (query_THK.shape, dtype)
    return seen


def test_varlen_gets_host_lengths_and_a_tuple_for_the_window(monkeypatch):
    seen = call(monkeypatch)
    assert (seen["cu_q"], seen["cu_k"], seen["longest"]) == ([0, 2, 5], [0, 4, 7], (3, 4))
    assert seen["window_size"] == (-1, 0)
    assert seen["enable_gqa"] and seen["contiguous"]
    assert call(monkeypatch, rule=AttentionRule(window=3))["window_size"] == (3, 0)
    assert call(monkeypatch, rule=AttentionRule(causal=False))["window_size"] == (-1, -1)


def test_varlen_repeats_heads_where_torch_cannot_share_them(monkeypatch):
    seen = call(monkeypatch, takes_groups=False)
    assert "enable_gqa" not in seen
    assert seen["key"].shape == (7, 4, 8)
    assert torch.equal(seen["key"][:, 0], seen["key"][:, 1])
    assert not torch.equal(seen["key"][:, 1], seen["key"][:, 2])


def test_varlen_names_what_it_cannot_do(monkeypatch):
    with pytest.raises(
        UserError, match="model.attention='varlen' needs bf16 or fp16, got torch.float32; set train.pre"
    ):
        call(monkeypatch, dtype=torch.float32)
    with pytest.raises(UserError, match="model.shape.head_size that is a multiple of 8 up to 256, got 12"):
        call(monkeypatch, head_size=12)


@pytest.mark.parametrize(
    "rule", [AttentionRule(), AttentionRule(window=1), AttentionRule(causal=False)], ids=str
)
def test_the_block_mask_of_flex_is_the_references_rule(rule):
    mask = _block_mask(QUERIES.lengths, KEYS.lengths, rule, torch.device("cpu"))
    index = torch.arange
    seen_TT = mask.mask_mod(torch.tensor(0), torch.tensor(0), index(5)[:, None], index(7)[None, :])
    query_THK = torch.randn(5, 1, 4, dtype=torch.float64)
    key_THK, value_THK = torch.randn(2, 7, 1, 4, dtype=torch.float64)
    scores_TT = (query_THK[:, 0] @ key_THK[:, 0].T / 2).masked_fill(~seen_TT, -torch.inf)
    expected = scores_TT.softmax(-1) @ value_THK[:, 0]
    got = reference_attention(query_THK, key_THK, value_THK, QUERIES, keys=KEYS, rule=rule)
    torch.testing.assert_close(got[:, 0], expected, rtol=0, atol=1e-12)
