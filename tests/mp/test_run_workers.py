"""The fixture itself: what goes wrong in a worker must reach the test."""

import time

import pytest

pytestmark = pytest.mark.mp


def test_results_come_back_in_rank_order(run_workers):
    assert run_workers(lambda comm: comm.rank * 10) == [0, 10]


def test_a_test_may_start_workers_twice(run_workers):
    assert [run_workers(lambda comm: comm.size, size=size) for size in (2, 1)] == [[2, 2], [1]]


def test_the_traceback_of_a_worker_reaches_the_test(run_workers):
    def body(comm):
        if comm.rank == 1:
            raise KeyError("only worker 1 knows this")

    with pytest.raises(pytest.fail.Exception, match="KeyError: 'only worker 1 knows this'"):
        run_workers(body)


def test_a_worker_that_hangs_is_stopped(run_workers):
    with pytest.raises(pytest.fail.Exception, match="1: 'still running'"):
        run_workers(lambda comm: time.sleep(60 * comm.rank), timeout_s=1.0)
