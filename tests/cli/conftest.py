"""A small corpus and a finished run, made once."""

import contextlib
import io
import json
import subprocess
import sys

import pytest

from hardy.cli.main import main


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Words that make a run of `tiny` last a second: little text, a narrow model, few steps."""
    folder = tmp_path_factory.mktemp("small")
    for number in range(40):
        (folder / f"{number}.txt").write_text(
            f"Document {number} counts: " + " ".join(map(str, range(number, 90)))
        )
    return [
        *("--data.source", f"files:{folder}/*.txt", "--data.cache_dir", str(folder / "cache")),
        *("--data.pack_tokens", "64", "--data.validation_fraction", "0.2", "--model.shape.hidden_size", "16"),
        *(
            "--model.shape.num_layers",
            "1",
            "--model.shape.num_heads",
            "2",
            "--model.shape.intermediate_size",
            "32",
        ),
        *("--train.steps", "4", "--train.batch_packs", "4", "--optim.schedule.warmup_steps", "1"),
        *(
            "--train.evaluate_every_steps",
            "2",
            "--train.evaluate_packs",
            "2",
            "--checkpoint.every_steps",
            "2",
        ),
        *("--log.progress", "none", "--train.device", "cpu"),
    ]


@pytest.fixture(scope="session")
def finished_run(small, tmp_path_factory):
    """The folder of a run of four steps with checkpoints of steps 2 and 4."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", "tiny", "--run-dir", str(run_dir), *small]) == 0
    return run_dir


@pytest.fixture
def make_run(tmp_path):
    """Write a run folder by hand: `make_run("a", seed=1, config={"optim.lr": 0.1}, lines=[...])`."""

    def make(name, *, seed=0, config=None, lines=None, starts=None, parent=tmp_path):
        settings = {"model": {"name": "1m"}, "optim": {"lr": 0.01}, "train": {"seed": seed, "steps": 4}}
        for path, value in (config or {}).items():
            section, key = path.split(".")
            settings.setdefault(section, {})[key] = value
        if lines is None:
            lines = [
                {"step": step, "loss": 5.0 - step, "tokens": 100 * step, "step_time_s": 0.5, "skipped": 0}
                | ({"validation_loss": 5.5 - step + seed, "validation_time_s": 0.25} if step % 2 == 0 else {})
                for step in range(1, 5)
            ]
        folder = parent / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if starts is not None:
            (folder / "run.json").write_text(json.dumps({"starts": starts}))
        return folder

    return make


class Process:
    """What a launcher has started; it ends when the test says so."""

    def __init__(self):
        self.code, self.heard = None, []

    def poll(self):
        return self.code

    def send_signal(self, number):
        self.heard.append(number)

    def wait(self):
        assert self.code is not None
        return self.code


@pytest.fixture
def make_process():
    """Return what makes a process without one, with `code` to be set and `heard` to be read."""
    return Process


TOY_SCRIPT = """
import argparse, sys
from pathlib import Path
from hardy.cli.reproduce_results import Result, library_hash, load_experiment, result_text

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path)
parser.add_argument("--processes")
parser.add_argument("--smoke", action="store_true")
parser.add_argument("--write", action="store_true")
options = parser.parse_args()
folder = Path(__file__).parent
with (folder / "calls.log").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
print("[1/2] the first\\n[2/2] the second")
value = (folder / "value.number").read_text()
if value == "broken":
    sys.exit("the experiment broke")
experiment = load_experiment(folder)
where = {"time": "2026-01-02T00:00", "commit": "0123456789", "torch": "2", "python": "3", "machine": "toy"}
result = Result(
    experiment=folder.name,
    got={"gap": float(value), "gain": 2.0},
    by_seed={"gap": (float(value) - 0.25, float(value) + 0.25), "gain": ()},
    seeds=(0, 1),
    duration_s=90.0,
    settings_hash=experiment.settings_hash,
    circumstances=where | {"library_hash": library_hash()},
    measured={},
)
text = result_text(experiment, result)
if not options.smoke:
    (options.out / "comparison.json").write_text(text)
if options.write:
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / "comparison.json").write_text(text)
"""
TOY_CLAIMS = """
title = "A toy"
method = "toys"
papers = ["2412.00001"]
minutes = 2

[gap]
claim = "the gap is small"
most = 1.0
unit = "%"
main = true
[gain]
claim = "there is a gain"
least = 1.5
"""


@pytest.fixture
def toys(tmp_path):
    """A folder with the experiments `alpha` and `beta`, whose scripts take no time; `alpha` was run."""
    folder = tmp_path / "experiments"
    for name in ("alpha", "beta"):
        (folder / name).mkdir(parents=True)
        (folder / name / "run.py").write_text(TOY_SCRIPT)
        (folder / name / "expected.toml").write_text(TOY_CLAIMS)
        (folder / name / "value.number").write_text("0.5")
    words = [sys.executable, str(folder / "alpha" / "run.py"), "--out", str(tmp_path), "--write"]
    subprocess.run(words, check=True, capture_output=True)
    (folder / "alpha" / "calls.log").unlink()
    return folder
