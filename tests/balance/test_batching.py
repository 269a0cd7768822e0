"""Global batches hold every document once an epoch, and follow from lengths, settings and epoch alone."""

import numpy as np
import pytest

from hardy.balance.batching import Batching, GlobalBatches
from hardy.config import UserError
from hardy.rng import numpy_generator_for

LENGTHS = numpy_generator_for(0, "test lengths").integers(1, 50, size=103)


def batches_of(epoch=0, lengths=LENGTHS, **settings):
    return [batch.tolist() for batch in GlobalBatches(lengths, Batching(**settings)).of(epoch)]


@pytest.mark.parametrize(
    "settings", [{"sequences": 10}, {"tokens": 200}, {"tokens": 20}, {"sequences": 1000}]
)
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_document_comes_once_an_epoch(settings, epoch):
    found = [index for batch in batches_of(epoch, **settings) for index in batch]
    assert sorted(found) == list(range(103)) and found != list(range(103))


def test_sequences_are_exact_but_for_the_last():
    assert [len(batch) for batch in batches_of(sequences=10)] == [10] * 10 + [3]
    assert [len(batch) for batch in batches_of(sequences=10, last="drop")] == [10] * 10
    assert batches_of(sequences=10, last="drop") == batches_of(sequences=10)[:-1]
    assert batches_of(lengths=[1] * 20, sequences=10, last="drop") == batches_of(
        lengths=[1] * 20, sequences=10
    )


def test_tokens_are_filled_up_and_a_longer_document_is_alone():
    for last in ("keep", "drop"):
        batches = batches_of(tokens=40, last=last)
        totals = [int(LENGTHS[batch].sum()) for batch in batches]
        assert all(total <= 40 or len(batch) == 1 for total, batch in zip(totals, batches, strict=True))
        firsts = [int(LENGTHS[batch[0]]) for batch in batches[1:]]
        assert all(total + first > 40 for total, first in zip(totals, firsts, strict=False))
    assert batches_of(tokens=40, last="drop") == batches_of(tokens=40)[:-1]
    assert max(LENGTHS) > 40


def test_epochs_and_seeds_draw_other_orders():
    orders = [batches_of(epoch, sequences=10, seed=seed) for epoch, seed in [(0, 0), (1, 0), (0, 1)]]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] == batches_of(0, sequences=10)


def test_the_hash_tells_lengths_and_settings_apart():
    settings = [{}, {"seed": 1}, {"sequences": 11}, {"sequences": None, "tokens": 10}, {"last": "drop"}]
    hashes = {GlobalBatches(LENGTHS, Batching(**({"sequences": 10} | more))).hash() for more in settings}
    changed = LENGTHS.copy()
    changed[7] += 1
    hashes.add(GlobalBatches(changed, Batching(sequences=10)).hash())
    assert len(hashes) == 6
    assert GlobalBatches(list(LENGTHS), Batching(sequences=10)).hash() in hashes


@pytest.mark.parametrize("settings", [{}, {"sequences": 3, "tokens": 4}, {"sequences": 0}, {"tokens": -1}])
def test_one_size_is_needed(settings):
    with pytest.raises(UserError, match="one of batching.sequences and batching.tokens, at least 1; got"):
        Batching(**settings)


def test_other_mistakes_are_refused():
    with pytest.raises(UserError, match="batching.last must be keep or drop, got 'pad'"):
        Batching(sequences=1, last="pad")
    for lengths in ([], [3, 0], np.ones((2, 2))):
        with pytest.raises(UserError, match="at least one document, and at least one token in each"):
            GlobalBatches(lengths, Batching(sequences=1))
    with pytest.raises(UserError, match="3 documents do not fill one global batch of batching.sequences=4"):
        GlobalBatches([1, 1, 1], Batching(sequences=4, last="drop"))
