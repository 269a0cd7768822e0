"""The twin, by hand."""

import math

import pytest

from hardy.reference.hydraulis import (
    Replica,
    best_dispatch,
    best_packing,
    best_strategy,
    proposal_time,
    replica_time,
)

FLAT = Replica(1.0, 0.0, 5.0, 6)


def test_a_pipeline_pays_its_slowest_again():
    assert replica_time(FLAT, [[2, 1], [], [3]]) == 10 + 14
    assert replica_time(Replica(1.0, 0.0, 5.0, 6, p=3), [[2, 1], [3]]) == 24 + 2 * 14
    assert replica_time(FLAT, []) == 0


def test_packing_pays_a_constant_a_pack():
    assert best_packing(FLAT, [3, 3]) == 23
    assert best_packing(FLAT, [4, 3]) == 35
    assert best_packing(FLAT, []) == 0
    assert best_packing(FLAT, [7]) == math.inf


def test_dispatch_takes_the_best_division():
    assert best_dispatch([FLAT, FLAT], [3, 2, 2]) == 14
    fast = Replica(0.25, 0.0, 0.0, 9)
    assert best_dispatch([FLAT, fast], [8, 1]) == 16


def test_another_strategy_costs_the_bridge():
    slow, fast = [FLAT], [Replica(0.5, 0.0, 5.0, 6)]
    assert best_strategy([slow, fast], [4], bridge=100.0, before=0) == 21
    assert best_strategy([slow, fast], [4], bridge=1.0, before=0) == 14
    assert best_strategy([slow, fast], [4], bridge=1.0, before=1) == 13


def test_the_program_divides_lengths_among_ranks():
    one, two = Replica(1.0, 0.0, 0.0, 3), Replica(0.5, 0.0, 0.0, 9, g=2)
    assert proposal_time([2, 2], [one], 2) == pytest.approx(4.0)
    assert proposal_time([4, 2], [one, two], 3) == pytest.approx(8.0)
    assert proposal_time([4], [one], 3) == math.inf
