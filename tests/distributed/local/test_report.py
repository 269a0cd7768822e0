"""What rounds tell of themselves."""

import logging
import math

import pytest
import torch

from hardy.distributed.comm import Alone
from hardy.distributed.groups import FixedGroup, Regrouping
from hardy.distributed.local.report import Report, describe
from hardy.distributed.local.round import Pending, Table
from hardy.distributed.simulation import SimWorld

PRODUCTS = [[4.0, 1.0, 9.0], [0.0, 0.0, 16.0]]


def pending_of(products, *, factors=None, weights=((1.0, 0.0), (0.0, 0.0)), flags=((0, 1), (1, 1))):
    table = Table(
        units=[0, 2],
        norms_NU=torch.tensor([[3.0, 4.0], [math.nan, 3.0]], dtype=torch.float64),
        flags_NU=torch.tensor(flags) != 0,
        steps_N=torch.tensor([4.0, 2.0], dtype=torch.float64),
        rates_N=torch.tensor([0.4, 0.2], dtype=torch.float64),
        cosines_N=torch.tensor([0.9, math.nan], dtype=torch.float64),
        weights_NU=torch.tensor(weights, dtype=torch.float64),
    )
    return Pending(
        table=table,
        due_step=0,
        exchanged=[None, None],
        done=[True, True],
        products=[torch.tensor(x, dtype=torch.float64) for x in products],
        factors={0: torch.tensor(0.5), 1: torch.tensor(1.0)} if factors is None else factors,
    )


def test_the_numbers_of_a_round():
    numbers = describe(pending_of(PRODUCTS), Alone(), me=0)
    assert (numbers["outer_grad_norm"], numbers["pseudo_grad_norm"]) == (2.0, 5.0)
    assert numbers["drift_cosine"] == pytest.approx(0.1)
    assert numbers["effective_replicas"] == 1.0 and numbers["weight"] == 0.5
    assert numbers["flagged_replicas"] == [0, 1] and numbers["nonfinite_units"] == 1
    assert numbers["clip_share"] == 0.5 and numbers["replica_steps"] == [4.0, 2.0]
    assert numbers["replica_rates"] == [0.4, 0.2]
    assert numbers["replica_norms"] == [5.0, None] and numbers["replica_weights"] == [0.5, 0.0]
    assert numbers["replica_cosines_before"] == [0.9, None]


def test_shards_add_up_and_a_standstill_has_no_direction():
    world = SimWorld(2)
    split_up = world.run(lambda comm: describe(pending_of(PRODUCTS), comm, me=1))
    assert split_up[0]["pseudo_grad_norm"] == pytest.approx(50**0.5)
    assert describe(pending_of([[0.0, 0.0, 9.0]]), Alone(), me=0)["drift_cosine"] is None


def note(report, pending, *, outer=None, number=1, fragment=0):
    outer = outer or FixedGroup(Alone())
    report.note(pending, fragment=fragment, shards=Alone(), outer=outer, counters={"round": number})


def test_a_line_is_taken_once_and_the_cosine_is_kept_for_the_next_table():
    report = Report([2])
    assert report.take() == {} and math.isnan(report.cosine)
    note(report, pending_of(PRODUCTS))
    line = report.take()
    assert line["round"] == 1 and line["bytes_sent"] == 0 and "members" not in line and "warning" not in line
    assert report.take() == {} and report.cosine == line["drift_cosine"]
    note(report, pending_of([[0.0, 0.0, 9.0]]))
    assert math.isnan(report.cosine)


def test_who_came_and_how_often_a_round_was_begun_again_is_told_once():
    report, group = Report([2]), Regrouping(Alone(), (0, 2), generation=1)
    group.is_elastic = True
    report.redone = 2
    note(report, pending_of(PRODUCTS), outer=group)
    first = report.take()
    assert (first["members"], first["generation"], first["redone"], first["joined"]) == ([0, 2], 1, 2, [])
    group.renew(Alone(), (0, 1, 2), generation=2)
    report.joined = [2, 7]  # one of them was lost since
    note(report, pending_of(PRODUCTS), outer=group)
    second = report.take()
    assert (second["joined"], second["redone"], second["generation"]) == ([1, 2], 0, 2)
    note(report, pending_of(PRODUCTS), outer=group)
    assert report.take()["joined"] == []


LONELY = {"weights": ((0.95, 0.5), (0.05, 0.5)), "flags": ((0, 0), (0, 0))}


def test_weights_on_one_replica_and_clips_in_most_rounds_are_warned_of(caplog):
    report = Report([5, 2])
    with caplog.at_level(logging.WARNING):
        for number in range(1, 21):
            note(report, pending_of(PRODUCTS, **LONELY), number=number, fragment=1)
            assert ("warning" in report.take()) == (number % 10 == 0)
    assert len(caplog.records) == 2
    text = caplog.records[0].getMessage()
    assert text.startswith("round 10: over the last 10 rounds, the averages of 1 of 2 units rest on fewer")
    assert "unit 0: 1.10" in text and "strategy.relative_temperature=true" in text
    assert "1 of 2 units are clipped in more than 50% of the rounds (unit 0: 100%)" in text


def test_a_clip_is_counted_for_its_unit_also_where_another_has_none(caplog):
    report = Report([2])
    even = {"weights": ((0.0, 0.5), (0.0, 0.5)), "flags": ((1, 0), (1, 0))}
    for _ in range(10):
        note(report, pending_of(PRODUCTS, factors={1: torch.tensor(0.5)}, **even))
    assert "1 of 2 units are clipped in more than 50% of the rounds (unit 1: 100%)" in caplog.text


def test_only_one_worker_of_all_says_it_aloud(caplog):
    def body(comm):
        report, outer = Report([2]), FixedGroup(comm)
        for number in range(10):
            note(report, pending_of(PRODUCTS, **LONELY), outer=outer, number=number)
        return report.take()["warning"]

    first, second = SimWorld(2).run(body)
    assert first == second and len(caplog.records) == 1


def test_what_is_watched_goes_on_after_a_resume():
    whole, parted = Report([2, 2]), Report([2, 2])
    for number in range(7):
        note(whole, pending_of(PRODUCTS, **LONELY), number=number, fragment=1)
    saved = whole.state_dict()
    parted.load_state_dict(saved)
    assert parted.cosine == whole.cosine
    for report in (whole, parted):
        report.take()
        for number in range(7, 10):
            note(report, pending_of(PRODUCTS, **LONELY), number=number, fragment=1)
    assert whole.take() == parted.take()
    fresh = Report([2])
    fresh.load_state_dict(Report([2]).state_dict())
    assert math.isnan(fresh.cosine)
