"""Experiments as processes: what is run again, what is kept, what is shown, what counts as lost."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from hardy.cli import reproduce_runs as runs
from hardy.cli.failure import CommandFailedError
from hardy.cli.reproduce_results import load_experiment, load_result
from hardy.cli.reproduce_runs import PlainProgress, Runner
from hardy.config import UserError


def calls(folder):
    path = folder / "calls.log"
    return path.read_text().splitlines() if path.exists() else []


def nothing(done, total, label):
    pass


def test_a_run_is_shown_kept_and_not_repeated(toys, tmp_path):
    shown, out = [], tmp_path / "out"
    runner, experiment = Runner(out=out, jobs=3), load_experiment(toys / "beta")
    result = runner.run(experiment, lambda *said: shown.append(said))
    assert shown == [(1, 2, "the first"), (2, 2, "the second")]
    assert result.got["gap"] == 0.5
    assert "[1/2] the first" in (out / "beta" / "log.txt").read_text()
    assert calls(toys / "beta") == [f"--out {out / 'beta'} --processes 3"]
    assert runner.run(experiment, nothing).got == result.got
    assert len(calls(toys / "beta")) == 1
    assert not (toys / "beta" / "results").exists()


def test_an_out_that_cannot_be_made_is_named(toys, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out .*/file cannot be written: Not a directory"):
        Runner(out=tmp_path / "file", jobs=1).run(load_experiment(toys / "beta"), nothing)


def test_changed_settings_or_force_or_another_library_run_again(toys, tmp_path, monkeypatch):
    runner = Runner(out=tmp_path / "out", jobs=1)
    runner.run(load_experiment(toys / "beta"), nothing)
    (toys / "beta" / "extra.toml").write_text("a = 1\n")
    runner.run(load_experiment(toys / "beta"), nothing)
    assert len(calls(toys / "beta")) == 2
    trials = tmp_path / "out" / "beta" / "trials.jsonl"
    trials.write_text("kept")
    Runner(out=tmp_path / "out", jobs=1, force=True).run(load_experiment(toys / "beta"), nothing)
    assert len(calls(toys / "beta")) == 3
    assert not trials.exists()
    monkeypatch.setattr(runs, "library_hash", lambda: "another")
    assert runner.finished(load_experiment(toys / "beta")) is None


def test_write_writes_the_repositorys_files(toys, tmp_path):
    experiment = load_experiment(toys / "beta")
    runner = Runner(out=tmp_path / "out", jobs=1, write=True)
    runner.run(experiment, nothing)
    runner.run(experiment, nothing)
    assert [line.endswith("--write") for line in calls(toys / "beta")] == [True, True]
    assert experiment.result.got["gap"] == 0.5


def test_a_smoke_run_leaves_nothing(toys, tmp_path):
    runner = Runner(out=tmp_path / "out", jobs=1, is_smoke=True)
    assert runner.run(load_experiment(toys / "beta"), nothing) is None
    assert calls(toys / "beta")[0].endswith("--smoke")
    assert not (tmp_path / "out").exists()


def test_an_experiment_that_breaks_shows_its_last_lines(toys, tmp_path):
    (toys / "beta" / "value.number").write_text("broken")
    with pytest.raises(CommandFailedError, match=r"beta failed with exit code 1:[^$]*the experiment broke"):
        Runner(out=tmp_path / "out", jobs=1).run(load_experiment(toys / "beta"), nothing)


def test_an_experiment_that_writes_nothing_has_failed(toys, tmp_path):
    (toys / "beta" / "run.py").write_text("pass\n")
    with pytest.raises(CommandFailedError, match="beta ended well but wrote no"):
        Runner(out=tmp_path / "out", jobs=1).run(load_experiment(toys / "beta"), nothing)


def test_the_script_is_ended_when_the_display_breaks(toys, tmp_path):
    (toys / "beta" / "run.py").write_text(
        "import os, time\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "print('[1/2] a')\ntime.sleep(60)\n"
    )

    def interrupt(done, total, label):
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Runner(out=tmp_path / "out", jobs=1).run(load_experiment(toys / "beta"), interrupt)
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_plain_lines_come_now_and_then():
    times, said = iter([0.0, 10.0, 31.0, 31.0, 40.0, 62.0, 62.0]), []
    show = PlainProgress("alpha", said.append, now=lambda: next(times))
    for done in range(1, 5):
        show(done, 4, f"trial {done}")
    assert said == ["alpha: 2 of 4, trial 2", "alpha: 4 of 4, trial 4"]


def test_a_bar_is_shown_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with contextlib.ExitStack() as stack:
        show = stack.enter_context(runs.progress("alpha"))
        show(1, 2, "first")
        assert not isinstance(show, PlainProgress)


def test_what_was_lost_is_what_held_before(toys):
    experiment = load_experiment(toys / "alpha")
    committed = experiment.result
    text = json.loads((toys / "alpha" / "results" / "comparison.json").read_text())
    text["claims"][0]["got"] = 1.5
    path = toys / "worse.json"
    path.write_text(json.dumps(text))
    worse = load_result(path)
    assert runs.lost(experiment, committed, committed=committed) == []
    assert runs.lost(experiment, worse, committed=committed) == ["the gap is small"]
    assert runs.lost(experiment, worse, committed=worse) == [], "it was missed before"
    assert runs.lost(experiment, worse, committed=None) == []
    lines = runs.said(experiment, worse, committed=committed)
    assert lines[0] == "  missed  the gap is small"
    assert lines[1].strip() == (
        "expected at most 1 %, got 1.5 ± 0.25 %; in the repository 0.5 ± 0.25 %, holds"
    )


SLOW = """
import signal, sys
from hardy.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without one
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_an_interrupt_ends_the_script_too(toys, tmp_path):
    (toys / "beta" / "run.py").write_text(
        "import os, time\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "print('[1/2] a', flush=True)\ntime.sleep(60)\n"
    )
    words = ["reproduce", "beta", "--experiments", str(toys), "--out", str(tmp_path / "out")]
    with subprocess.Popen([sys.executable, "-c", SLOW, *words], start_new_session=True) as process:
        for _ in range(200):
            if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
                break
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(20) == 130
    for _ in range(50):
        try:
            os.kill(int((tmp_path / "pid").read_text()), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the script goes on alone")
