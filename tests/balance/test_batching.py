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


@pytest.mark.parametrize("settings", [{"sequences": 10}, {"tokens": 200}])
@pytest.mark.parametrize("last", ["keep", "drop"])
def test_levelled_batches_take_about_as_long_and_hold_the_same(settings, last):
    times = LENGTHS.astype(float) ** 2
    spread = {}
    for delay_steps in (0, 3):
        batching = Batching(**settings, last=last, delay_steps=delay_steps)
        batches = GlobalBatches(LENGTHS, batching, times=times).of(1)
        if delay_steps == 0:
            drawn = batches
        full = batches if last == "drop" else batches[:-1]
        spread[delay_steps] = np.std([times[batch].sum() for batch in full])
    place = {index: step for step, batch in enumerate(drawn) for index in batch.tolist()}
    moved = {index: abs(step - place[index]) for step, batch in enumerate(batches) for index in batch}
    assert moved.keys() == place.keys() and max(moved.values()) == 3
    assert spread[3] < 0.6 * spread[0]
    sizes = [batch.size if "sequences" in settings else LENGTHS[batch].sum() for batch in batches]
    assert max(sizes) <= next(iter(settings.values()))
    if last == "keep":
        assert batches[-1].tolist() == drawn[-1].tolist()


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
    squares = LENGTHS.astype(float) ** 2
    for times in (squares, 2 * squares):
        hashes.add(GlobalBatches(LENGTHS, Batching(sequences=10, delay_steps=1), times=times).hash())
    assert len(hashes) == 8
    assert GlobalBatches(list(LENGTHS), Batching(sequences=10)).hash() in hashes


@pytest.mark.parametrize("settings", [{}, {"sequences": 3, "tokens": 4}, {"sequences": 0}, {"tokens": -1}])
def test_one_size_is_needed(settings):
    with pytest.raises(UserError, match="one of batching.sequences and batching.tokens, at least 1; got"):
        Batching(**settings)


def test_other_mistakes_are_refused():
    with pytest.raises(UserError, match="batching.last must be keep or drop, got 'pad'"):
        Batching(sequences=1, last="pad")
    with pytest.raises(UserError, match="batching.delay_steps must be at least 0, got -1"):
        Batching(sequences=1, delay_steps=-1)
    for times in (None, np.ones(2)):
        with pytest.raises(
            UserError, match="delay_steps=1 levels .* one for each of the 3 documents, or set"
        ):
            GlobalBatches([1, 2, 3], Batching(sequences=1, delay_steps=1), times=times)
    for lengths in ([], [3, 0], np.ones((2, 2))):
        with pytest.raises(UserError, match="at least one document, and at least one token in each"):
            GlobalBatches(lengths, Batching(sequences=1))
    with pytest.raises(UserError, match="3 documents do not fill one global batch of batching.sequences=4"):
        GlobalBatches([1, 1, 1], Batching(sequences=4, last="drop"))
