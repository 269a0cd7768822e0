"""The verb `cite`: BibTeX on stdout, what has none on stderr."""

import json

import pytest

from hardy.cli import citations
from hardy.cli.main import main
from hardy.config import from_dict, override, to_dict
from hardy.train.config import TrainConfig


@pytest.fixture
def run_of(tmp_path):
    """Return a run folder with a config."""

    def make(**changes):
        config = from_dict(TrainConfig, override({}, changes))
        (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
        return str(tmp_path)

    return make


def test_entries_are_printed_once_hardy_first(run_of, capsys):
    changes = {"optim.name": "adaptive_adamw", "optim.guard.history": "global", "strategy.name": "edit"}
    assert main(["cite", run_of(**changes)]) == 0
    said, error = capsys.readouterr()
    keys = [line.partition("{")[2].rstrip(",") for line in said.splitlines() if line.startswith("@")]
    assert keys == [citations.HARDY, citations.ADAPTIVE, citations.ADAMW, citations.EDIT]
    assert citations.entries()[citations.EDIT] in said
    assert error == ""


def test_what_has_no_entry_is_said_on_stderr(run_of, capsys):
    changes = {"strategy.name": "robust", "strategy.rule": "caf", "strategy.pre": []}
    assert main(["cite", run_of(**changes)]) == 0
    said, error = capsys.readouterr()
    assert "caf" not in said
    assert error == "hardy: no entry for strategy.rule=caf; look up whom to cite for it\n"


def test_list_prints_all(capsys):
    assert main(["cite", "--list"]) == 0
    assert capsys.readouterr().out.count("\n@") + 1 == len(citations.entries())


def test_json_says_which_setting_asks_for_what(run_of, capsys):
    assert main(["cite", run_of(**{"optim.name": "smmf"}), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["used"][0] == {"setting": "optim.name", "value": "smmf", "keys": [citations.SMMF]}
    assert found["keys"][:2] == [citations.HARDY, citations.SMMF]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give a run folder, or --list"),
        (["runs/a", "--list"], "give a run folder, or --list"),
        (["nowhere"], "there is no run in nowhere (no config.json)"),
    ],
)
def test_what_cannot_work_is_refused(words, said, capsys):
    assert main(["cite", *words]) == 2
    assert said in capsys.readouterr().err
