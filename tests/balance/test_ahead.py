"""Plans made in the background come in order, once, with their errors, and cost no wait."""

import threading

import pytest

from hardy.balance.ahead import PlanAhead
from hardy.clock import VirtualClock, WallClock
from hardy.config import UserError


@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_all_come_in_order_whatever_the_depth(depth):
    assert list(PlanAhead(lambda step: step * 10, range(4, 9), depth=depth)) == [40, 50, 60, 70, 80]


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_so_many_are_made_ahead_and_no_more_in_one_thread(depth):
    made, threads, clock = [], set(), WallClock()

    def make(step):
        made.append(step)
        threads.add(threading.get_ident())
        return step

    plans = PlanAhead(make, range(100), depth=depth)
    assert next(plans) == 0
    for _ in range(1000):
        if len(made) == 1 + depth:
            break
        clock.sleep(0.01)
    clock.sleep(0.05)  # time to make more, were more begun
    assert made == list(range(1 + depth))
    assert len(threads) == 1 and (threading.get_ident() in threads) == (depth == 0)
    plans.close()


def test_the_background_works_while_the_caller_does_not_ask():
    third = threading.Event()
    plans = PlanAhead(lambda step: third.set() if step == 2 else None, range(10), depth=2)
    next(plans)  # 0; 1 and 2 are begun
    assert third.wait(timeout=10)
    plans.close()


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_comes_out_at_its_own_step(depth):
    def make(step):
        if step == 1:
            raise UserError("step 1 fits nowhere")
        return step

    plans = PlanAhead(make, range(3), depth=depth)
    assert next(plans) == 0
    with pytest.raises(UserError, match="step 1 fits nowhere"):
        next(plans)
    plans.close()


@pytest.mark.parametrize("depth", [0, 2])
def test_closed_it_gives_nothing_and_leaves_no_thread(depth):
    before = threading.active_count()
    plans = PlanAhead(lambda step: step, range(1000), depth=depth)
    next(plans)
    plans.close()
    plans.close()
    assert threading.active_count() == before
    assert list(plans) == []


def test_planned_when_asked_each_plan_is_waited_for():
    clock = VirtualClock()
    plans = PlanAhead(lambda step: clock.sleep(1.0), range(6), depth=0, clock=clock)
    assert len(list(plans)) == 6 and plans.waited_s == 6.0


@pytest.mark.parametrize("depth", [1, 2])
def test_a_step_that_takes_longer_than_a_plan_does_not_wait(depth):
    clock, begin, done = VirtualClock(), threading.Semaphore(1), threading.Semaphore(0)

    def make(step):
        begin.acquire()  # so that this clock stands still but for plans that a step has time for
        clock.sleep(1.0)
        done.release()

    plans = PlanAhead(make, range(6), depth=depth, clock=clock)
    next(plans)  # nothing could be planned before it
    assert done.acquire(timeout=10)
    for _ in range(5):
        begin.release()
        assert done.acquire(timeout=10)  # a step, in which one plan is made
        next(plans)
    assert plans.waited_s == 1.0 and clock.now() == 6.0
    plans.close()


def test_a_negative_depth_is_refused():
    with pytest.raises(UserError, match="at least 0, got ahead=-1; 0 plans when asked"):
        PlanAhead(lambda step: step, range(3), depth=-1)
