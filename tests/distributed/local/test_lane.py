"""Exchanges at once or beside, in order."""

import threading

import pytest
import torch

from hardy.distributed.local.lane import Lane

CPU = torch.device("cpu")


@pytest.mark.parametrize("beside", [False, True])
def test_calls_run_in_order_and_give_what_they_give(beside):
    lane, seen = Lane(beside=beside, device=CPU), []
    futures = [lane.submit(lambda index=index: seen.append(index) or index) for index in range(20)]
    assert [lane.result(future) for future in futures] == seen == list(range(20))
    lane.close()


def test_what_a_call_raises_at_once_is_raised_at_once():
    with pytest.raises(ZeroDivisionError):
        Lane(beside=False, device=CPU).submit(lambda: 1 // 0)


def test_what_a_call_raises_beside_is_raised_where_its_result_is_asked_for():
    lane = Lane(beside=True, device=CPU)
    future = lane.submit(lambda: 1 // 0)
    assert lane.result(lane.submit(lambda: 2)) == 2
    with pytest.raises(ZeroDivisionError):
        lane.result(future)
    lane.close()


def test_beside_means_that_the_caller_goes_on():
    lane, go = Lane(beside=True, device=CPU), threading.Event()
    future = lane.submit(lambda: go.wait(5))
    assert not future.done()
    go.set()
    assert lane.result(future)
    lane.close()


def test_no_gradient_is_recorded_beside():
    lane = Lane(beside=True, device=CPU)
    assert lane.result(lane.submit(torch.is_grad_enabled)) is False
    lane.close()
