"""Who computes which tokens of a pack: everything once, evenly, the same on all workers."""

import random

import numpy as np
import pytest

from hardy.distributed.balance.sharding import begins_of, ranges, shard_documents, shared_runs


def tokens_of(sharding, worker):
    """Return (document, place) of each token of a worker, pieces then whole documents."""
    pieces = sharding.pieces[worker]
    runs = zip(pieces.documents, pieces.starts, pieces.stops, strict=True)
    cut = [(int(d), place) for d, start, stop in runs for place in range(start, stop)]
    whole = sharding.whole[worker]
    return cut + [(int(d), place) for d in whole for place in range(sharding.lengths[d])]


def random_lengths(seed, *, least=1, most=400):
    draw = random.Random(seed)
    return tuple(draw.randint(least, most) for _ in range(draw.randint(1, 12)))


@pytest.mark.parametrize("split_tokens", [0, 1, 7, 1000])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 8])
def test_every_token_is_computed_exactly_once(num_workers, split_tokens):
    for seed in range(10):
        lengths = random_lengths(seed)
        sharding = shard_documents(lengths, num_workers=num_workers, split_tokens=split_tokens)
        everyone = [token for worker in range(num_workers) for token in tokens_of(sharding, worker)]
        assert sorted(everyone) == [(d, t) for d, length in enumerate(lengths) for t in range(length)]


def test_a_document_is_cut_in_2w_pieces_of_which_a_worker_takes_one_from_each_end():
    sharding = shard_documents((16,), num_workers=4, split_tokens=2)
    got = [list(zip(p.starts.tolist(), p.stops.tolist(), strict=True)) for p in sharding.pieces]
    assert got == [[(0, 2), (14, 16)], [(2, 4), (12, 14)], [(4, 6), (10, 12)], [(6, 8), (8, 10)]]
    assert [p.num_fronts for p in sharding.pieces] == [1] * 4


def test_what_rounding_leaves_goes_to_another_worker_for_each_document():
    sharding = shard_documents((1, 1, 1, 1), num_workers=4, split_tokens=0)
    assert [p.num_tokens for p in sharding.pieces] == [1, 1, 1, 1]
    assert [p.documents.tolist() for p in sharding.pieces] == [[0], [1], [2], [3]]


def test_no_document_occurs_twice_among_fronts_or_backs():
    for seed in range(20):
        sharding = shard_documents(random_lengths(seed), num_workers=4, split_tokens=0)
        for pieces in sharding.pieces:
            for half in (pieces.documents[: pieces.num_fronts], pieces.documents[pieces.num_fronts :]):
                assert len(set(half.tolist())) == len(half)


def test_only_long_documents_are_cut_and_short_ones_fill_the_emptiest_worker():
    sharding = shard_documents((7, 8, 3, 2, 2), num_workers=2, split_tokens=2)
    assert [set(p.documents.tolist()) for p in sharding.pieces] == [{1}, {1}]
    assert [whole.tolist() for whole in sharding.whole] == [[0], [2, 3, 4]]


@pytest.mark.parametrize("num_workers", [2, 4, 8])
def test_attention_is_even_where_documents_are_long_enough(num_workers):
    """The law of the scheme: pairs of query and key differ by at most 2 % once documents have 64 G tokens."""
    worst = 1.0
    for seed in range(60):
        lengths = random_lengths(seed, least=64 * num_workers, most=4000)
        sharding = shard_documents(lengths, num_workers=num_workers, split_tokens=0)
        areas = np.array(
            [sum(place + 1 for _, place in tokens_of(sharding, worker)) for worker in range(num_workers)]
        )
        worst = max(worst, areas.max() / areas.mean())
    assert worst <= 1.02


@pytest.mark.parametrize("num_workers", [2, 3])
def test_shared_runs_say_where_each_token_of_a_cut_document_lies(num_workers):
    lengths = (9, 2, 12)
    sharding = shard_documents(lengths, num_workers=num_workers, split_tokens=2)
    begins = begins_of(lengths)
    assert begins.tolist() == [0, 9, 11, 23]
    buffer = [None] * (num_workers * sharding.shared_rows)
    for worker, pieces in enumerate(sharding.pieces):
        for offset, token in enumerate(tokens_of(sharding, worker)[: pieces.num_tokens]):
            buffer[worker * sharding.shared_rows + offset] = token
    found = shared_runs(sharding)
    cut = [document for document in range(3) if lengths[document] >= 4 * num_workers]
    for document in cut:
        stops = [pieces.stops[pieces.documents == document] for pieces in sharding.pieces]
        for end in begins[document] + np.concatenate(stops):
            rows, sizes = found.up_to(begins[[document]], np.array([end]))
            looked_at = [buffer[row] for row in ranges(rows, rows + sizes)]
            assert looked_at == [(document, place) for place in range(end - begins[document])]
    both = found.up_to(begins[cut], begins[[document + 1 for document in cut]])
    assert both[1].sum() == sum(lengths[document] for document in cut)


def test_ranges_may_be_empty():
    assert ranges([3, 5, 5], [4, 5, 7]).tolist() == [3, 5, 6]
    assert ranges([], []).tolist() == []


@pytest.mark.parametrize(
    ("lengths", "workers", "split", "told"),
    [
        ((), 2, 0, "at least one token"),
        ((3, 0), 2, 0, "at least one token"),
        ((3,), 0, 0, "num_workers must be at least 1"),
        ((3,), 2, -1, "split_tokens at least 0"),
    ],
)
def test_what_cannot_be_cut_is_refused(lengths, workers, split, told):
    with pytest.raises(ValueError, match=told):
        shard_documents(lengths, num_workers=workers, split_tokens=split)
