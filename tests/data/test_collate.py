"""Examples become one row, in our form and in that of transformers; each form checked against the other's."""

import numpy as np
import pytest
import torch

from hardy.config import UserError
from hardy.data.collate import PackingCollator, flattened
from hardy.ops.packed import IGNORED_LABEL

EXAMPLES = [
    {"input_ids": [11, 12, 13, 14]},
    {"input_ids": [21], "labels": [21]},
    {"input_ids": [31, 32, 33], "labels": [IGNORED_LABEL, IGNORED_LABEL, 33]},
]


def test_a_row_predicts_within_documents_only():
    batch = PackingCollator(output="packed")(EXAMPLES)
    assert batch.tokens_T.tolist() == [11, 12, 13, 14, 21, 31, 32, 33]
    assert batch.labels_T.tolist() == [12, 13, 14, -100, -100, -100, 33, -100]
    assert batch.layout.lengths == (4, 1, 3) and batch.num_targets == 4
    assert batch.layout.positions_T.tolist() == [0, 1, 2, 3, 0, 0, 1, 2]


def test_flattened_is_what_transformers_makes():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra dev)")
    theirs = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    plain = [EXAMPLES[0], {"input_ids": [31, 32, 33]}]
    for examples in (plain, EXAMPLES[1:]):
        ours, expected = PackingCollator()(examples), theirs(examples)
        assert ours.keys() == expected.keys() - {"attention_mask"}
        for key, value in expected.items():
            if torch.is_tensor(value):
                assert torch.equal(ours[key], value) and ours[key].dtype == value.dtype, key
            else:
                assert ours[key] == value, key


def test_labels_of_both_forms_are_the_same_targets():
    batch = PackingCollator(output="packed", pad_to_multiple=5)(EXAMPLES)
    shifted = torch.nn.functional.pad(flattened(batch)["labels"][0], (0, 1), value=IGNORED_LABEL)[1:]
    assert torch.equal(shifted, batch.labels_T)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_lists_arrays_and_tensors_are_taken(make):
    row = PackingCollator()([{"input_ids": make([3, 4]), "labels": make([3, 4])}])
    assert row["input_ids"].tolist() == [[3, 4]] and row["labels"].tolist() == [[-100, 4]]
    assert row["input_ids"].dtype == row["labels"].dtype == torch.int64


def test_padding_is_a_document_without_labels():
    batch = PackingCollator(output="packed", pad_to_multiple=6)(EXAMPLES)
    assert batch.layout.lengths == (4, 1, 3, 4) and batch.num_targets == 4
    assert batch.tokens_T[8:].tolist() == [0] * 4 and batch.labels_T[8:].tolist() == [-100] * 4
    whole = PackingCollator(output="packed", pad_to_multiple=4)(EXAMPLES)
    assert whole.layout.lengths == (4, 1, 3)


def test_nothing_is_a_micro_batch_of_zero_weight():
    row = PackingCollator(pad_to_multiple=2)([])
    assert row["input_ids"].tolist() == [[0, 0]] and row["labels"].tolist() == [[-100, -100]]
    assert row["cu_seq_lens_q"].tolist() == [0, 1, 2] and row["max_length_q"] == 1
    assert PackingCollator(output="packed")([]).num_targets == 0


def test_a_long_document_is_refused_split_or_truncated():
    long = [{"input_ids": [1, 2, 3, 4, 5]}, {"input_ids": [6, 7]}]
    with pytest.raises(
        UserError, match=r"example 0 .* 5 tokens, more than document_tokens=2; raise it, or set"
    ):
        PackingCollator(document_tokens=2)(long)
    split = PackingCollator(output="packed", document_tokens=2, long_documents="split")(long)
    assert split.layout.lengths == (2, 2, 1, 2)
    assert split.tokens_T.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert split.labels_T.tolist() == [2, -100, 4, -100, -100, 7, -100]
    cut = PackingCollator(output="packed", document_tokens=2, long_documents="truncate")(long)
    assert cut.tokens_T.tolist() == [1, 2, 6, 7] and cut.labels_T.tolist() == [2, -100, 7, -100]
    exact = PackingCollator(document_tokens=5)(long)
    assert exact["max_length_k"] == 5


@pytest.mark.parametrize(
    ("example", "shapes"),
    [
        ({"input_ids": []}, r"\[0\] and labels of \[0\]"),
        ({"input_ids": [1, 2], "labels": [1]}, r"\[2\] and labels of \[1\]"),
        ({"input_ids": [[1, 2]]}, r"\[1, 2\] and"),
    ],
)
def test_examples_that_are_no_document_are_refused(example, shapes):
    with pytest.raises(UserError, match=f"example 1 .*{shapes}.*leave empty"):
        PackingCollator()([{"input_ids": [1]}, example])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"output": "flat"}, "output: .*'flattened'"),
        ({"long_documents": "drop"}, "long_documents: .*drop"),
        ({"document_tokens": 0}, "document_tokens must be at least 1, got 0"),
        ({"pad_to_multiple": 0}, "pad_to_multiple must be at least 1, got 0; 1 pads nothing"),
    ],
)
def test_settings_are_checked(settings, text):
    with pytest.raises(UserError, match=text):
        PackingCollator(**settings)
