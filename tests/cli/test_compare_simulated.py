"""Results of `hardy simulate` as runs."""

import json

import pytest

from hardy.cli.compare_runs import STEP, TIME, TOKENS
from hardy.cli.compare_simulated import NOTE, read_simulation
from hardy.cli.main import main
from hardy.config import UserError

CLUSTER = 'workers = 2\nstep_s = 0.5\n[task]\nmodel = "tiny"\nsteps = 4\nevaluate_every_steps = 2\n'


def test_what_simulate_writes_is_read(tmp_path, capsys):
    (tmp_path / "two.toml").write_text(CLUSTER)
    words = ["simulate", str(tmp_path / "two.toml"), "--strategies", "synchronous,edit", "--out"]
    assert main([*words, str(tmp_path / "sim"), "--no-train"]) == 0
    told = json.loads((tmp_path / "sim" / "results.json").read_text())
    runs = read_simulation(tmp_path / "sim" / "results.json", name="sim")
    assert [run.name for run in runs] == ["sim/synchronous", "sim/edit"]
    for run, strategy in zip(runs, told["strategies"], strict=True):
        assert run.totals["virtual_s"] == strategy["virtual_s"]
        assert run.totals["bytes_sent"] == strategy["bytes_sent"] > 0
        assert run.totals["steps"] == strategy["steps"] == 8
        assert "validation_loss" not in run.totals  # nothing was trained
        assert run.config["strategy.name"] == strategy["settings"]["name"]
        assert (run.config["cluster.workers"], run.config["task.steps"]) == (2, 4)
        assert (run.seed, "task.seed" in run.config, run.notes) == (0, False, [NOTE])


def strategy(**changes):
    point = {"virtual_s": 2.0, "steps": 8, "tokens": 64, "train_loss": 2.5, "validation_loss": 2.25}
    first = {"virtual_s": 0.0, "steps": 0, "tokens": 0, "train_loss": None, "validation_loss": 2.0}
    whole = {"label": "edit", "settings": {"name": "edit"}, "virtual_s": 2.0, "steps": 8, "tokens": 64}
    more = {"bytes_sent": 5, "flagged": 2, "flagged_workers": {"1": 2}, "rollbacks": 0, "stopped": None}
    losses = {"train_loss": 2.5, "validation_loss": 2.25, "curve": [first, point]}
    return whole | more | losses | changes


def write(folder, *strategies):
    file = folder / "results.json"
    file.write_text(json.dumps({"cluster": {"workers": 2, "task": {"seed": 3}}, "strategies": strategies}))
    return file


def test_curves_and_what_went_wrong(tmp_path):
    (run,) = read_simulation(write(tmp_path, strategy(stopped="a worker died")), name="x")
    assert run.validation.x == {STEP: [0, 8], TOKENS: [0, 64], TIME: [0.0, 2.0]}
    assert (run.validation.y, run.training.y) == ([2.0, 2.25], [None, 2.5])
    assert (run.totals["validation_loss"], run.totals["best_validation_loss"]) == (2.25, 2.0)
    assert [(event.text, event.when(), event.times) for event in run.events] == [
        ("worker 1 left out of rounds", "not known", 2),
        ("stopped: a worker died", "8", 1),
    ]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"cluster": {}, "strategies": [{}]}'])
def test_other_files_are_refused(tmp_path, text):
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"results\.json is not what `hardy simulate --out` wrote"):
        read_simulation(file, name="x")
