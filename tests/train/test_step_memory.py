"""The ledger, and the sizes that stand in it."""

from dataclasses import replace

import pytest

from hardy.model.presets import PRESETS, count_parameters
from hardy.ops.loss import CHUNK_ELEMENTS as CHUNKS_OF_THE_LOSS
from hardy.train.step_memory import CHUNK_ELEMENTS, Ledger, Sizes, StepPlan


def test_the_fullest_moment_is_remembered_with_what_was_held():
    ledger = Ledger()
    ledger.at = "first"
    ledger.take("weights", 10)
    ledger.take("loss", 5, 6)
    ledger.at = "second"
    ledger.drop("loss", 11)
    ledger.take("state", 3)
    assert (ledger.peak_bytes, ledger.peak_at) == (21, "first")
    assert (ledger.peak["loss"], ledger.held["loss"], ledger.held["state"]) == (11, 0, 3)


def test_what_was_not_taken_cannot_be_dropped():
    ledger = Ledger(at="nowhere")
    with pytest.raises(AssertionError, match="nowhere: dropped more loss than were taken"):
        ledger.drop("loss", 1)


def plan(**given):
    return StepPlan(**{"shape": PRESETS["1m"], "tokens": 10, "weight_bytes": 0, "state_bytes": 0, **given})


def test_the_chunks_of_the_loss_are_its_own():
    assert CHUNK_ELEMENTS == CHUNKS_OF_THE_LOSS


@pytest.mark.parametrize("name", PRESETS)
def test_the_parts_of_a_model_are_its_parameters(name):
    for tied in (True, False):
        shape = replace(PRESETS[name], tied=tied)
        assert Sizes(plan(shape=shape)).elements == count_parameters(shape)


@pytest.mark.parametrize(
    ("given", "stream", "product", "gradient", "casts"),
    [
        ({"precision": "fp32"}, 4, 4, 4, False),
        ({"precision": "bf16"}, 4, 2, 4, True),
        ({"precision": "bf16_pure"}, 2, 2, 2, False),
        ({"precision": "bf16", "shards": 2}, 2, 2, 2, False),
        ({"precision": "fp32", "shards": 2}, 4, 4, 4, False),
    ],
)
def test_how_wide_numbers_are(given, stream, product, gradient, casts):
    sizes = Sizes(plan(**given))
    assert (sizes.stream_value, sizes.value, sizes.grad_value, sizes.casts) == (
        stream,
        product,
        gradient,
        casts,
    )
    assert sizes.stream == 10 * 128 * stream and sizes.inner == 10 * 320 * product
    assert sizes.wide == 10 * 128 * 4


def test_the_reference_attention_copies_its_output_for_documents_of_many_lengths():
    copies = [
        Sizes(plan(device=device, precision=precision, equal_documents=equal)).output_copy > 0
        for device in ("cpu", "cuda")
        for precision in ("fp32", "bf16")
        for equal in (False, True)
    ]
    assert copies == [True, False, True, False, True, False, False, False]
