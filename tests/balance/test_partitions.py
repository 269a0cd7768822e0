"""Groups of a slot."""

import numpy as np
import pytest

from hardy.balance import partitions
from hardy.balance.cost import DecoderSizes, analytic_cost
from hardy.balance.partitions import GroupChooser, all_partitions, count_partitions, cut_evenly

SIZES = DecoderSizes(8, 512, 1376, 8, 8, 64, 4096)


@pytest.mark.parametrize(
    ("num_ranks", "count"), [(4, 4), (8, 10), (16, 36), (32, 202), (64, 1828), (128, 27338)]
)
def test_numbers_of_partitions(num_ranks, count):
    sizes = [1 << k for k in range(num_ranks.bit_length())][::-1]
    assert count_partitions(num_ranks, sizes) == count
    if num_ranks <= 32:
        found = list(all_partitions(num_ranks, sizes))
        assert len(set(found)) == count
        assert all(sum(c * s for c, s in zip(p, sizes, strict=True)) == num_ranks for p in found)


def test_64_ranks_without_single_ones():
    assert count_partitions(64, [64, 32, 16, 8, 4, 2]) == 202


def chunks(count, *, size=150, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        drawn = np.exp(rng.normal(6, 1.3, size)).astype(np.int64) + 1
        yield np.sort(np.minimum(drawn, 16000))[::-1]


def makespan(groups, lengths):
    return max(float(cost.times(lengths[taken]).sum()) for cost, taken in groups)


def test_the_beam_search_finds_what_trying_all_finds(monkeypatch):
    schemes = analytic_cost(SIZES, cap_tokens=4000, degrees=(1, 2, 4, 8, 16, 32, 64)).schemes
    for lengths in chunks(4, size=60):
        lengths[:14] = [40000, 20000, *[9000] * 4, *[4500] * 8]
        beam = makespan(GroupChooser(schemes, num_ranks=64).choose(lengths), lengths)
        with monkeypatch.context() as patched:
            patched.setattr(partitions, "MOST_PARTITIONS", 5000)
            exact = makespan(GroupChooser(schemes, num_ranks=64).choose(lengths), lengths)
        assert beam <= exact * 1.01


def test_a_slot_that_overflows_is_refused():
    schemes = analytic_cost(SIZES, cap_tokens=100, degrees=(1, 2)).schemes
    assert GroupChooser(schemes, num_ranks=2).choose(np.array([150, 60])) is None
    groups = GroupChooser(schemes, num_ranks=2).choose(np.array([150, 40]))
    assert [(cost.scheme.context, taken.tolist()) for cost, taken in groups] == [(2, [0, 1])]


def test_groups_cover_all_ranks_large_ones_first():
    schemes = analytic_cost(SIZES, cap_tokens=9000, degrees=(1, 2, 4, 8)).schemes
    for lengths in chunks(3, size=40):
        groups = GroupChooser(schemes, num_ranks=13).choose(lengths)
        sizes = [cost.scheme.ranks for cost, _ in groups]
        assert sum(sizes) == 13 and sizes == sorted(sizes, reverse=True)
        taken = np.concatenate([taken for _, taken in groups])
        assert sorted(taken.tolist()) == list(range(40))


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 7])
def test_runs_are_as_even_as_can_be(num_chunks):
    rng = np.random.default_rng(num_chunks)
    lengths = np.sort(rng.integers(1, 50, 9))[::-1]
    runs = cut_evenly(lengths, num_chunks)
    assert len(runs) <= num_chunks
    assert np.concatenate([lengths[run] for run in runs]).tolist() == lengths.tolist()
    most = max(int(lengths[run].sum()) for run in runs)
    # One token less would need another run.
    count, filled = 1, 0
    for size in lengths.tolist():
        if size > most - 1:
            count = num_chunks + 1
            break
        if filled + size > most - 1:
            count, filled = count + 1, 0
        filled += size
    assert count > num_chunks
