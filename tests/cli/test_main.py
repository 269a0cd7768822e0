"""The command `hardy`: verbs, help, exit codes, and how fast it answers."""

import errno
import os
import subprocess
import sys
import time

import pytest

from hardy.cli import doctor
from hardy.cli.failure import READER_GONE, SAID, CommandFailedError, Terminated
from hardy.cli.main import VERBS, main
from hardy.config import UserError

HELP_S = 0.7


def test_help_lists_every_verb(capsys):
    for words in (["--help"], ["-h"], ["help"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert all(f"  {name} " in text and verb.about in text for name, verb in VERBS.items())


def test_without_a_verb_the_help_is_shown_and_the_code_says_so(capsys):
    assert main([]) == 2
    assert "usage: hardy VERB" in capsys.readouterr().out


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_help(name, capsys):
    assert main([name, "--help"]) == 0
    assert f"usage: hardy {name} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["trian"], "there is no verb 'trian'; did you mean 'train'"),
        (["--verson"], "there is no option '--verson'; did you mean '--version'"),
        (["version", "--jsn"], "there is no option '--jsn'; did you mean '--json'"),
        (["train", "tiny", "--dry-rn"], "there is no option '--dry-rn'; did you mean '--dry-run'"),
        (["train", "tiny", "--lr", "3"], "there is no option '--lr'; did you mean the setting '--optim.lr'"),
        (["train"], "the following arguments are required: RECIPE|FILE.toml (see `hardy train --help`)"),
        (["train", "tiny", "extra"], "'extra' is one word too many"),
        (["version", "--a.b", "3"], "there is no option '--a.b'"),
    ],
)
def test_wrong_words_end_with_2_one_line_and_no_traceback(words, text, capsys):
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"hardy: {text}") and said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("no such thing"), 2, "hardy: no such thing\n"),
        (CommandFailedError("it diverged"), 1, "hardy: it diverged\n"),
        (KeyboardInterrupt(), 130, "hardy: interrupted\n"),
        (Terminated(), 143, "hardy: terminated\n"),
    ],
)
def test_ends_that_are_understood_show_no_traceback(error, code, text, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "version_verb", lambda arguments: (_ for _ in ()).throw(error))
    assert main(["version"]) == code
    assert capsys.readouterr().err == text


def test_workers_that_refuse_for_reasons_of_their_own_all_speak(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(SAID, str(tmp_path))
    for rank, verb in enumerate(["trian", "trian", "tarin"]):
        monkeypatch.setenv("RANK", str(rank))
        assert main([verb]) == 2
    said = capsys.readouterr().err
    assert said.count("'trian'") == 1 and "hardy (worker 2): there is no verb 'tarin'" in said
    monkeypatch.setenv(SAID, str(tmp_path / "gone"))  # where nothing can be noted, all speak too
    assert main(["trian"]) == main(["trian"]) == 2
    assert capsys.readouterr().err.count("'trian'") == 2


def test_a_fault_of_ours_keeps_its_traceback_and_asks_for_a_report(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "version_verb", lambda arguments: 1 // 0)
    assert main(["version"]) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text and "ZeroDivisionError" in text and "please report it" in text


def test_nobody_needs_to_listen():
    words = f"{sys.executable} -m hardy version <&- >&- 2>&-"
    assert subprocess.run(words, shell=True).returncode == 0


@pytest.mark.parametrize(
    ("number", "says", "way_out"),
    [
        (errno.ENOSPC, "No space left on device", "make room, or write elsewhere"),
        (errno.EACCES, "Permission denied", "ask for the permission, or choose another place"),
    ],
)
def test_what_the_system_refuses_is_no_fault(monkeypatch, capsys, number, says, way_out):
    refusal = OSError(number, says, "out.json")
    monkeypatch.setattr(doctor, "version_verb", lambda arguments: (_ for _ in ()).throw(refusal))
    assert main(["version"]) == 1
    assert capsys.readouterr().err == f"hardy: {says} (out.json); {way_out}\n"


@pytest.mark.parametrize(
    "words", [["version"], ["--help"], ["train", "--help"], ["data", "inspect"]], ids=" ".join
)
def test_a_reader_that_goes_away_is_no_fault(words, tmp_path):
    """Whether the output fills a buffer, and is missed at once, or lies there until the end."""
    (tmp_path / "a.txt").write_text("some text " * 50)
    settings = ["--data.source", f"files:{tmp_path}", "--data.cache_dir", str(tmp_path / "cache")]
    words = words + settings if words[0] == "data" else words  # one that prints by rich
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "hardy", *words]
        buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
        done = subprocess.run(command, env=buffered, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (READER_GONE, "")


def test_python_m_hardy_is_the_command():
    done = subprocess.run([sys.executable, "-m", "hardy", "version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("hardy ")
    assert subprocess.run([sys.executable, "-m", "hardy", "x"], capture_output=True).returncode == 2


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in VERBS)], ids=" ".join)
def test_help_comes_at_once_and_without_torch(words):
    code = (
        f"import sys; from hardy.cli.main import main; assert main({words!r}) == 0\n"
        "assert not {'torch', 'numpy', 'rich', 'matplotlib'} & set(sys.modules)"
    )
    taken_s = []
    for _ in range(3):  # twice more on a machine that was busy
        started_s = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        taken_s.append(time.perf_counter() - started_s)
        assert done.returncode == 0, done.stderr
        if taken_s[-1] < HELP_S:
            return
    raise AssertionError(f"help took {taken_s} s")
