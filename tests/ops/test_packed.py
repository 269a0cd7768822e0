import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hardy.ops.packed import IGNORED_LABEL, DocumentLayout, PackedBatch


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_a_layout_says_where_every_token_stands(lengths):
    layout = DocumentLayout.from_lengths(lengths)
    assert layout.num_tokens == sum(lengths) == len(layout.positions_T)
    assert layout.longest == max(lengths)
    assert layout.cumulative_S.dtype == torch.int32
    assert layout.positions_T.dtype == torch.int64
    assert layout.cumulative_S.diff().tolist() == lengths
    assert layout.positions_T.tolist() == [place for length in lengths for place in range(length)]


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_empty_documents_are_refused(lengths):
    with pytest.raises(ValueError, match="documents of at least one token, got lengths"):
        DocumentLayout.from_lengths(lengths)


def test_a_batch_moves_whole():
    layout = DocumentLayout.from_lengths([1, 2])
    labels_T = torch.tensor([4, 5, IGNORED_LABEL])
    batch = PackedBatch(tokens_T=torch.arange(3), labels_T=labels_T, layout=layout, num_targets=2)
    moved = batch.to("meta")
    tensors = (moved.tokens_T, moved.labels_T, moved.layout.cumulative_S, moved.layout.positions_T)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.num_targets, moved.layout.lengths) == (2, (1, 2))
