import pytest
import torch

from hardy.ops.attention_backends import (
    CAUSAL,
    ROWS_OF_A_MASK,
    AttentionRule,
    documents_and_places,
    reference_attention,
    visible,
)
from hardy.ops.packed import DocumentLayout


@pytest.mark.parametrize(
    "rule", [AttentionRule(), AttentionRule(window=2), AttentionRule(causal=False)], ids=str
)
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 5), (3, 5), (5, 5)])
def test_the_mask_is_aligned_bottom_right(rule, num_queries, num_keys):
    mask = visible(num_queries, num_keys, rule=rule, device="cpu")
    shift = num_keys - num_queries
    for x in range(num_queries):
        for y in range(num_keys):
            seen = not rule.causal or y <= x + shift
            if rule.window is not None:
                seen = seen and y > x + shift - rule.window - 1
            assert mask[x, y].item() == seen
    assert mask.any(dim=1).all()  # no query sees nothing


def test_queries_stand_at_the_end_of_their_keys():
    queries, keys = DocumentLayout.from_lengths([1, 2]), DocumentLayout.from_lengths([3, 2])
    document_T, place_T = documents_and_places(queries, counterpart=keys)
    assert document_T.tolist() == [0, 1, 1]
    assert place_T.tolist() == [2, 0, 1]
    assert documents_and_places(keys, counterpart=keys)[1].tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("wrong", [{"window": -1}, {"window": 2, "causal": False}], ids=str)
def test_windows_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="an attention window must be at least 0 and causal"):
        AttentionRule(**wrong)


def test_the_mask_is_boolean_and_on_its_device():
    mask = visible(2, 2, rule=AttentionRule(), device="meta")
    assert (mask.dtype, mask.device.type) == (torch.bool, "meta")


@pytest.mark.parametrize("more", [1, 70, ROWS_OF_A_MASK, 2 * ROWS_OF_A_MASK + 3])
@pytest.mark.parametrize("before", [1, 33])
def test_long_pieces_go_in_steps_and_equal_one_call_with_a_mask(more, before):
    """More queries than a mask has rows, and keys before them: fully masked attention written out."""
    num_queries = ROWS_OF_A_MASK + more
    num_keys = num_queries + before
    generator = torch.Generator().manual_seed(0)
    sizes = ((num_queries, 4), (num_keys, 2), (num_keys, 2))
    inputs = [torch.randn(*size, 8, generator=generator, dtype=torch.float64) for size in sizes]
    query, key, value = (x.requires_grad_() for x in inputs)
    queries, keys = (DocumentLayout.from_lengths([length]) for length in (num_queries, num_keys))
    found = reference_attention(query, key, value, queries, keys=keys, rule=CAUSAL)
    scores = torch.einsum("qhk,shk->hqs", query, key.repeat_interleave(2, dim=1)) * 8**-0.5
    mask = visible(num_queries, num_keys, rule=CAUSAL, device="cpu")
    shares = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = torch.einsum("hqs,shk->qhk", shares, value.repeat_interleave(2, dim=1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((x * weight).sum(), (query, key, value)) for x in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
