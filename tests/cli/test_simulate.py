"""The verb `simulate`: its table, its JSON, its files, its refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hardy.cli.main import main
from hardy.train.simulate_strategies import read_simulation

CLUSTERS = Path(__file__).parents[2] / "examples" / "clusters"
TEXT = """
workers = 3
bandwidth_mbit_per_s = 100
slow_factors = { 2 = 3.0 }
strategies = ["synchronous", "edit"]
[task]
model = "tiny"
steps = 10
tokens = 16
source = "synthetic:constant,documents=100,mean=63"
[[events]]
kind = "fail"
worker = 1
at_s = 12.2
"""


@pytest.fixture
def cluster(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text(TEXT)
    return ["simulate", str(path), "--cache-dir", str(tmp_path / "cache")]


def test_the_table_the_chart_and_what_was_simulated(cluster, capsys):
    assert main(cluster) == 0
    said = capsys.readouterr()
    lines = said.out.split("\n")
    assert lines[0] == "cluster: 3 workers, 0.5 s a step, 100 Mbit/s, latency 0 s, 1 events"
    assert lines[1] == "task: tiny (115,008 parameters), 10 steps of 16 tokens a worker, seed 0"
    heading = "strategy virtual s steps/s loss accuracy MB sent idle exchange rounds flagged drift cos"
    assert lines[3].split() == heading.split()
    assert lines[4].split()[:2] == ["synchronous", "(stopped)"] and lines[5].split()[0] == "edit"
    assert "synchronous (stopped)" in said.out and "a worker died, and the strategy cannot go on" in said.out
    assert "a synchronous  b edit" in lines
    assert lines[-2].startswith("all simulated: time is virtual") and lines[-2].endswith(" s here")
    assert said.err == "hardy: simulating synchronous\nhardy: simulating edit\n"


def test_json_holds_everything_and_the_folder_the_same(cluster, capsys, tmp_path):
    out = tmp_path / "out"
    settings = ["--strategies", "local_sgd", "--strategy.every_steps", "2", "--cluster.latency_s", "0.5"]
    assert main([*cluster, *settings, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.pop("files") == [str(out / "results.json"), str(out / "curves.png")]
    assert told == json.loads((out / "results.json").read_text())
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert told["cluster"]["latency_s"] == 0.5 and told["cluster"]["events"][0]["kind"] == "fail"
    (result,) = told["strategies"]
    assert (result["label"], result["settings"]["every_steps"]) == ("local_sgd", 2)
    assert result["curve"][0]["steps"] == 0 and result["stopped"]


def test_without_training_there_is_no_loss(cluster, capsys, tmp_path):
    assert main([*cluster, "--no-train", "--cluster.workers", "4000", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "cluster: 4,000 workers" in text and "nothing is trained" in text and "loss" not in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]


def test_training_and_counting_agree(cluster, capsys):
    told = []
    for words in (cluster, [*cluster, "--no-train"]):
        assert main([*words, "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out)["strategies"])
    for trained, counted in zip(*told, strict=True):
        for key in ("virtual_s", "steps_per_s", "bytes_sent", "idle_share", "rounds", "stopped"):
            assert trained[key] == counted[key]


def test_counting_needs_no_torch(cluster):
    code = (
        f"import sys; from hardy.cli.main import main; assert main({[*cluster, '--no-train']!r}) == 0\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_help_lists_settings_events_and_strategies(capsys):
    assert main(["simulate", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("--cluster.step_s", "--task.model", "  at_s (", "streaming_diloco", "--no-train"):
        assert word in text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--strategies", "edti"], "--strategies: there is no strategy 'edti'; did you mean 'edit'"),
        (
            ["--cluster.workers", "2"],
            "slow_factors lists 3 workers, but workers=2; shorten the list or raise workers",
        ),
        (["--strategies", "edit", "--strategy.mesh.shards", "2"], "edit: strategy.mesh.shards=2 cannot be"),
        (["--no-trian"], "there is no option '--no-trian'; did you mean '--no-train'"),
    ],
)
def test_what_cannot_be_simulated(words, text, cluster, capsys):
    assert main([*cluster, *words]) == 2
    said = capsys.readouterr()
    assert text in said.err and said.err.count("\n") == 1 and said.out == ""


def test_a_file_in_the_place_of_the_folder(cluster, capsys, tmp_path):
    (tmp_path / "taken").write_text("")
    assert main([*cluster, "--out", str(tmp_path / "taken")]) == 2
    assert "is a file; give a folder" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_clusters_that_are_shipped_can_be_simulated(path, capsys):
    assert read_simulation(path).entries
    assert main(["simulate", str(path), "--no-train"]) == 0
