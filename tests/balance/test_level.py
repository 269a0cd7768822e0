"""Levelled batches hold the same documents, none further away than asked, in about equal work."""

import numpy as np
import pytest

from hardy.balance.cost import LengthCostModel, SchemeCost
from hardy.balance.lengths import draw_lengths
from hardy.balance.level import LEEWAYS, LevelledPieces, level, level_batches
from hardy.balance.packing import StreamPacker
from hardy.balance.plan import Scheme
from hardy.rng import numpy_generator_for

LENGTHS = draw_lengths("wikipedia", 3000, numpy_generator_for(0, "test level")).clip(1, 2048)
COST = LengthCostModel(schemes=(SchemeCost(scheme=Scheme(), a=1.0, b=600.0, c=0.0, cap_tokens=4096),))


def level_by_hand(work, *, drawn, rooms, sizes=None):
    sizes = np.ones(len(work), np.int64) if sizes is None else np.array(sizes)
    return level(np.array(work, dtype=float), sizes, np.array(drawn), rooms=rooms).tolist()


def variation(batches, lengths=LENGTHS):
    work = np.array([COST.times(lengths[batch]).sum() for batch in batches])
    return work.std() / work.mean()


def test_levelling_by_hand():
    assert level_by_hand([5, 3, 4, 3, 3], drawn=[0, 1, 0, 1, 0], rooms=[3]) == [1, 0, 0, 1, 0]
    assert level_by_hand([9, 8, 1, 2], drawn=[0, 0, 1, 1], rooms=[2]) == [0, 1, 0, 1]
    # The document of 10 was drawn for the last batch, and stays there.
    assert level_by_hand([4, 5, 10, 1], drawn=[0, 0, 1, 1], rooms=[4]) == [0, 0, 1, 0]


def test_the_first_room_that_will_do_is_taken():
    case = {"drawn": [1, 0, 1, 0, 1], "sizes": [2, 3, 2, 3, 2]}
    work = [2, 8, 2, 8, 2]
    assert level_by_hand(work, **case, rooms=[6]) == [1, 0, 1, 0, 1]  # nothing else fits
    wider = level_by_hand(work, **case, rooms=[6, 7, 12])
    assert sorted(np.bincount(wider, weights=case["sizes"]).tolist()) == [5, 7]
    assert sorted(np.bincount(wider, weights=work).tolist()) == [10, 12]


def test_one_drawn_larger_may_stay_so_and_others_stay_out_of_its_room():
    taken = level_by_hand([40, 1, 2, 3], drawn=[0, 1, 1, 2], sizes=[40, 1, 2, 3], rooms=[3])
    assert taken.count(taken[0]) == 1 and np.bincount(taken, weights=[40, 1, 2, 3]).max() == 40


def test_what_cannot_be_evened_out_stays_as_drawn():
    assert level_by_hand([4, 4, 4, 4], drawn=[0, 1, 1, 0], rooms=[2]) == [0, 1, 1, 0]
    assert level_by_hand([7, 1], drawn=[0, 0], rooms=[2]) == [0, 0]


@pytest.mark.parametrize("delay_steps", [1, 7, 100])
def test_documents_move_by_so_many_batches_at_most_and_none_is_lost(delay_steps):
    batches = np.split(np.arange(3000), 60)
    sizes, times = np.ones(3000, np.int64), COST.times(LENGTHS)
    found = level_batches(batches, times, sizes, room=50, delay_steps=delay_steps)
    assert [batch.size for batch in found] == [50] * 60
    moved = np.concatenate([k - batch // 50 for k, batch in enumerate(found)])
    assert 0 < np.abs(moved).max() <= delay_steps
    assert sorted(np.concatenate(found).tolist()) == list(range(3000))
    places = [float((batch // 50).mean()) for batch in found]
    windows = [places[k : k + delay_steps + 1] for k in range(0, 60, delay_steps + 1)]
    assert all(window == sorted(window) for window in windows)
    assert variation(found) < {1: 0.8, 7: 0.4, 100: 0.05}[delay_steps] * variation(batches)


class Case:
    """Four epochs of packs of 2,048 tokens, 4 to a batch, of which no epoch has a multiple."""

    packer = StreamPacker(LENGTHS[:500], pack_tokens=2048, document_tokens=2048, seed=0)
    steps = range(packer.packs_per_epoch)

    def __init__(self, delay_steps):
        self.levelled = LevelledPieces(
            self.drawn_packs,
            packs_per_epoch=self.packer.packs_per_epoch,
            batch_packs=4,
            delay_steps=delay_steps,
            times=COST.times,
        )

    def drawn_packs(self, packs):
        return [piece for pack in packs for piece in self.packer.pieces(pack)]

    def drawn(self, step):
        return self.drawn_packs(range(4 * step, 4 * step + 4))


def test_windows_end_with_their_epoch_and_a_batch_of_two_epochs_stays_as_drawn():
    case, per_epoch = Case(5), Case.packer.packs_per_epoch
    assert per_epoch % 4
    windows = [case.levelled.window(step) for step in case.steps]
    assert all(step in window for step, window in enumerate(windows))
    distinct = sorted(set(windows), key=lambda window: window.start)
    assert [step for window in distinct for step in window] == list(case.steps)
    assert max(map(len, distinct)) == 6
    epochs = [{pack // per_epoch for step in w for pack in range(4 * step, 4 * step + 4)} for w in distinct]
    straddling = [window for window, found in zip(distinct, epochs, strict=True) if len(found) == 2]
    assert len(straddling) >= 2 and all(len(window) == 1 for window in straddling)
    for (step,) in straddling:
        assert case.levelled.at(step) == (case.drawn(step), 0)


def test_pieces_of_a_run_are_dealt_out_within_windows():
    case = Case(6)
    found = [case.levelled.at(step) for step in case.steps]
    for window in {case.levelled.window(step) for step in case.steps}:
        came = {piece: step for step in window for piece in found[step].pieces}
        drew = {piece: step for step in window for piece in case.drawn(step)}
        assert came.keys() == drew.keys()
        for step in window:
            assert found[step].delay_steps == max(step - drew[piece] for piece in found[step].pieces) <= 6
    lengths = [np.array([piece.stop - piece.start for piece in batch.pieces]) for batch in found]
    assert max(int(own.sum()) for own in lengths) <= 8192 * (1 + max(LEEWAYS))
    drawn = [np.array([piece.stop - piece.start for piece in case.drawn(step)]) for step in case.steps]
    assert variation(range(len(found)), lengths) < 0.6 * variation(range(len(drawn)), drawn)


def test_a_run_that_begins_anywhere_sees_the_same_batches():
    whole, late = Case(6), Case(6)
    assert late.levelled.at(20) == whole.levelled.at(20)
    assert [late.levelled.at(step) for step in (3, 21, 4)] == [whole.levelled.at(k) for k in (3, 21, 4)]


def test_without_delay_batches_are_as_drawn():
    case = Case(0)
    assert all(case.levelled.at(step) == (case.drawn(step), 0) for step in case.steps)
