"""The workers of one replica, which end as one."""

import os
import signal
import subprocess
import sys
import time

import pytest

from hardy.cli import team
from hardy.cli.team import Team, tell


@pytest.fixture
def made(make_process):
    workers, reports = [make_process() for _ in range(3)], []
    return Team(workers, lambda: reports.append("lost")), workers, reports


def test_all_that_end_well_end_it_well(made):
    whole, workers, reports = made
    for worker in workers:
        assert whole.poll() is None
        worker.code = 0
    assert whole.poll() == whole.wait() == 0 and not reports
    assert [worker.heard for worker in workers] == [[]] * 3


def test_when_one_is_lost_it_is_said_at_once_and_the_others_are_told_to_end(made):
    whole, workers, reports = made
    workers[1].code = -signal.SIGKILL
    assert whole.poll() is None and reports == ["lost"]
    assert [worker.heard for worker in workers] == [[signal.SIGTERM], [], [signal.SIGTERM]]
    workers[0].code = 143
    assert whole.poll() is None
    workers[2].code = 1
    assert whole.poll() == -signal.SIGKILL and reports == ["lost"]  # once, and the cause is what counts
    assert workers[2].heard == [signal.SIGTERM]


@pytest.mark.parametrize("codes", [(1, -11), (-11, 1), (1, 2), (2, 1)])
def test_of_several_seen_at_once_the_cause_is_not_the_one_that_only_lost_its_neighbour(made, codes):
    whole, workers, _ = made
    workers[0].code, workers[1].code, workers[2].code = *codes, 1
    assert whole.poll() == next(code for code in codes if code != 1)


def test_all_that_break_alike_are_a_failure(made):
    whole, workers, reports = made
    for worker in workers:
        worker.code = 1
    assert whole.poll() == 1 and reports == ["lost"]


def test_one_that_does_not_end_is_killed_after_the_grace(made, monkeypatch):
    whole, workers, _ = made
    workers[0].code = 2
    assert whole.poll() is None and whole.poll() is None
    assert workers[1].heard == [signal.SIGTERM]
    monkeypatch.setattr(time, "monotonic", lambda: float("inf"))
    assert whole.poll() is None
    assert workers[1].heard == workers[2].heard == [signal.SIGTERM, signal.SIGKILL]


def test_who_ends_as_told_is_not_lost_and_may_save_while_others_have_ended(made):
    whole, workers, reports = made
    tell([whole], signal.SIGINT)
    workers[2].code = 130
    assert whole.poll() is None and not reports
    assert [worker.heard for worker in workers] == [[signal.SIGINT]] * 3
    workers[0].code, workers[1].code = 0, 130
    assert whole.poll() == 130 and not reports
    tell([whole], signal.SIGTERM)
    assert workers[0].heard == [signal.SIGINT]  # it has ended


def test_another_signal_than_it_was_told_is_a_loss(made):
    whole, workers, reports = made
    whole.send_signal(signal.SIGINT)
    workers[1].code = 143
    assert whole.poll() is None and reports == ["lost"]


@pytest.mark.mp
def test_processes_that_are_killed_have_ended(monkeypatch):
    monkeypatch.setattr(team, "LOST_GRACE_S", 0.2)
    deaf = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    workers = [subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) for _ in range(2)]
    whole = Team(workers, lambda: None)
    try:
        for worker in workers:
            worker.stdout.readline()
        os.kill(workers[0].pid, signal.SIGKILL)
        deadline_s = time.monotonic() + 30
        while whole.poll() is None:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        assert whole.poll() == -signal.SIGKILL and workers[1].returncode == -signal.SIGKILL
    finally:
        whole.kill()
        assert whole.wait() == -signal.SIGKILL
        for worker in workers:
            worker.stdout.close()
