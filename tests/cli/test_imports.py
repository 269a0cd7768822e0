"""The verb `import`."""

import json

import pytest

from hardy.cli.main import main
from hardy.cli.weights import load_run


@pytest.fixture
def exported(finished_run, tmp_path):
    assert main(["export", str(finished_run), str(tmp_path / "exported")]) == 0
    return tmp_path / "exported"


def data_settings(small):
    """The words of `small` that do not change the model."""
    pairs = zip(small[::2], small[1::2], strict=True)
    return [word for pair in pairs if not pair[0].startswith("--model.") for word in pair]


def test_an_exported_run_comes_back_with_the_same_weights_and_trains_on(
    small, finished_run, exported, tmp_path, capsys
):
    run_dir = tmp_path / "imported"
    capsys.readouterr()
    assert main(["import", str(exported), str(run_dir), "--json", *data_settings(small)]) == 0
    assert json.loads(capsys.readouterr().out) == {"run_dir": str(run_dir)}
    before, after = (load_run(path, None)[0].state_dict() for path in (finished_run, run_dir))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    assert main(["resume", str(run_dir), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["steps"] == 4
    last = json.loads((finished_run / "summary.json").read_text())
    assert summary["first_loss"] < last["first_loss"] - 0.05  # it begins where the other run ended


def test_an_imported_run_writes_before_it_trains(small, exported, tmp_path, capsys):
    assert main(["import", str(exported), str(tmp_path / "run"), *data_settings(small)]) == 0
    assert f"go on with: hardy resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert main(["generate", str(tmp_path / "run"), "--prompt", "D", "--tokens", "2"]) == 0


def test_sizes_of_the_model_cannot_be_set(small, exported, tmp_path, capsys):
    assert main(["import", str(exported), str(tmp_path / "run"), "--model.name", "1m"]) == 2
    assert "model.name cannot be set here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_model_is_refused(tmp_path, capsys):
    assert main(["import", str(tmp_path), str(tmp_path / "run")]) == 2
    assert "config.json" in capsys.readouterr().err


def test_a_run_folder_in_use_is_left_alone(small, finished_run, exported, capsys):
    before = sorted(path.name for path in finished_run.rglob("*"))
    assert main(["import", str(exported), str(finished_run), *data_settings(small)]) == 2
    assert "belongs to another config" in capsys.readouterr().err
    assert sorted(path.name for path in finished_run.rglob("*")) == before
