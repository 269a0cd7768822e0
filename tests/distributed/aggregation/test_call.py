import pytest
import torch

from hardy.distributed.aggregation import build_aggregator

X = torch.ones(5, 4)


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ([], "there are no blocks; give a worker without columns one of shape"),
        ([X, X[:4]], r"blocks must be \[N, d\] with one N, got shapes \[\[5, 4\], \[4, 4\]\]"),
        ([X[0]], r"blocks must be \[N, d\] with one N"),
        ([X.int()], "blocks must be of floating dtypes, got .*int32"),
        ([X[:0]], "blocks have no rows"),
        ([[1.0]], r"blocks must be a list of tensors \[N, d\], got \['no tensor but a list'\]"),
    ],
)
def test_what_is_no_stack_is_refused(blocks, says):
    with pytest.raises(ValueError, match=says):
        build_aggregator("median", num_faulty=1)(blocks)


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({}, "the rule 'dstar' needs references"),
        (
            {"references": [X[0, :3]]},
            r"references must have the shapes \[\[4\]\] of the blocks' rows, got \[\[3\]\]",
        ),
        ({"references": [X[0], X[0]]}, "references must have the shapes"),
        ({"references": [X[0]], "sample_weights": torch.ones(4)}, "sample_weights must be 5 finite numbers"),
        (
            {"references": [X[0]], "sample_weights": torch.tensor([1, 1, 1, 1, torch.nan])},
            "sample_weights must",
        ),
        ({"references": [X[0]], "sample_weights": torch.zeros(5)}, "leave out rows that are not to count"),
        ({"references": [X[0]], "workers": [1, 2, 3, 4, 4]}, "workers must be 5 different numbers"),
        ({"references": [X[0]], "workers": [1, 2]}, "workers must be 5 different numbers"),
    ],
)
def test_what_does_not_fit_the_stack_is_refused(others, says):
    with pytest.raises(ValueError, match=says):
        build_aggregator("dstar", num_faulty=1)([X], **others)


def test_blocks_may_differ_in_dtype():
    got = build_aggregator("median", num_faulty=1)([X, X.bfloat16(), X.double()]).vectors
    assert [vector.dtype for vector in got] == [torch.float32, torch.bfloat16, torch.float64]
