import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hardy.ops.packed import IGNORED_LABEL, MOST_TOKENS, Borders, DocumentLayout, PackedBatch, runs


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
    for make in (DocumentLayout.from_lengths, Borders.of):
        with pytest.raises(ValueError, match="documents of at least one token, got lengths"):
            make(lengths)


def test_more_tokens_than_borders_count_are_refused():
    assert Borders.of([MOST_TOKENS - 1, 1]).cumulative_S.tolist() == [0, MOST_TOKENS - 1, MOST_TOKENS]
    with pytest.raises(ValueError, match="at most 2,147,483,647 tokens, got 2,147,483,648"):
        Borders.of([MOST_TOKENS, 1])


@given(st.lists(st.tuples(st.integers(-5, 40), st.integers(0, 6)), max_size=12))
def test_runs_are_their_numbers_end_to_end(given_runs):
    starts, sizes = (torch.tensor([pair[i] for pair in given_runs], dtype=torch.int64) for i in (0, 1))
    found = runs(starts, sizes)
    assert found.dtype == torch.int64
    assert found.tolist() == [start + i for start, size in given_runs for i in range(size)]


def test_borders_are_those_of_a_layout_and_move():
    layout, borders = DocumentLayout.from_lengths([4, 1]), Borders.of([4, 1])
    assert borders.cumulative_S.dtype == torch.int32 and borders.num_tokens == 5 and borders.longest == 4
    assert borders.lengths == layout.lengths and torch.equal(borders.cumulative_S, layout.cumulative_S)
    moved = borders.to("meta")
    assert moved.cumulative_S.device.type == "meta" and moved.lengths == (4, 1)


def test_a_batch_moves_whole():
    layout = DocumentLayout.from_lengths([1, 2])
    labels_T = torch.tensor([4, 5, IGNORED_LABEL])
    batch = PackedBatch(tokens_T=torch.arange(3), labels_T=labels_T, layout=layout, num_targets=2)
    moved = batch.to("meta")
    tensors = (moved.tokens_T, moved.labels_T, moved.layout.cumulative_S, moved.layout.positions_T)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.num_targets, moved.layout.lengths) == (2, (1, 2))
