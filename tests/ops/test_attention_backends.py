import pytest
import torch

from hardy.ops.attention_backends import AttentionRule, documents_and_places, visible
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
