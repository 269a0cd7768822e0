"""Starting workers and joining their exit codes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial

import pytest

from hardy.cli import workers
from hardy.cli.workers import Crew, joint_code, run_replicas, run_workers, worker_environment
from hardy.distributed.elastic import StoreHost


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
        ([129, 129], signal.SIGHUP, 129),
        ([141, 0], None, 141),
        ([141, 143], None, 141),
        ([141, 1], None, 1),
        ([141, 130], signal.SIGINT, 130),
    ],
)
def test_one_code_for_all(codes, signal_number, joint):
    assert joint_code(codes, signal_number) == joint


def test_a_worker_is_told_who_it_is_and_cores_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    said = worker_environment({"A": "b"}, 1, 4, {"HARDY_MEETING": f"file://{tmp_path}/meeting"})
    assert said == {
        "A": "b",
        "OMP_NUM_THREADS": "2",
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "HARDY_MEETING": f"file://{tmp_path}/meeting",
    }
    assert worker_environment({"OMP_NUM_THREADS": "5"}, 0, 4, {})["OMP_NUM_THREADS"] == "5"


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
def test_a_worker_that_does_not_end_is_killed_and_is_not_the_cause(play, monkeypatch):
    monkeypatch.setattr(workers, "GRACE_S", 0.2)
    body = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(2) if rank == 0 else time.sleep(60)
    """
    assert play(body) == 2


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


# ---- Replicas that come and go -----------------------------------------------------------------------------


class Play:
    """A crew of processes that end when they are told to, and what it did."""

    def __init__(self, make_process, *, size=3, max_restarts=2):
        self.began, self.lost, self.make_process = [], [], make_process
        self.crew = Crew(self.begin, self.lost.append, max_restarts=max_restarts, setting="the.setting")
        for replica in range(size):
            self.crew.start(replica)

    def begin(self, replica, restarts):
        self.began.append((replica, restarts))
        return self.make_process()

    def end(self, codes, received=()):
        for replica, code in codes.items():
            self.crew.running[replica].code = code
        self.crew.look(received)
        return self

    def heard(self):
        return {replica: process.heard for replica, process in self.crew.running.items()}


@pytest.fixture
def crew_of(make_process):
    return partial(Play, make_process)


def test_a_lost_replica_is_reported_and_started_again_as_often_as_allowed(crew_of, capsys):
    play = crew_of()
    for lost in range(3):
        assert play.began[3:] == [(1, number + 1) for number in range(lost)]
        play.end({1: -signal.SIGKILL if lost % 2 else 1})
    assert play.lost == [1, 1, 1] and set(play.crew.running) == {0, 2}
    said = capsys.readouterr().err
    assert "replica 1 ended with code 1; started again (1 of 2)" in said
    assert "replica 1 ended by SIGKILL; started again (2 of 2)" in said
    assert "not started again (the.setting=2); 2 go on" in said
    assert play.end({0: 0, 2: 0}).crew.joint_code(None) == 0 and play.lost == [1, 1, 1]


def test_all_lost_for_good_is_a_failure(crew_of):
    assert crew_of(max_restarts=0).end({0: 1, 1: -9, 2: -11}).crew.joint_code(None) == 1


def test_settings_that_cannot_work_end_all_but_not_where_one_has_changed_its_own(crew_of):
    play = crew_of().end({1: 2})
    assert play.heard() == {0: [signal.SIGTERM], 2: [signal.SIGTERM]} and len(play.began) == 3
    assert play.end({0: 143, 2: 143}).crew.joint_code(None) == 2
    play = crew_of().end({1: -9}).end({1: 2})
    assert play.heard() == {0: [], 2: []} and len(play.began) == 4


def test_at_the_end_nobody_is_started_again_and_who_was_stopped_is_woken(crew_of):
    play = crew_of().end({0: 0})
    assert play.heard() == {1: [signal.SIGCONT], 2: [signal.SIGCONT]}
    play.end({1: 1, 2: -9})
    assert len(play.began) == 3 and not play.crew.running and play.crew.joint_code(None) == 0


def test_one_that_hangs_at_the_end_is_killed(crew_of, monkeypatch):
    monkeypatch.setattr(workers, "END_S", -1.0)
    assert crew_of().end({0: 0}).heard() == {number: [signal.SIGCONT, signal.SIGKILL] for number in (1, 2)}


def test_a_signal_is_handed_on_once_and_a_replica_lost_before_does_not_count(crew_of):
    play = crew_of(max_restarts=0).end({0: -9})
    received = [signal.SIGTERM]
    play.end({}, received)
    assert play.end({}, received).heard() == {1: [signal.SIGTERM], 2: [signal.SIGTERM]}
    play.end({1: 143}, received).end({2: 143}, received)
    assert play.crew.joint_code(signal.SIGTERM) == 143 and play.lost == [0, 1, 2]


@pytest.mark.mp
def test_replicas_find_the_store_and_one_that_dies_is_started_again(tmp_path, monkeypatch, capsys):
    script = tmp_path / "replica.py"
    script.write_text(
        "import os, sys\n"
        "rank, lost = os.environ['RANK'], int(os.environ['HARDY_RESTARTS'])\n"
        f"open({str(tmp_path)!r} + f'/{{rank}}-{{lost}}', 'w').write(os.environ['HARDY_STORE'])\n"
        f"dies = os.path.exists({str(tmp_path / 'all-die')!r}) or (rank == '1' and lost < 2)\n"
        "os.kill(os.getpid(), 9) if dies else None\n"
    )
    real = subprocess.Popen
    monkeypatch.setattr(
        workers.subprocess, "Popen", lambda command, **rest: real([sys.executable, str(script)], **rest)
    )
    monkeypatch.delenv("HARDY_MEETING", raising=False)
    assert run_replicas(1, ["train", "tiny"], StoreHost(), max_restarts=3) == 0
    assert (tmp_path / "0-0").read_text().startswith("127.0.0.1:")
    assert run_replicas(2, ["train", "tiny"], StoreHost(), max_restarts=0) == 0
    assert not (tmp_path / "1-1").exists()
    (tmp_path / "all-die").touch()
    assert run_replicas(1, ["train", "tiny"], StoreHost(), max_restarts=0, setting="a.b") == 1
    assert "replica 0 ended by SIGKILL and is not started again (a.b=0)" in capsys.readouterr().err


@pytest.mark.mp
def test_the_workers_of_a_replica_begin_and_end_together_and_meet_anew(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "rank, lost = int(os.environ['RANK']), int(os.environ['HARDY_RESTARTS'])\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "words = [os.environ[name] for name in ('HARDY_MEETING', 'HARDY_STORE', 'HARDY_REPLICA_SIZE')]\n"
        "(folder / f'{rank}-{lost}').write_text(' '.join(words))\n"
        "def wait_for(name):\n"
        "    for _ in range(3000):\n"
        "        if (folder / name).exists():\n"
        "            return\n"
        "        time.sleep(0.01)\n"
        "    sys.exit(1)\n"
        "if rank == 3 and lost == 0:\n"
        "    wait_for('2-0')\n"
        "    os.kill(os.getpid(), 9)\n"
        "if rank == 2 and lost == 0:\n"
        "    time.sleep(60)\n"
        "wait_for('3-1')\n"
    )
    real = subprocess.Popen
    monkeypatch.setattr(
        workers.subprocess, "Popen", lambda command, **rest: real([sys.executable, str(script)], **rest)
    )
    host, lost = StoreHost(), []
    monkeypatch.setattr(host, "report_loss", lost.append)
    started_s = time.monotonic()
    assert run_replicas(2, ["train", "tiny"], host, max_restarts=1, replica_size=2) == 0
    assert time.monotonic() - started_s < 30  # worker 2 would have slept for 60
    said = {path.name: path.read_text().split() for path in tmp_path.glob("[0-3]-[01]")}
    assert sorted(said) == ["0-0", "1-0", "2-0", "2-1", "3-0", "3-1"] and set(lost) == {1}
    assert all(words[1:] == [host.address, "2"] for words in said.values())
    places = {name: words[0] for name, words in said.items()}
    assert (
        places["0-0"] == places["1-0"] and places["2-0"] == places["3-0"] and places["2-1"] == places["3-1"]
    )
    assert len(set(places.values())) == 3


def test_what_all_workers_refuse_is_said_once(capfd):
    assert run_workers(3, ["trian"]) == 2
    assert capfd.readouterr().err.count("there is no verb 'trian'") == 1


def test_replicas_that_refuse_say_it_once(capfd):
    host = StoreHost()
    assert run_replicas(2, ["trian"], host, max_restarts=1) == 2
    assert capfd.readouterr().err.count("there is no verb 'trian'") == 1
