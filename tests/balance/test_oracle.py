"""The exact oracle."""

import sys

import numpy as np
import pytest

from hardy.balance.assign import equal_takers
from hardy.balance.oracle import best_assignment
from hardy.config import UserError

PROBLEM = equal_takers(np.array([3.0, 3.0, 2.0, 2.0, 2.0]), np.ones(5, np.int64), num_takers=2, room=9)


def test_it_beats_longest_first():
    pytest.importorskip("scipy", reason="the exact oracle needs scipy")
    taken_by = best_assignment(PROBLEM)
    assert np.bincount(taken_by, weights=PROBLEM.times[:, 0]).tolist() == [6.0, 6.0]


def test_without_scipy_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UserError, match="needs scipy.*pip install scipy"):
        best_assignment(PROBLEM)


def test_what_cannot_be_is_said():
    pytest.importorskip("scipy", reason="the exact oracle needs scipy")
    tight = equal_takers(np.array([3.0, 3.0]), np.array([2, 2]), num_takers=1, room=3)
    with pytest.raises(UserError, match="found no assignment"):
        best_assignment(tight)
