"""Predictions of whole runs: what adds up, what must be cheaper, the search for the largest micro-batch."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardy.model.presets import PRESETS
from hardy.train.memory import MOST_PACKS, largest_fitting, predict
from hardy.train.parameter_memory import Choice

GB = 10**9


@given(st.integers(0, 500), st.integers(1, 500))
def test_the_largest_that_fits(fitting, most):
    tried = []
    found = largest_fitting(lambda n: tried.append(n) or n <= fitting, most=most)
    assert found == min(fitting, most)
    assert len(tried) <= 2 * most.bit_length() + 1 and max(tried) <= most


def test_what_is_held_adds_up_to_the_peak():
    found = predict(PRESETS["1b"], Choice(optimizer="smmf", precision="bf16"), tokens=4096)
    assert sum(found.at_peak.values()) == found.peak_bytes
    assert found.at_peak["weights"] == found.held.weights
    assert found.at_peak["state"] == found.held.state + found.held.beside


def test_seven_billion_parameters_fit_into_12_gb_only_by_int8_and_released_gradients():
    """The claim of Q-APOLLO, with embeddings under AdamW, 256 tokens at once, and everything counted."""
    peaks = {
        name: predict(PRESETS["7b"], Choice(optimizer=name, precision="bf16_pure"), tokens=256).peak_bytes
        / GB
        for name in ("adamw", "apollo", "apollo_mini", "smmf", "qapollo")
    }
    assert peaks["qapollo"] < 12 < 25 < min(peaks["apollo_mini"], peaks["smmf"])
    assert peaks["apollo_mini"] < peaks["apollo"] < peaks["adamw"] and peaks["adamw"] > 80
    kept = Choice(optimizer="qapollo", release=False)
    assert predict(PRESETS["7b"], kept, tokens=256).peak_bytes > 20 * GB


def test_recomputed_blocks_make_room_for_longer_packs():
    choice = Choice(optimizer="qapollo", embed_kind="smmf")
    peaks = {
        way: predict(PRESETS["7b"], choice, tokens=2048, recompute=way).peak_bytes / GB
        for way in ("nothing", "blocks")
    }
    assert peaks["blocks"] < 12 < peaks["nothing"]


def test_autocast_keeps_bf16_copies_of_all_linear_weights_until_they_are_used():
    """Also where blocks are recomputed: its cache lives as long as the forward pass."""
    linears = 24 * (4 * 1024**2 + 3 * 1024 * 2736)
    for recompute in ("nothing", "blocks"):
        choice = Choice(optimizer="sgd", precision="bf16")
        found = predict(PRESETS["350m"], choice, tokens=2048, recompute=recompute)
        assert (found.peak_at, found.at_peak["copies"]) == ("loss", 2 * linears)


def test_shards_split_what_replicas_double():
    shape = PRESETS["1b"]
    alone, replicated, sharded = (
        predict(shape, Choice(optimizer="adamw", precision="bf16", replicas=r, shards=s), tokens=1024)
        for r, s in ((1, 1), (8, 1), (1, 8))
    )
    assert sharded.peak_bytes < alone.peak_bytes / 3 < alone.peak_bytes < replicated.peak_bytes
    assert sharded.held.state < alone.held.state / 7.9


def test_whole_gradients_between_micro_batches_cost_fsdp2_its_saving():
    """FSDP2 keeps unsharded fp32 gradients until the last micro-batch (`accumulating`)."""
    choice = Choice(optimizer="adamw", precision="bf16", shards=8)
    one, many = (predict(PRESETS["1b"], choice, tokens=1024, micro_batches=n) for n in (1, 4))
    assert many.at_peak["gradients"] >= 4 * 1.33e9 > 4 * one.at_peak["gradients"]


def test_predictions_come_at_once():
    """A plan makes some 200; the median of 7, on a machine that may be busy."""
    taken_s = []
    for _ in range(7):
        started_s = time.perf_counter()
        predict(PRESETS["13b"], Choice(optimizer="smmf", shards=8), tokens=4096, micro_batches=3)
        taken_s.append(time.perf_counter() - started_s)
    assert sorted(taken_s)[3] < 0.05


def test_the_search_ends():
    assert largest_fitting(lambda packs: True) == MOST_PACKS


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_walked(name):
    found = predict(PRESETS[name], Choice(optimizer="apollo_mini"), tokens=128, recompute="blocks")
    assert found.peak_bytes > found.held.weights + found.held.state
