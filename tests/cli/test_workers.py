"""Starting workers and joining their exit codes."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from hardy.cli import workers
from hardy.cli.workers import joint_code, run_workers, worker_environment


@pytest.mark.parametrize(
    ("codes", "signal_number", "joint"),
    [
        ([0, 0], None, 0),
        ([0, 0], signal.SIGINT, 0),
        ([2, 2], None, 2),
        ([2, 143], None, 2),
        ([2, -15], None, 2),
        ([1, 143], None, 1),
        ([2, 1], None, 1),
        ([-9, 143], None, 1),
        ([-11, 2], None, 1),
        ([143, 143], None, 1),
        ([130, 130], signal.SIGINT, 130),
        ([130, 0], signal.SIGINT, 130),
        ([-2, 130], signal.SIGINT, 130),
        ([143, -15], signal.SIGTERM, 143),
        ([1, 130], signal.SIGINT, 1),
    ],
)
def test_one_code_for_all(codes, signal_number, joint):
    assert joint_code(codes, signal_number) == joint


def test_a_worker_is_told_who_it_is_and_cores_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    said = worker_environment({"A": "b"}, 1, 4, meeting=tmp_path / "meeting")
    assert said == {
        "A": "b",
        "OMP_NUM_THREADS": "2",
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "HARDY_MEETING": f"file://{tmp_path}/meeting",
    }
    assert worker_environment({"OMP_NUM_THREADS": "5"}, 0, 4, meeting=tmp_path)["OMP_NUM_THREADS"] == "5"


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Let each worker run a script in the place of `-m hardy`."""

    def started(body, *, num_workers=2):
        script = tmp_path / "worker.py"
        script.write_text(
            "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + textwrap.dedent(body)
        )
        real = subprocess.Popen
        monkeypatch.setattr(
            workers.subprocess, "Popen", lambda command, **rest: real([sys.executable, str(script)], **rest)
        )
        return run_workers(num_workers, ["train", "tiny"])

    return started


@pytest.mark.mp
def test_workers_run_side_by_side_and_all_succeed(play, tmp_path):
    code = play(f"open({str(tmp_path)!r} + f'/done-{{rank}}', 'w').write(os.environ['HARDY_MEETING'])")
    assert code == 0
    assert (tmp_path / "done-0").read_text() == (tmp_path / "done-1").read_text()


@pytest.mark.mp
def test_when_one_fails_the_others_are_told_to_end_and_its_code_counts(play):
    started_s = time.monotonic()
    assert play("sys.exit(2) if rank == 1 else time.sleep(60)") == 2
    assert time.monotonic() - started_s < 10


@pytest.mark.mp
def test_a_worker_that_does_not_end_is_killed(play, monkeypatch):
    monkeypatch.setattr(workers, "GRACE_S", 0.2)
    body = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1) if rank == 0 else time.sleep(60)
    """
    assert play(body) == 1


@pytest.mark.mp
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_every_worker_once_and_they_may_take_their_time(play, tmp_path, number, code):
    body = f"""
    count = 0
    def note(number, frame):
        global count
        count += 1
    signal.signal({int(number)}, note)
    open({str(tmp_path)!r} + f'/ready-{{rank}}', 'w')
    while len([name for name in os.listdir({str(tmp_path)!r}) if name.startswith('ready')]) < 2:
        time.sleep(0.01)
    if rank == 0:
        os.kill(os.getppid(), {int(number)})
    time.sleep(0.5)
    sys.exit({code} if count == 1 else 1)
    """
    assert play(body) == code


@pytest.mark.mp
def test_handlers_are_given_back(play):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    play("pass")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
