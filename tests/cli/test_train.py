"""The verbs `train` and `resume`."""

import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hardy.cli import plots
from hardy.cli import train as train_module
from hardy.cli.main import main
from hardy.train import run
from hardy.train.folder import RunFolder
from hardy.train.loop import RunFailedError


def errors(capsys):
    return capsys.readouterr().err


def test_a_picture_that_fails_loses_nothing(small, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(plots, "plot_losses", lambda run_dir: (_ for _ in ()).throw(OSError("no room")))
    assert main(["train", "tiny", *small, "--run-dir", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plot"] is None
    assert "the losses could not be drawn: no room" in caplog.text


def test_a_run_ends_with_a_summary_a_plot_and_the_command_noted(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny", *small]) == 0
    assert main(["train", "tiny", *small]) == 0
    shown = capsys.readouterr().out
    assert "run finished" in shown and "runs/tiny-2" in shown
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny-1", "tiny-2"]
    noted = json.loads((tmp_path / "runs/tiny-1/run.json").read_text())
    assert noted["starts"][0]["command"][:3] == ["hardy", "train", "tiny"]
    assert (tmp_path / "runs/tiny-1/loss.png").stat().st_size > 1000
    first, second = ((tmp_path / f"runs/tiny-{n}/metrics.jsonl").read_text().splitlines() for n in (1, 2))
    assert [json.loads(a)["loss"] for a in first] == [json.loads(b)["loss"] for b in second]


def test_json_is_all_that_comes_out(small, tmp_path, capsys):
    arguments = [*small, "--log.progress", "plain", "--json"]
    assert main(["train", "tiny", "--run-dir", str(tmp_path / "run"), *arguments]) == 0
    said = capsys.readouterr()
    summary = json.loads(said.out)
    assert summary["steps"] == 4 and summary["stopped_by"] is None
    assert summary["plot"] == str(tmp_path / "run/loss.png")
    assert "step 4/4" in said.err


def test_resume_goes_on_to_more_steps(small, tmp_path, capsys):
    run_dir = str(tmp_path / "run")
    assert main(["train", "tiny", "--run-dir", run_dir, *small]) == 0
    capsys.readouterr()
    assert main(["resume", run_dir, "--train.steps", "6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 6
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.mp
def test_two_workers_learn_what_one_learns(small, tmp_path, finished_run):
    run_dir = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "hardy",
        "train",
        "tiny",
        "--run-dir",
        str(run_dir),
        "--workers",
        "2",
        *small,
    ]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 4
    alone, together = (
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (finished_run, run_dir)
    )
    assert together == pytest.approx(alone, rel=1e-5)


# Refusals before torch


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (
            ["--workers", "3"],
            "train.batch_packs=4 must be a multiple of workers=3; set train.batch_packs to 3 or 6",
        ),
        (["--workers", "2", "--train.micro_packs", "4"], "or train.micro_packs to 2"),
        (["--strategy.mesh.shards", "2"], "needs 2 workers, but 1 run"),
        (
            ["--strategy", "robust", "--workers", "2"],
            "cannot bear strategy.f=1 among 2 workers; lower it to at most 0, or let at least 3 workers take",
        ),
        (
            "--strategy robust --strategy.mesh.shards 2 --workers 4 --strategy.rule mean".split(),
            "'mean' after 'nnm' cannot bear strategy.f=1 among 2 workers",
        ),
        (
            "--strategy dstar --strategy.f 0 --strategy.exchange slices --strategy.attack.name nan "
            "--strategy.attack.workers 2 --workers 2".split(),
            "strategy.attack.workers names [2], but there are 2 workers, from 0; leave them out, or start",
        ),
        (
            "--workers 3 --train.batch_packs 3 --strategy push_sum "
            "--strategy.topology.name hypercube".split(),
            "needs a power of two replicas, but there are 3; run 2 or 4",
        ),
        # The data, and what torch says, are known to the run alone; it takes back what it has begun.
        (["--train.batch_packs", "4000"], "and one step needs train.batch_packs x data.pack_tokens"),
        (["--optim", "torch.optim.Nothing"], "torch.optim.Nothing"),
        (["--train.steps", "1"], "optim.schedule.warmup_steps=1 must be below train.steps=1"),
        (["--data.document_tokens", "65"], "data.document_tokens=65 must be at most data.pack_tokens=64"),
        (["--data.source", "files:/nowhere/*.txt"], "/nowhere/*.txt"),
        (["--data.source", "fils:x"], "there is no source 'fils'; did you mean 'files'"),
        (
            ["--model.name", "hf:/nowhere"],
            "model.name=hf:/nowhere: there is no /nowhere/config.json; give a local model folder",
        ),
    ],
)
def test_what_cannot_work_is_refused(small, tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.setattr(train_module, "run_workers", lambda *_: pytest.fail("processes were started"))
    assert main(["train", "tiny", "--run-dir", str(tmp_path / "run"), *small, *arguments]) == 2
    assert text in errors(capsys)
    assert not (tmp_path / "run").exists()


def test_a_refusal_imports_no_torch(tmp_path):
    code = (
        "import sys\nfrom hardy.cli.main import main\n"
        "assert main(['train', 'tiny', '--data.source', 'files:/nowhere/*']) == 2\n"
        "assert main(['train', 'tiny', '--workers', '3']) == 2\n"
        "assert main(['train', 'tiny', '--model.name', 'hf:nowhere']) == 2\n"
        "assert main(['train', 'tiny', '--dry-run']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_folder_with_a_run_is_refused(small, finished_run, capsys):
    assert main(["train", "tiny", "--run-dir", str(finished_run), *small]) == 2
    assert f"already holds this run; go on with `hardy resume {finished_run}`" in errors(capsys)
    assert main(["train", "tiny", "--run-dir", str(finished_run), *small, "--optim.lr", "0.5"]) == 2
    assert "belongs to another config: optim.lr is " in errors(capsys)


def test_a_folder_with_anything_else_is_refused(small, tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert main(["train", "tiny", "--run-dir", str(tmp_path), *small]) == 2
    assert "is not empty and holds no run; choose another --run-dir" in errors(capsys)
    assert main(["train", "tiny", "--run-dir", str(tmp_path / "thesis.tex"), *small]) == 2


def test_resume_without_a_run_is_refused(tmp_path, capsys):
    assert main(["resume", str(tmp_path)]) == 2
    assert "there is no run in" in errors(capsys)


def test_resume_with_a_model_folder_that_is_not_there_is_refused_at_once(finished_run, monkeypatch, capsys):
    monkeypatch.setattr(run, "resume", lambda *_, **__: pytest.fail("the data would be prepared first"))
    assert main(["resume", str(finished_run), "--model.name", "hf:/nowhere"]) == 2
    assert "there is no /nowhere/config.json" in errors(capsys)


def test_workers_are_not_started_where_another_process_trains_or_a_rule_would_refuse_them(
    finished_run, monkeypatch, capsys
):
    monkeypatch.setattr(train_module, "run_workers", lambda *_: pytest.fail("processes were started"))
    with RunFolder(finished_run).locked():
        assert main(["resume", str(finished_run), "--workers", "2"]) == 2
    assert "another process is training in" in errors(capsys)
    assert main(["resume", str(finished_run), "--workers", "2", "--strategy", "robust"]) == 2
    assert "cannot bear strategy.f=1 among 2 workers" in errors(capsys)


def test_the_next_run_folder_counts_on_from_the_highest(tmp_path, monkeypatch, small, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny-2", "tiny-10", "tiny-x", "other-30"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    seen = []
    monkeypatch.setattr(run, "start", lambda config, run_dir, around: seen.append(run_dir) or 1 / 0)
    assert main(["train", "tiny", *small]) == 1
    assert str(seen[0]) == "runs/tiny-11"


def test_workers_of_a_launcher_need_a_run_folder_and_no_number(small, monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "tiny", *small]) == 2
    assert "must agree on the run folder; give --run-dir" in errors(capsys)
    assert main(["train", "tiny", "--workers", "4", *small]) == 2
    assert "a launcher started 2 workers; leave --workers out" in errors(capsys)


def test_workers_are_started_with_the_same_words(small, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_module, "run_workers", lambda *given: seen.append(given) or 143)
    run_dir = str(tmp_path / "run")
    assert main(["train", "tiny", "--workers", "2", "--json", "--run-dir", run_dir, *small]) == 143
    assert seen == [(2, ["train", "tiny", "--run-dir", run_dir, *small, "--json"])]


@pytest.mark.parametrize(
    ("name", "shards"), [("diloco", 1), ("push_sum", 1), ("diloco", 2), ("robust", 1), ("robust", 2)]
)
def test_replicas_that_may_die_are_started_with_a_store_and_again(small, tmp_path, monkeypatch, name, shards):
    seen = []
    monkeypatch.setattr(
        train_module, "run_replicas", lambda *given, **more: seen.append((*given[:2], more)) or 143
    )
    words = [*small, "--strategy.name", name, "--strategy.elastic", "true", "--strategy.max_restarts", "7"]
    run_dir = str(tmp_path / "run")
    hosts = []
    monkeypatch.setattr(
        "hardy.train.elections.election_host",
        lambda *_, replicas: hosts.append(replicas) or SimpleNamespace(close=lambda: None),
    )
    if name == "robust":
        words = [*small, "--strategy.name", name, "--strategy.f", "0", "--strategy.fastest.k", "2"]
        words += ["--strategy.fastest.max_restarts", "7"]
    if shards > 1:
        words += ["--strategy.mesh.shards", str(shards)]
    assert main(["train", "tiny", "--workers", str(2 * shards), "--run-dir", run_dir, *words]) == 143
    told = {"max_restarts": 7, "replica_size": shards}
    if name == "robust":
        told["setting"] = "strategy.fastest.max_restarts"
    assert seen == [(2, ["train", "tiny", "--run-dir", run_dir, *words], told)]
    assert hosts == ([2] if name == "robust" else [])


def test_the_first_k_are_replicas_and_not_workers(small, tmp_path, capsys):
    words = [*small, "--strategy.name", "robust", "--strategy.f", "0", "--strategy.fastest.k", "3"]
    words += ["--strategy.mesh.shards", "2", "--run-dir", str(tmp_path / "run")]
    assert main(["train", "tiny", "--workers", "4", *words]) == 2
    assert "strategy.fastest.k=3 of N=2 replicas" in errors(capsys)


def test_one_sharded_replica_alone_has_nobody_to_lose_and_others_must_be_whole(
    small, tmp_path, monkeypatch, capsys
):
    seen = []
    monkeypatch.setattr(train_module, "run_workers", lambda number, words: seen.append(number) or 0)
    words = [*small, "--strategy.name", "diloco", "--strategy.elastic", "true"]
    words += ["--strategy.mesh.shards", "2", "--run-dir", str(tmp_path / "run")]
    assert main(["train", "tiny", "--workers", "2", *words]) == 0 and seen == [2]
    assert main(["train", "tiny", "--workers", "3", *words]) == 2
    assert "1 replicas x 2 shards needs 2 workers, but 3 run" in errors(capsys)
    assert main(["train", "tiny", "--workers", "4", *words, "--strategy.layerwise", "true"]) == 2
    assert "strategy.elastic=true needs strategy.layerwise=false" in errors(capsys)


# How a run may end


def ending(monkeypatch, tmp_path, small, end):
    monkeypatch.setattr(run, "start", lambda config, run_dir, around: end(around))
    return main(["train", "tiny", "--run-dir", str(tmp_path / "run"), *small])


def fails(error):
    def end(around):
        raise error

    return end


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (RunFailedError("the run diverged"), 1, "hardy: the run diverged\n"),
        (KeyboardInterrupt(), 130, "hardy: interrupted\n"),
    ],
)
def test_known_ends_have_their_code_and_no_traceback(monkeypatch, tmp_path, small, capsys, error, code, text):
    assert ending(monkeypatch, tmp_path, small, fails(error)) == code
    assert errors(capsys) == text


def test_a_signal_before_training_ends_the_command(monkeypatch, tmp_path, small, capsys):
    assert ending(monkeypatch, tmp_path, small, lambda around: signal.raise_signal(signal.SIGTERM)) == 143
    assert errors(capsys) == "hardy: terminated\n"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_run_stopped_by_a_signal_is_saved_and_may_go_on(small, tmp_path, capsys, monkeypatch, number, code):
    real = train_module.StopSignal.__call__

    def stopped_in_the_second_step(self, asked=[]):  # noqa: B006  # the list counts the steps on purpose
        asked.append(1)
        if len(asked) == 2:
            signal.raise_signal(number)
        return real(self)

    monkeypatch.setattr(train_module.StopSignal, "__call__", stopped_in_the_second_step)
    run_dir = str(tmp_path / "run")
    assert main(["train", "tiny", "--run-dir", run_dir, *small]) == code
    assert f"go on with: hardy resume {run_dir}" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(["resume", run_dir]) == 0
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 4


def test_a_run_whose_reader_went_away_is_saved_and_may_go_on(small, tmp_path, capsys):
    """As `hardy train tiny | head -1`."""
    run_dir = str(tmp_path / "run")
    command = [sys.executable, "-m", "hardy", "train", "tiny", "--run-dir", run_dir, *small]
    command += ["--log.progress", "plain", "--train.steps", "2000"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 141
    done = json.loads((tmp_path / "run/summary.json").read_text())
    assert done["stopped_by"] == "SIGPIPE"
    assert said == (
        f"hardy: what reads our output went away; saved at step {done['steps']}; go on with: hardy resume "
        f"{run_dir}\n"
    )
    assert main(["resume", run_dir, "--train.steps", str(done["steps"] + 2)]) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, done["steps"] + 3))
