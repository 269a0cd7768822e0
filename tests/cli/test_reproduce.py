"""The verb `reproduce`: lists, runs, judges, and says where experiments are."""

import json

import pytest

from hardy.cli import reproduce
from hardy.cli.main import main
from hardy.cli.reproduce_results import load_experiments


@pytest.fixture
def call(toys, tmp_path, capsys):
    """Return exit code, stdout and stderr of `hardy reproduce` on the toys."""

    def run(*words):
        code = main(["reproduce", *words, "--experiments", str(toys), "--out", str(tmp_path / "out")])
        return code, *capsys.readouterr()

    return run


def test_list_says_claims_last_result_and_time(call):
    code, said, _ = call("--list")
    assert code == 0
    assert "alpha: A toy (arXiv 2412.00001; about 2 min on two idle cores)" in said
    assert "last result 2026-01-02: 2 of 2 claims hold, 1.5 min, settings as now" in said
    assert "holds    the gap is small: at most 1 %, got 0.5 ± 0.25 %" in said
    assert "never run\n  not run  the gap is small" in said
    assert "hardy reproduce all` (about 4 min); perceptron is large_steps" in said


def test_list_says_when_settings_changed_since(call, toys):
    (toys / "alpha" / "more.toml").write_text("a = 1\n")
    assert "settings or scripts changed since" in call("--list")[1]
    path = toys / "alpha" / "results" / "comparison.json"
    path.write_text(path.read_text().replace('"settings_hash": "', '"other": "'))
    assert "settings not recorded" in call("--list")[1]


def test_list_as_json(call):
    found = json.loads(call("--list", "--json")[1])
    assert found["aliases"] == {"perceptron": "large_steps"}
    alpha, beta = found["experiments"]
    assert (alpha["name"], alpha["claims"][1]["verdict"]) == ("alpha", "holds")
    assert beta["last"] == "never run"


def test_a_run_says_expected_got_and_what_the_repository_says(call):
    code, said, _ = call("alpha")
    assert code == 0
    assert "[1/1] alpha: A toy, about 2 min on two idle cores" in said
    assert "  holds   the gap is small\n          expected at most 1 %, got 0.5 ± 0.25 %;" in said
    assert "in the repository 0.5 ± 0.25 %, holds" in said
    assert "1 of 1 reproduced; no claim that holds in the repository was missed" in said


def test_a_claim_that_held_and_was_missed_ends_with_1(call, toys):
    (toys / "alpha" / "value.number").write_text("1.5")
    code, said, _ = call("all")
    assert code == 1
    assert "  missed  the gap is small" in said
    assert said.endswith("not reproduced:\n  alpha: the gap is small\n")


def test_a_claim_that_was_missed_in_the_repository_too_ends_with_0(call, toys):
    (toys / "alpha" / "value.number").write_text("1.5")
    assert call("alpha", "--write")[0] == 1, "it is held against what stood there before"
    assert call("alpha", "--force")[0] == 0


def test_an_experiment_that_breaks_does_not_stop_the_others(call, toys):
    (toys / "alpha" / "value.number").write_text("broken")
    code, said, _ = call("all")
    assert code == 1
    assert "alpha failed with exit code 1:" in said
    assert "[2/2] beta" in said
    assert "  holds   the gap is small" in said
    assert said.endswith("not reproduced:\n  alpha: did not run to its end\n")


def test_smoke_proves_nothing(call, toys):
    (toys / "alpha" / "value.number").write_text("1.5")
    code, said, _ = call("all", "--smoke")
    assert code == 0
    assert said.count("s (smoke: proves nothing)") == 2
    assert said.endswith("2 of 2 ran\n")


def test_all_takes_the_short_ones_first(toys):
    path = toys / "alpha" / "expected.toml"
    path.write_text(path.read_text().replace("minutes = 2", "minutes = 9"))
    experiments = load_experiments(toys)
    assert [one.name for one in reproduce.choose(["all"], experiments)] == ["beta", "alpha"]
    assert [one.name for one in reproduce.choose(["alpha", "beta", "alpha"], experiments)] == [
        "alpha",
        "beta",
    ]


def test_aliases_and_hyphens_are_understood(toys):
    (toys / "beta").rename(toys / "large_steps")
    experiments = load_experiments(toys)
    for name in ("perceptron", "large-steps", "large_steps"):
        assert [one.name for one in reproduce.choose([name], experiments)] == ["large_steps"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name an experiment, or `all`: alpha, beta (see `hardy reproduce --list`)"),
        (("alpa",), "did you mean 'alpha'?"),
        (("all", "alpha", "--jobs", "0"), "--jobs 0: give a number from 1 on"),
        (("alpha", "--smoke", "--page", "a.html"), "--page shows results, and --smoke makes none"),
        (("all", "--smok"), "there is no option '--smok'"),
    ],
)
def test_what_cannot_work_is_refused(call, words, said):
    code, _, error = call(*words)
    assert code == 2
    assert said in error


def test_without_the_repository_the_way_out_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        reproduce.hardy, "__file__", str(tmp_path / "lib" / "python" / "hardy" / "__init__.py")
    )
    assert main(["reproduce", "--list"]) == 2
    error = capsys.readouterr().err
    assert "this installation of hardy: there are no experiments" in error
    assert "clone it" in error
    assert "--experiments DIR" in error
    assert main(["reproduce", "--list", "--experiments", "elsewhere"]) == 2
    assert "--experiments elsewhere: there are no experiments" in capsys.readouterr().err


def test_the_folder_is_found_beside_the_package_or_here(toys, tmp_path, monkeypatch):
    package = tmp_path / "src" / "hardy" / "__init__.py"
    monkeypatch.setattr(reproduce.hardy, "__file__", str(package))
    assert reproduce.experiments_folder(None) == toys
    monkeypatch.setattr(reproduce.hardy, "__file__", "/nowhere/src/hardy/__init__.py")
    monkeypatch.chdir(tmp_path)
    assert reproduce.experiments_folder(None).resolve() == toys


def test_the_table_is_printed_or_written_between_its_marks(call, tmp_path):
    code, said, _ = call("--table")
    assert code == 0
    assert said.startswith("| method | claim | expected | got | |")
    page = tmp_path / "README.md"
    page.write_text(f"before\n{reproduce.BEGIN}\nold\n{reproduce.END}\nafter\n")
    assert call("--table", str(page))[0] == 0
    assert page.read_text() == f"before\n{reproduce.BEGIN}\n{said}{reproduce.END}\nafter\n"


def test_a_page_without_marks_is_refused(call, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("no marks")
    code, _, error = call("--table", str(page))
    assert code == 2
    assert "must hold the lines" in error
    assert page.read_text() == "no marks"


def test_a_page_is_written_of_what_ran_or_of_the_repository(call, tmp_path):
    page = tmp_path / "page.html"
    assert call("beta", "--page", str(page))[0] == 0
    assert "2 of 2 claims of 1 experiments hold." in page.read_text()
    assert call("--list", "--page", str(page))[0] == 0
    assert "Not run yet: hardy reproduce beta" in page.read_text()


def test_nothing_heavy_is_imported():
    import subprocess
    import sys

    code = (
        "import sys; from hardy.cli.main import parse; parse(['reproduce', '--list']); parse(['cite', 'x']);"
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
