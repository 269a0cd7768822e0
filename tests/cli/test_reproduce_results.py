"""Claims, result files, hashes and tables."""

import json
import math

import pytest

from hardy.cli import reproduce_results as results
from hardy.cli.reproduce_results import Claim, Outcome, load_experiment, load_experiments, load_result
from hardy.config import UserError


def claim(side="most", limit=1.0, **more):
    return Claim(name="gap", text="the gap is small", side=side, limit=limit, **more)


@pytest.mark.parametrize(
    ("side", "got", "holds"),
    [
        ("most", 1.0, True),
        ("most", 1.01, False),
        ("least", 1.0, True),
        ("least", 0.99, False),
        ("most", None, False),
        ("most", -math.inf, False),
        ("least", math.inf, False),
        ("most", math.nan, False),
    ],
)
def test_a_claim_holds_up_to_its_limit_and_needs_a_number(side, got, holds):
    outcome = Outcome(claim=claim(side), got=got)
    assert outcome.holds == holds
    assert outcome.verdict == ("holds" if holds else "missed")


def test_the_spread_is_half_of_the_range_over_the_seeds():
    outcome = Outcome(claim=claim(unit="%"), got=2.0, by_seed=(1.0, None, 4.0))
    assert outcome.spread == 1.5
    assert outcome.got_text == "2 ± 1.5 %"
    assert Outcome(claim=claim(), got=2.0, by_seed=(2.0,)).got_text == "2"
    assert Outcome(claim=claim(), got=None).got_text == "no number"


def test_an_experiment_is_read_with_its_claims_in_order(toys):
    experiment = load_experiments(toys)["alpha"]
    assert (experiment.name, experiment.title, experiment.method) == ("alpha", "A toy", "toys")
    assert (experiment.papers, experiment.minutes) == (("2412.00001",), 2)
    gap, gain = experiment.claims
    assert (gap.name, gap.expected, gap.is_main) == ("gap", "at most 1 %", True)
    assert (gain.name, gain.expected, gain.is_main) == ("gain", "at least 1.5", False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[gap]\nclaim = 'x'\n", r"\[gap\] must have `claim`, a sentence, and one of `most` and `least`"),
        ("[gap]\nclaim = 'x'\nmost = 1\nleast = 0\n", r"\[gap\] must have"),
        ("[gap]\nmost = 1\n", r"\[gap\] must have"),
        ("[gap\n", "every experiment says there what it claims"),
    ],
)
def test_a_claim_that_is_none_is_refused(toys, text, said):
    (toys / "alpha" / "expected.toml").write_text(text)
    with pytest.raises(UserError, match=said):
        load_experiment(toys / "alpha")


def test_a_missing_file_of_claims_is_refused(toys):
    (toys / "alpha" / "expected.toml").unlink()
    with pytest.raises(UserError, match="expected.toml: No such file or directory; every experiment says"):
        load_experiment(toys / "alpha")


def test_a_result_file_is_read_as_it_was_written(toys):
    experiment = load_experiment(toys / "alpha")
    result = experiment.result
    assert result.got == {"gap": 0.5, "gain": 2.0}
    assert result.by_seed == {"gap": (0.25, 0.75), "gain": ()}
    assert results.result_text(experiment, result) == (toys / "alpha" / results.RESULT_FILE).read_text()
    held = json.loads(results.result_text(experiment, result))["claims"][0]
    assert held == {
        "name": "gap",
        "claim": "the gap is small",
        "expected": "at most 1 %",
        "got": 0.5,
        "by_seed": [0.25, 0.75],
        "spread": 0.25,
        "holds": True,
    }
    assert load_experiment(toys / "beta").result is None


def test_a_broken_result_file_is_refused(tmp_path):
    (tmp_path / "comparison.json").write_text('{"experiment": ')
    with pytest.raises(UserError, match="delete it and run the experiment again"):
        load_result(tmp_path / "comparison.json")


def test_what_is_not_known_is_said():
    result = results.read_result(
        {"experiment": "x", "circumstances": {"torch": "2", "python": "3", "time": "t"}}
    )
    assert result.where.startswith("minutes not recorded, torch 2")


def test_where_a_result_comes_from_stands_in_one_line(toys):
    where = load_experiment(toys / "alpha").result.where
    assert where == "toy, 1.5 min, torch 2, Python 3, commit 0123456, 2026-01-02"


def test_the_hash_follows_settings_scripts_and_what_they_import(toys):
    def now():
        return load_experiment(toys / "alpha").settings_hash

    seen = {now()}
    (toys / "shared.py").write_text("import deeper\n")
    (toys / "deeper.py").write_text("A = 1\n")
    assert now() in seen, "nobody imports it"
    for path, text in [
        (toys / "alpha" / "expected.toml", "[a]\nclaim = 'b'\nmost = 3\n"),
        (toys / "alpha" / "lengths.txt", "1 2 3\n"),
        (toys / "alpha" / "more.py", "from shared import x\n"),
        (toys / "shared.py", "import deeper  # changed\n"),
        (toys / "deeper.py", "A = 2\n"),
    ]:
        path.write_text(text)
        assert now() not in seen, path
        seen.add(now())
    (toys / "alpha" / "README.md").write_text("words")
    assert now() in seen


def test_the_library_hash_follows_every_room_but_the_command_line(tmp_path, monkeypatch):
    root = tmp_path / "hardy"
    for name in ("cli/main.py", "ops/a.py", "ops/b.cpp", "__init__.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("1")
    monkeypatch.setattr(results.hardy, "__file__", str(root / "__init__.py"))
    seen = {results.library_hash()}
    (root / "cli" / "main.py").write_text("2")
    assert results.library_hash() in seen
    for name in ("ops/a.py", "ops/b.cpp", "__init__.py"):
        (root / name).write_text("2")
        assert results.library_hash() not in seen, name
        seen.add(results.library_hash())


def test_the_table_of_evidence_shows_main_and_missed_claims(toys):
    experiments = list(load_experiments(toys).values())
    table = results.evidence_table(experiments)
    row = "| [toys](experiments/alpha/README.md) | the gap is small | at most 1 % | 0.5 ± 0.25 % | holds |"
    assert row in table
    assert "there is a gain" not in table
    assert "2 of 2 claims hold" in table
    assert "takes 4 minutes" in table
    assert table.endswith("Not run yet: beta.")
    path = toys / "alpha" / "expected.toml"
    path.write_text(path.read_text().replace("least = 1.5", "least = 2.5"))
    table = results.evidence_table(list(load_experiments(toys).values()))
    assert "| there is a gain | at least 2.5 | 2 | **missed** |" in table
    assert "1 of 2 claims hold" in table


def test_the_table_of_claims_says_over_how_many_seeds(toys):
    experiment = load_experiment(toys / "alpha")
    outcomes = experiment.outcomes(experiment.result)
    table = results.claims_table(outcomes, command="do it", seeds=(0, 1, 2))
    assert table.splitlines()[0] == "| claim | command | expected | got ± half the range of 3 seeds | |"
    assert "| the gap is small | `do it` | at most 1 % | 0.5 ± 0.25 % | holds |" in table
    table = results.claims_table(outcomes[1:], command="do it", seeds=(0, 1))
    assert table.splitlines()[0].endswith("| got, 2 seeds | |")
    assert results.claims_table(outcomes, command="do it", seeds=()).splitlines()[0].endswith("| got | |")
