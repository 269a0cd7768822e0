"""A worker's rows as a layout: positions, labels, filling."""

from functools import partial

import pytest
import torch

from hardy.distributed.balance.layouts import (
    GatherLayout,
    UlyssesLayout,
    gather_layout,
    idle_batch,
    row_counts,
    shard_batch,
    ulysses_layout,
)
from hardy.distributed.simulation import SimWorld
from hardy.ops.packed import IGNORED_LABEL, Borders, DocumentLayout, PackedBatch

LENGTHS = (30, 1, 17, 2, 5)
MAKERS = [
    pytest.param(lambda group: gather_layout(LENGTHS, group, split_tokens=0), id="cut-all"),
    pytest.param(lambda group: gather_layout(LENGTHS, group, split_tokens=4), id="cut-long"),
    pytest.param(lambda group: gather_layout(LENGTHS, group, split_tokens=99), id="cut-none"),
    pytest.param(lambda group: ulysses_layout(LENGTHS, group), id="ulysses"),
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_rows_keep_positions_and_labels_and_every_token_is_somewhere_once(make, size, pack_of):
    pack = pack_of(LENGTHS)(range(len(LENGTHS)))
    pack.labels_T[-1] = 7  # a document that goes on elsewhere
    layouts = SimWorld(size).run(make)
    seen = []
    for layout in layouts:
        batch = shard_batch(pack, layout)
        real = layout.token_of_T < sum(LENGTHS)
        tokens = layout.token_of_T[real]
        seen += tokens.tolist()
        assert torch.equal(layout.positions_T[real], pack.layout.positions_T[tokens])
        assert torch.equal(batch.tokens_T[real], pack.tokens_T[tokens])
        assert torch.equal(batch.labels_T[real], pack.labels_T[tokens])
        assert (batch.labels_T[~real] == IGNORED_LABEL).all()
        assert batch.num_targets == int((batch.labels_T != IGNORED_LABEL).sum())
        assert layout.num_tokens == batch.tokens_T.numel() == layout.positions_T.numel() > 0
        assert (
            layout.cumulative_S.tolist() == DocumentLayout.from_lengths(layout.lengths).cumulative_S.tolist()
        )
    assert sorted(seen) == list(range(sum(LENGTHS)))


def test_workers_share_equally_many_rows_and_only_those_of_cut_documents():
    layouts = SimWorld(2).run(lambda comm: gather_layout((9, 3), comm, split_tokens=2))
    assert [layout.shared_rows for layout in layouts] == [5, 5]
    assert [layout.num_tokens for layout in layouts] == [5, 8]  # the short one whole beside the emptier
    assert (layouts[1].token_of_T == 12).sum() == 1  # 4 of 9 tokens: one row of filling


def test_a_worker_for_whom_nothing_is_left_has_one_row_of_filling():
    layouts = SimWorld(3).run(lambda comm: gather_layout((4,), comm, split_tokens=99))
    assert [layout.lengths for layout in layouts] == [(4,), (1,), (1,)]
    assert layouts[2].token_of_T.tolist() == [4] and layouts[2].shared_rows == 0


def test_filling_looks_at_itself_alone():
    layouts = SimWorld(2).run(lambda comm: gather_layout((9,), comm, split_tokens=0))
    (short,) = [layout for layout in layouts if (layout.token_of_T == 9).any()]
    assert short.group.rank == 1
    place = len(short.lengths) - 1
    assert short.keys.lengths[place] == short.lengths[place]
    assert short.key_row_N[-1] == short.group.rank * short.shared_rows + short.shared_rows - 1


def test_no_key_row_occurs_twice_in_a_half():
    for layout in SimWorld(4).run(lambda comm: gather_layout(LENGTHS, comm, split_tokens=1)):
        rows = layout.key_row_N.tolist()
        for half in (rows[: layout.num_front_keys], rows[layout.num_front_keys :]):
            assert len(set(half)) == len(half)


@pytest.mark.parametrize("make", MAKERS)
def test_a_layout_keeps_its_kind_and_all_its_fields_on_its_way_to_a_device(make):
    (layout, _) = SimWorld(2).run(make)
    moved = layout.to("meta")
    assert type(moved) in (GatherLayout, UlyssesLayout) and type(moved) is type(layout)
    for name, value in vars(layout).items():
        if isinstance(value, torch.Tensor):
            assert getattr(moved, name).device.type == "meta" and value.device.type == "cpu"
        elif isinstance(value, Borders):
            assert getattr(moved, name).cumulative_S.device.type == "meta"
        else:
            assert getattr(moved, name) is value


def test_an_idle_batch_has_one_token_and_no_label():
    batch = idle_batch()
    assert batch.tokens_T.tolist() == [0] and batch.num_targets == 0
    assert batch.labels_T.tolist() == [IGNORED_LABEL] and batch.layout.lengths == (1,)


@pytest.mark.parametrize("lengths", [(40,), (7, 90, 1), (1,), (30, 31, 2, 2)])
@pytest.mark.parametrize("make", [partial(gather_layout, split_tokens=4), ulysses_layout])
def test_rows_that_are_filling_are_counted(make, lengths):
    def body(comm):
        pack = plain_pack(lengths)
        layout = make(lengths, comm)
        assert layout.num_filling == int((layout.token_of_T == sum(lengths)).sum())
        return row_counts(shard_batch(pack, layout)), layout.to("cpu").num_filling == layout.num_filling

    found = SimWorld(4).run(body)
    assert all(kept for _, kept in found)
    rows, tokens, shared = (sum(counts) for counts in zip(*(counts for counts, _ in found), strict=True))
    assert tokens == sum(lengths) <= rows
    assert 0 <= shared <= tokens
    cut = [length for length in lengths if length >= 2 * 4 * 4]
    assert shared == (tokens if make is ulysses_layout else sum(cut))


def test_a_plain_pack_has_no_filling_and_an_idle_one_no_token():
    assert row_counts(plain_pack((3, 4))) == (7, 7, 0)
    assert row_counts(idle_batch()) == (1, 0, 0)


def plain_pack(lengths):
    tokens_T = torch.arange(sum(lengths))
    layout = DocumentLayout.from_lengths(lengths)
    return PackedBatch(tokens_T=tokens_T, labels_T=tokens_T, layout=layout, num_targets=sum(lengths))
