"""What `hardy balance` says."""

import json

import pytest

from hardy.balance.cost import analytic_cost
from hardy.cli.balance import model_sizes
from hardy.cli.balance_actions import GROUPED
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


@pytest.mark.parametrize("size", [("--sequences", "40"), ("--tokens", "40000")])
def test_batches_can_be_levelled_first(capsys, size):
    words = [
        "simulate",
        "--batches",
        "8",
        *size,
        "--ranks",
        "2",
        "--context",
        "4096",
        "--methods",
        "dispatch",
    ]
    drawn, levelled = (told(capsys, *words, *more)["methods"][0] for more in ([], ["--delay-steps", "3"]))
    assert levelled["time_variation"] < 0.6 * drawn["time_variation"]
    assert main(["balance", *words, "--delay-steps", "-1"]) == 2
    assert "--delay-steps must be at least 0, got -1" in capsys.readouterr().err


def test_simulate_leaves_out_what_does_not_fit(capsys):
    rows = told(
        capsys, "simulate", "--batches", "3", "--sequences", "40", "--ranks", "4", "--cap-tokens", "1024"
    )
    assert [row["method"] for row in rows["methods"]] == [*GROUPED]


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


@pytest.fixture
def alone(tmp_path):
    """Return a file with costs of one rank alone."""
    path = tmp_path / "alone.json"
    analytic_cost(model_sizes("1m"), cap_tokens=8192, degrees=(1,)).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("words", "way_out"),
    [
        (["plan"], "take --mode dispatch"),
        (["simulate", "--methods", "dispatch,dynamic_cp"], "take --methods without them"),
        (["simulate", "--methods", "batch_cp"], "take --methods without them"),
        (["propose"], "take a cost of several schemes"),
    ],
)
def test_groups_that_have_no_costs_are_refused(capsys, alone, words, way_out):
    assert main(["balance", *words, *SMALL, "--cost", alone]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{alone} has costs of context-parallel degree 1 only, and 4 ranks" in error
    assert "hardy balance profile --ranks 4 --out FILE" in error and way_out in error


def test_what_needs_no_groups_goes_without(capsys, alone):
    assert said(capsys, "plan", *SMALL, "--cost", alone, "--mode", "dispatch")
    assert said(capsys, "plan", *SMALL[:-1], "1", "--cost", alone)
    for action in ("simulate", "analyze"):
        found = told(capsys, action, *SMALL, "--cost", alone)
        assert "dispatch" in {row["method"] for row in found["methods"]}
        assert not {*GROUPED} & {row["method"] for row in found["methods"]}
        note = "has no costs of groups: ways of planning that form groups are left out"
        assert note in said(capsys, action, *SMALL, "--cost", alone)
        assert note not in said(capsys, action, *SMALL)


def test_the_bridge_is_weighed_and_said(capsys):
    words = [
        "--cost",
        "hydraulis-7b",
        "--ranks",
        "8",
        "--tokens",
        "60000",
        "--batches",
        "2",
        "--context",
        "8192",
    ]
    dear, free = (told(capsys, "propose", *words, "--bridge-bandwidth", at) for at in ("0.1", "0"))
    assert free["bridge_times"] == [0.0] * len(free["strategies"])
    assert free["bridge"] == "bridge not counted (--bridge-bandwidth 0)"
    assert min(dear["bridge_times"]) > 0 and dear["times"][-1] > free["times"][-1]
    assert dear["strategies"][0] != free["strategies"][0]
    text = said(capsys, "propose", *words, "--bridge-bandwidth", "0.1")
    assert f"(bridge {dear['bridge_times'][0]:,.1f} ms, " in text and "at 0.1 GB/s a rank" in text
    planned = told(capsys, "plan", *words)
    assert "at 10 GB/s a rank" in planned["bridge"]
    assert "not hidden behind computing (bridge " in said(capsys, "plan", *words)
    assert "at 10 GB/s a rank" in said(capsys, "simulate", *words, "--methods", "balanced,dynamic")
