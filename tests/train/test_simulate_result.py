"""What a simulated strategy comes to."""

import json

import numpy as np
import pytest

from hardy.train.simulate_config import read_config
from hardy.train.simulate_result import Ledger, summarise
from hardy.train.simulate_strategies import entries_of


def summary(**more):
    config = read_config({"workers": 2, "task": {"tokens": 10}})
    (entry,) = entries_of([{"name": "edit"}], config, {})
    ledger = Ledger(
        workers=np.array([0, 1, 0]),
        spans_s=np.array([4.0, 10.0, 5.0]),
        ends_s=np.array([4.0, 10.0, 9.0]),
        idle_s=np.array([1.0, 0.0, 0.9]),
        exchange_s=np.array([0.0, 1.9, 0.0]),
        bytes_sent=np.array([3, 8, 2]),
        steps=np.array([4, 9, 5]),
    )
    return summarise(entry, config, ledger, rounds=3, stopped=None, **more)


def test_the_lives_of_a_worker_are_added_up():
    result = summary()
    assert (result.worker_steps, result.steps, result.tokens) == ([9, 9], 18, 180)
    assert (result.virtual_s, result.steps_per_s, result.bytes_sent) == (10.0, 1.8, 8)
    assert (result.idle_share, result.exchange_share) == pytest.approx((0.1, 0.1))


def test_it_can_be_written_as_json():
    told = json.loads(json.dumps(summary().plain()))
    assert told["steps_per_s"] == 1.8 and told["settings"]["name"] == "edit" and told["curve"] == []
