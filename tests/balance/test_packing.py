"""Packing: every token once per epoch, within the budget, by arithmetic."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.balance.packing import PACKERS, StreamPacker, WholePacker, best_fit_decreasing

lengths_lists = st.lists(st.integers(1, 60), min_size=1, max_size=25)
budgets = st.integers(1, 40).flatmap(lambda tokens: st.tuples(st.just(tokens), st.integers(1, tokens)))


def tokens_of(pieces):
    return [(piece.document, token) for piece in pieces for token in range(piece.start, piece.stop)]


def all_tokens(lengths):
    return {(document, token) for document, length in enumerate(lengths) for token in range(length)}


def best_fit_one_at_a_time(lengths, capacity_tokens):
    """The textbook loop that the grouped algorithm must equal."""
    packs = []
    for length in sorted(lengths, reverse=True):
        fitting = [pack for pack in packs if sum(pack) + length <= capacity_tokens]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            packs.append([length])
    return sorted(map(sum, packs))


@settings(max_examples=60)
@given(lengths=lengths_lists, budget=budgets, seed=st.integers(0, 3), num_epochs=st.integers(1, 3))
@pytest.mark.parametrize("name", PACKERS)
def test_every_token_exactly_once_per_epoch_and_no_piece_too_long(name, lengths, budget, seed, num_epochs):
    pack_tokens, document_tokens = budget
    packer = PACKERS[name](
        lengths, pack_tokens=pack_tokens, document_tokens=document_tokens, seed=seed, num_epochs=num_epochs
    )
    packs = [packer.pieces(index) for index in range(packer.num_packs)]
    seen = Counter(token for pieces in packs for token in tokens_of(pieces))
    assert seen == {token: num_epochs for token in all_tokens(lengths)}
    for pieces in packs:
        sizes = [piece.stop - piece.start for piece in pieces]
        assert pieces and min(sizes) >= 1 and max(sizes) <= document_tokens and sum(sizes) <= pack_tokens


@settings(max_examples=40)
@given(lengths=lengths_lists, budget=budgets)
def test_each_epoch_of_the_stream_shows_every_token_once_in_full_packs_but_one(lengths, budget):
    pack_tokens, document_tokens = budget
    packer = StreamPacker(lengths, pack_tokens=pack_tokens, document_tokens=document_tokens, seed=1)
    assert packer.num_packs is None
    num_packs = packer.packs_per_epoch
    assert num_packs == -(-sum(lengths) // pack_tokens)
    for epoch in (0, 1):
        indices = range(epoch * num_packs, (epoch + 1) * num_packs)
        packs = [tokens_of(packer.pieces(index)) for index in indices]
        assert Counter(token for tokens in packs for token in tokens) == Counter(all_tokens(lengths))
        rest = sum(lengths) - (num_packs - 1) * pack_tokens
        assert Counter(map(len, packs)) == Counter([pack_tokens] * (num_packs - 1) + [rest])
        assert {packer.epoch_of(index) for index in indices} == {epoch}


def test_neighbouring_packs_of_the_stream_come_from_different_documents():
    """One document fills ten packs: a batch of ten must not be that document."""
    packer = StreamPacker([1000] * 50, pack_tokens=100, document_tokens=100, seed=0)
    batches = [[packer.pieces(10 * step + i)[0].document for i in range(10)] for step in range(50)]
    assert min(len(set(batch)) for batch in batches) >= 6
    second = [packer.pieces(500 + i)[0].document for i in range(10)]
    assert second != batches[0]


@settings(max_examples=40)
@given(lengths=lengths_lists, budget=budgets)
def test_whole_cuts_only_what_is_too_long_and_keeps_its_packs_between_epochs(lengths, budget):
    pack_tokens, document_tokens = budget
    packer = WholePacker(lengths, pack_tokens=pack_tokens, document_tokens=document_tokens, seed=1)
    num_packs = packer.packs_per_epoch
    first, second = (
        [tuple(packer.pieces(epoch * num_packs + place)) for place in range(num_packs)] for epoch in (0, 1)
    )
    assert sorted(first) == sorted(second)
    num_pieces = Counter(piece.document for pieces in first for piece in pieces)
    assert num_pieces == {document: -(-length // document_tokens) for document, length in enumerate(lengths)}


def test_whole_shuffles_the_packs_of_each_epoch():
    packer = WholePacker([7] * 40, pack_tokens=8, document_tokens=8, seed=0)
    orders = [[packer.pieces(epoch * 40 + place)[0].document for place in range(40)] for epoch in (0, 1)]
    assert orders[0] != orders[1] != list(range(40))
    assert [packer.epoch_of(index) for index in (0, 39, 40, 79, 80)] == [0, 0, 1, 1, 2]


@settings(max_examples=80)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    capacity_tokens=st.integers(30, 60),
)
def test_grouped_best_fit_equals_the_textbook_loop(lengths, capacity_tokens):
    packs = best_fit_decreasing(np.array(lengths), capacity_tokens=capacity_tokens)
    filled = np.bincount(packs, weights=lengths).astype(int)
    assert sorted(filled) == best_fit_one_at_a_time(lengths, capacity_tokens)


def test_best_fit_is_fast_and_tight_for_a_million_pieces():
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1, 1_000_000).astype(np.int64) + 1, 4096)
    packs = best_fit_decreasing(lengths, capacity_tokens=4096)
    filled = np.bincount(packs, weights=lengths)
    assert filled.max() <= 4096
    assert filled.size <= 1.001 * lengths.sum() / 4096


@pytest.mark.parametrize("name", PACKERS)
def test_the_same_seed_gives_the_same_packs_and_another_gives_others(name):
    lengths = np.random.default_rng(0).integers(1, 200, 500)

    def packs(seed, indices):
        packer = PACKERS[name](lengths, pack_tokens=64, document_tokens=32, seed=seed)
        return {index: packer.pieces(index) for index in indices}

    assert packs(3, range(2000)) == packs(3, reversed(range(2000)))
    assert packs(3, range(50)) != packs(4, range(50))


@pytest.mark.parametrize("name", PACKERS)
def test_a_far_pack_answers_at_once(name):
    packer = PACKERS[name](np.full(1000, 10), pack_tokens=64, document_tokens=64, seed=0)
    far = packer.pieces(10**9)
    assert far == packer.pieces(10**9) and packer.epoch_of(10**9) > 10**6


def test_only_two_epoch_plans_are_kept():
    packer = StreamPacker([10] * 10, pack_tokens=50, document_tokens=50, seed=0)
    first = packer.pieces(0)
    for index in range(20):
        packer.pieces(index)
        assert len(packer._plans._plans) <= 2
    assert packer.pieces(0) == first


@pytest.mark.parametrize(
    ("lengths", "settings_", "said"),
    [
        ([], {"pack_tokens": 4, "document_tokens": 4}, "at least one document"),
        ([3, 0], {"pack_tokens": 4, "document_tokens": 4}, "at least one token"),
        ([3], {"pack_tokens": 4, "document_tokens": 5}, "document_tokens must be 1 to pack_tokens=4, got 5"),
    ],
)
@pytest.mark.parametrize("name", PACKERS)
def test_impossible_input_is_refused(name, lengths, settings_, said):
    with pytest.raises(ValueError, match=said):
        PACKERS[name](lengths, seed=0, **settings_)


@pytest.mark.parametrize("name", PACKERS)
def test_packs_that_do_not_exist_are_refused(name):
    packer = PACKERS[name]([4, 4], pack_tokens=4, document_tokens=4, seed=0, num_epochs=1)
    assert packer.num_packs == 2
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"no pack {index}; there are 2"):
            packer.pieces(index)
