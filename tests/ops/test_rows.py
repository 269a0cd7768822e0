import torch
from hypothesis import given
from hypothesis import strategies as st

from hardy.ops.packed import DocumentLayout
from hardy.ops.rows import ROUNDING_TOKENS, from_rows, plan_rectangles, to_rows


@given(st.lists(st.integers(1, 150), min_size=1, max_size=12))
def test_every_token_has_its_row_and_comes_back(lengths):
    layout = DocumentLayout.from_lengths(lengths)
    rectangles = plan_rectangles(lengths)
    x = torch.arange(1.0, layout.num_tokens + 1).unsqueeze(1)
    rows = to_rows(x, rectangles)
    assert rows.shape == (rectangles.num_rows, 1)
    assert sorted(rows[rows > 0].tolist()) == x.flatten().tolist()  # nobody twice, padding zero
    assert torch.equal(from_rows(rows, rectangles), x)
    assert rectangles.num_rows - layout.num_tokens < ROUNDING_TOKENS * len(lengths)
    assert sum(documents for documents, _ in rectangles.shapes) == len(lengths)


def test_a_document_stays_together_in_one_row_of_its_rectangle():
    layout = DocumentLayout.from_lengths([3, 40, 5])
    rectangles = plan_rectangles(layout.lengths)
    assert rectangles.shapes == ((2, 32), (1, 64))
    assert rectangles.rows_T.tolist() == [0, 1, 2, *range(64, 104), 32, 33, 34, 35, 36]


def test_gradients_go_back_the_same_way():
    layout = DocumentLayout.from_lengths([2, 3])
    rectangles = plan_rectangles(layout.lengths)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(rectangles.num_rows, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: to_rows(x, rectangles), x)
    assert torch.autograd.gradcheck(lambda x: from_rows(x, rectangles), rows)
