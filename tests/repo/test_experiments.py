"""Every experiment runs, says what it claims, and its page shows what its result file holds."""

import re
import runpy
import sys
import time
from pathlib import Path

import pytest

from hardy.cli.reproduce import with_table
from hardy.cli.reproduce_results import RESULT_FILE, finite, load_experiment, load_experiments, result_text

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
FOLDERS = sorted(path.parent for path in EXPERIMENTS.glob("*/run.py"))
MEASURED = [folder for folder in FOLDERS if (folder / RESULT_FILE).exists()]
MOST_SMOKE_S = 12
pytestmark = pytest.mark.usefixtures("no_modules_of_experiments")


def folder_name(path):
    return path.name


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def page_of(folder):
    path = folder / "README.md"
    assert path.exists(), f"experiments/{folder.name} has no README.md"
    return path.read_text(encoding="utf-8")


def study_of(folder):
    """Return what `run.py` does, without running it."""
    return runpy.run_path(str(folder / "run.py"))["STUDY"]


def test_every_folder_has_a_script():
    folders = [path for path in EXPERIMENTS.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert sorted(folders) == FOLDERS
    assert len(FOLDERS) >= 9


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=folder_name)
def test_smoke(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "--smoke"])
    before, began = contents(folder), time.thread_time()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(folder / "run.py"), run_name="__main__")
    assert ended.value.code == 0
    assert time.thread_time() - began <= MOST_SMOKE_S
    assert contents(folder) == before, "a smoke run changed the experiment's own files"
    assert list(tmp_path.iterdir()) == [], "a smoke run left something"
    printed = capsys.readouterr().out
    assert all(f"smoke  {claim.text}\n" in printed for claim in load_experiment(folder).claims)


@pytest.mark.parametrize("folder", FOLDERS, ids=folder_name)
def test_it_says_what_it_claims_whose_it_is_and_how_long_it_takes(folder):
    experiment = load_experiment(folder)
    assert experiment.claims
    assert any(claim.is_main for claim in experiment.claims), "nothing for the table of evidence"
    assert experiment.title != folder.name
    assert experiment.method != folder.name
    assert experiment.minutes > 0
    assert all(re.fullmatch(r"2412\.\d{5}", paper) for paper in experiment.papers)


def test_all_experiments_together_are_to_take_under_90_minutes():
    assert sum(experiment.minutes for experiment in load_experiments(EXPERIMENTS).values()) < 90


@pytest.mark.parametrize("folder", FOLDERS, ids=folder_name)
def test_the_page_says_claim_command_expected_and_got(folder):
    text = page_of(folder)
    words = [w for w in ("claim", "command", "expected", "got") if not re.search(rf"\b{w}\b", text, re.I)]
    assert words == []
    assert f"hardy reproduce {folder.name} --smoke" in text
    assert f"experiments/{folder.name}/run.py --report" in text


@pytest.mark.parametrize("folder", FOLDERS, ids=folder_name)
def test_the_page_shows_the_numbers_of_the_result_file(folder):
    text, page = page_of(folder), study_of(folder).page
    assert text == page(text), f"run `python experiments/{folder.name}/run.py --report`"
    assert tables_by_hand(text) == []
    if folder in MEASURED:
        wrong = re.sub(r"\| at (most|least) \S+ ", "| at most 17.5 ", text, count=1)
        assert wrong != text == page(wrong), "a number written by hand would stay"


@pytest.mark.parametrize("folder", MEASURED, ids=folder_name)
def test_the_result_file_follows_from_what_was_measured(folder):
    experiment, study = load_experiment(folder), study_of(folder)
    result = experiment.result
    assert (folder / RESULT_FILE).read_text(encoding="utf-8") == result_text(experiment, result)
    measured = dict(result.measured)
    assert finite(study.numbers(measured)) == pytest.approx(dict(result.got), rel=1e-6, abs=1e-9)
    assert result.seeds == study.seeds
    for place in range(len(study.seeds) if any(result.by_seed.values()) else 0):
        alone = finite(study.numbers(study.of_seed(measured, place)))
        recorded = {name: values[place] for name, values in result.by_seed.items()}
        assert alone.keys() == recorded.keys()
        for name, value in alone.items():  # none where one seed alone gives no number
            wanted = recorded[name]
            assert value == (wanted if wanted is None else pytest.approx(wanted, rel=1e-6, abs=1e-9))


@pytest.mark.parametrize("folder", MEASURED, ids=folder_name)
def test_a_result_holds_its_circumstances(folder):
    result = load_experiment(folder).result
    assert result.experiment == folder.name
    known = {key for key, value in result.circumstances.items() if value}
    assert known >= {"time", "commit", "machine", "torch", "python"}
    if result.settings_hash is not None:
        assert known >= {"processor", "cores", "processes", "numpy", "library_hash"}
        assert result.duration_s > 0


def test_the_table_of_evidence_shows_the_numbers_of_the_result_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    experiments = list(load_experiments(EXPERIMENTS).values())
    assert text == with_table(text, experiments, name="README.md"), "run `hardy reproduce --table README.md`"
    for experiment in experiments:
        for outcome in experiment.outcomes(experiment.result) if experiment.result else ():
            if not outcome.holds:
                row = f"| {outcome.claim.text} | {outcome.claim.expected} | {outcome.got_text} | **missed** |"
                assert row in text, "what was missed must be said"
    outside = re.sub(r"<!-- generated by hardy.*?<!-- end of generated -->", "", text, flags=re.DOTALL)
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    assert rows
    by_hand = [row for row in rows if "experiments/" in row and re.search(r"\d %", row)]
    assert by_hand == [], "numbers of experiments belong into the generated table"


def tables_by_hand(text):
    """Return the rows of tables with a number outside the part that a script writes."""
    others = re.sub(r"<!-- generated by .*?<!-- end of generated -->", "", text, flags=re.DOTALL)
    return [line for line in others.splitlines() if re.match(r"\|.*\d", line)]


def test_a_number_outside_the_generated_part_is_noticed():
    inside = "<!-- generated by run.py -->\n| adamw | 2.05 |\n<!-- end of generated -->\n"
    assert tables_by_hand(f"| row | loss |\n|---|---|\n{inside}") == []
    assert tables_by_hand(f"{inside}| apollo | 2.06 |\n") == ["| apollo | 2.06 |"]
