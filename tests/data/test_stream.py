"""Batches: right tokens, right labels, the same whoever asks and whenever."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.config import UserError
from hardy.data.store import TokenStore
from hardy.data.stream import PackStream

PACKINGS = ("stream", "whole")
END = 777


def make_stream(store, *, packing="stream", pack_tokens=8, document_tokens=None, seed=0, num_epochs=None):
    return PackStream(
        store,
        pack_tokens=pack_tokens,
        document_tokens=document_tokens,
        packing=packing,
        seed=seed,
        end_id=END,
        num_epochs=num_epochs,
    )


def pieces_of(batch):
    return list(
        zip(
            (tokens.tolist() for tokens in batch.tokens_T.split(batch.layout.lengths)),
            (labels.tolist() for labels in batch.labels_T.split(batch.layout.lengths)),
            strict=True,
        )
    )


def same(first, second):
    return (
        torch.equal(first.tokens_T, second.tokens_T)
        and torch.equal(first.labels_T, second.labels_T)
        and first.layout.lengths == second.layout.lengths
    )


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_label_is_the_next_token_of_the_document_even_beyond_the_pack(make_store, packing):
    lengths = [5, 1, 20, 8, 3]
    stream = make_stream(make_store(lengths), packing=packing, document_tokens=6, num_epochs=1)
    batch = stream.batch(range(stream.num_packs))
    assert batch.tokens_T.dtype == batch.labels_T.dtype == torch.int64
    assert batch.num_targets == batch.tokens_T.numel() == batch.layout.num_tokens == sum(lengths)
    seen = {}
    for tokens, labels in pieces_of(batch):
        assert 1 <= len(tokens) <= 6 and labels[:-1] == tokens[1:]
        for token, label in zip(tokens, labels, strict=True):
            if token != 999:
                seen[token] = label
    for index, length in enumerate(lengths):
        tokens = [1000 * index + place for place in range(1, length)]
        assert [seen[token] for token in tokens] == [*tokens[1:], END][: len(tokens)]
    begins = [labels[0] for tokens, labels in pieces_of(batch) if tokens[0] == 999]
    assert sorted(begins) == sorted([1, END, 2001, 3001, 4001])


@settings(max_examples=30)
@given(indices=st.lists(st.integers(0, 200), min_size=1, max_size=6))
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_batch_is_its_packs_end_to_end(tmp_path_factory, packing, indices):
    import numpy as np

    from hardy.data.store import StoreWriter

    folder = tmp_path_factory.mktemp("store") / "s"
    with StoreWriter(folder, vocab_size=300, begin_id=256) as writer:
        writer.append([np.arange(length) for length in (3, 0, 17, 6)], num_bytes=26)
    stream = make_stream(TokenStore(folder), packing=packing)
    batch = stream.batch(indices)
    singles = [stream.batch([index]) for index in indices]
    assert torch.equal(batch.tokens_T, torch.cat([single.tokens_T for single in singles]))
    assert torch.equal(batch.labels_T, torch.cat([single.labels_T for single in singles]))
    assert batch.layout.lengths == sum((single.layout.lengths for single in singles), ())


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_step_is_the_same_for_any_number_of_workers_and_after_reopening(make_store, packing):
    store = make_store([int(length) for length in torch.randint(1, 40, (60,)).tolist()])
    batch_packs = 12

    def step(step_index, num_workers, opened):
        stream = make_stream(opened, packing=packing, seed=5)
        packs = range(step_index * batch_packs, (step_index + 1) * batch_packs)
        shares = [stream.batch(packs[rank::num_workers]) for rank in range(num_workers)]
        return sorted(piece for share in shares for piece in map(str, pieces_of(share)))

    for step_index in (0, 7, 10**6):
        alone = step(step_index, 1, store)
        assert alone == step(step_index, 3, store) == step(step_index, 4, TokenStore(store.folder))
    assert step(0, 1, store) != step(1, 1, store)


@pytest.mark.parametrize("packing", PACKINGS)
def test_going_on_from_the_middle_needs_no_history(make_store, packing):
    store = make_store([9] * 30)
    through = make_stream(store, packing=packing)
    batches = [through.batch([index, index + 1]) for index in range(0, 100, 2)]
    resumed = make_stream(store, packing=packing)
    assert same(resumed.batch([60, 61]), batches[30]) and same(resumed.batch([0, 1]), batches[0])
    other_seed = make_stream(store, packing=packing, seed=1)
    assert not all(same(other_seed.batch([2 * index, 2 * index + 1]), batches[index]) for index in range(10))


def test_epochs_and_sizes(make_store):
    store = make_store([10, 6, 4])
    stream, whole = make_stream(store), make_stream(store, packing="whole")
    assert stream.tokens_per_epoch == whole.tokens_per_epoch == 20
    assert (stream.packs_per_epoch, whole.packs_per_epoch) == (3, 3)
    assert stream.num_packs is None and whole.num_packs is None
    assert [stream.epoch_of(index) for index in (0, 2, 3, 6)] == [0, 0, 1, 2]
    assert [whole.epoch_of(index) for index in (0, 2, 3, 6)] == [0, 0, 1, 2]


def test_the_longest_document_is_cut_where_pieces_are(make_store):
    store = make_store([6, 10, 4])
    assert make_stream(store).longest_document == (1, 8)
    assert make_stream(store, document_tokens=5).longest_document == (1, 5)
    assert make_stream(store, pack_tokens=32).longest_document == (1, 10)


@pytest.mark.parametrize(("packing", "num_packs"), [("stream", 3), ("whole", 3)])
def test_an_evaluation_sees_each_document_once(make_store, packing, num_packs):
    stream = make_stream(make_store([10, 6, 4]), packing=packing, num_epochs=1)
    assert stream.num_packs == num_packs
    assert stream.batch(range(num_packs)).num_targets == 20
    with pytest.raises(IndexError, match="no pack 3"):
        stream.batch([num_packs])


def test_a_split_smaller_than_a_pack_still_evaluates(make_store):
    stream = make_stream(make_store([3]), pack_tokens=256, num_epochs=1)
    assert stream.num_packs == 1 and stream.batch([0]).tokens_T.tolist() == [999, 1, 2]


def test_a_corpus_that_fills_no_batch_is_refused(make_store):
    stream = make_stream(make_store([10, 6, 4]))
    stream.check_size(2)
    with pytest.raises(UserError) as refused:
        stream.check_size(16)
    assert str(refused.value) == (
        "data.source gives 20 tokens to train on (3 packs), and one step needs train.batch_packs x "
        "data.pack_tokens = 16 x 8 = 128; give more text or lower one of the two"
    )


def test_an_empty_split_is_refused(make_store):
    with pytest.raises(UserError, match="holds no document; raise data.validation_fraction"):
        make_stream(make_store([]))


def test_a_piece_longer_than_a_pack_is_refused(make_store):
    with pytest.raises(UserError, match="data.document_tokens must be at most data.pack_tokens=8, got 9"):
        make_stream(make_store([4]), document_tokens=9)
