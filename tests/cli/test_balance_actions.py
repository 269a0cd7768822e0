"""What `hardy balance` says."""

import json

import pytest

from hardy.cli.main import main

SMALL = ["--batches", "3", "--sequences", "40", "--context", "8192", "--ranks", "4"]
REPLICAS = ["--cost", "hydraulis-32b", "--ranks", "64", "--tokens", "200000", "--context", "32768"]


def told(capsys, *words):
    assert main(["balance", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def said(capsys, *words):
    assert main(["balance", *words]) == 0
    return capsys.readouterr().out


def test_analyze_says_what_is_worth_using(capsys):
    found = told(capsys, "analyze", *SMALL)
    assert found["sequences"] == 120 and found["longest"] <= 8192
    times = {row["method"]: row["time"] for row in found["methods"]}
    assert times[found["advice"]] <= min(times.values()) * 1.05
    assert 0 < found["tokens_of_longest_percent"] < found["attention_of_longest_percent"] < 1
    text = said(capsys, "analyze", *SMALL)
    assert f"worth using: {found['advice']}" in text and "too long (truncate)" in text


def test_plan_gives_every_sequence_a_group(capsys):
    found = told(capsys, "plan", *SMALL, "--mode", "dynamic_cp")
    taken = [i for slot in found["slots"] for batch in slot for i in batch["sequences"]]
    assert sorted(taken) == list(range(40))
    assert found["lower_bound"] <= found["time"] and found["hash"] >= 0 and found["unit"] == "GFLOP"
    again = told(capsys, "plan", *SMALL, "--mode", "dynamic_cp")
    assert again["hash"] == found["hash"]
    other = told(capsys, "plan", *SMALL, "--seed", "1")
    assert other["hash"] != found["hash"]


def test_plan_shows_the_ranks_and_draws_them(capsys, tmp_path):
    path = tmp_path / "plan.png"
    text = said(capsys, "plan", *SMALL, "--png", str(path))
    assert text.count("rank ") == 4 and "gap" in text and f"wrote {path}" in text
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_plan_of_replicas(capsys):
    found = told(capsys, "plan", *REPLICAS, "--batches", "1")
    assert "tp" in found["groups"] and found["unit"] == "ms"
    written = told(capsys, "plan", *REPLICAS, "--batches", "1", "--strategies", "4x tp16")
    assert written["groups"] == "4x tp16" and written["time"] >= found["time"]


def test_simulate_compares(capsys):
    rows = told(capsys, "simulate", *SMALL, "--methods", "random,dispatch,dynamic_cp")["methods"]
    assert [row["method"] for row in rows] == ["random", "dispatch", "dynamic_cp"]
    assert rows[0]["speedup"] == 1 < rows[1]["speedup"] <= rows[2]["speedup"] * (1 + 1e-9)
    text = said(capsys, "simulate", *SMALL, "--objective", "free_running")
    assert "karmarkar_karp" in text and "nothing is trained" in text


def test_simulate_leaves_out_what_does_not_fit(capsys):
    rows = told(
        capsys, "simulate", "--batches", "3", "--sequences", "40", "--ranks", "4", "--cap-tokens", "1024"
    )
    assert [row["method"] for row in rows["methods"]] == ["static_cp", "batch_cp", "dynamic_cp"]


def test_simulate_replicas(capsys):
    rows = told(capsys, "simulate", *REPLICAS, "--batches", "3")["methods"]
    times = {row["method"]: row["time"] for row in rows}
    assert times["dynamic"] < times["balanced"] < times["fixed"]


def test_propose_writes_what_strategies_takes(capsys):
    words = ["--cost", "hydraulis-7b", "--ranks", "8", "--sequences", "30", "--batches", "2"]
    found = told(capsys, "propose", *words, "--context", "16384")
    assert found["candidates"] > 10 and found["times"] == sorted(found["times"], reverse=True)
    text = said(capsys, "propose", *words, "--context", "16384")
    line = text.splitlines()[-1].removeprefix("--strategies ").strip("'")
    kept = told(capsys, "plan", *words, "--context", "16384", "--strategies", line)
    assert kept["groups"] in line


@pytest.mark.parametrize("path", ["none/plan.png", "plan.nonsense"])
def test_a_picture_that_cannot_be_written(capsys, tmp_path, path):
    assert main(["balance", "plan", *SMALL, "--png", str(tmp_path / path)]) == 2
    assert "could not be written" in capsys.readouterr().err
