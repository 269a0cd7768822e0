"""The verbs `generate` and `export`."""

import json

import pytest

from hardy.cli.main import main
from hardy.cli.weights import find_checkpoint, load_folder, load_run


def written(capsys, *words):
    assert main(["generate", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_writes_the_same_for_the_same_seed(finished_run, capsys):
    words = [finished_run, "--prompt", "Document", "--tokens", "12", "--temperature", "1.5"]
    first, again, other = (written(capsys, *words, "--seed", seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first["prompt"] == "Document" and 0 < len(first["tokens"]) <= 12


def test_words_without_json_begin_with_the_prompt(finished_run, capsys):
    assert main(["generate", str(finished_run), "--prompt", "Docu", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("Docu")


def test_an_empty_prompt_begins_a_document(finished_run, capsys):
    assert written(capsys, finished_run, "--prompt", "", "--tokens", "2", "--temperature", "0")["tokens"]


def test_an_exported_folder_writes_what_the_run_writes(finished_run, tmp_path, capsys):
    out = tmp_path / "exported"
    assert main(["export", str(finished_run), str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(out)}
    words = ["--prompt", "Document 3", "--tokens", "10", "--top-k", "5", "--top-p", "0.9"]
    assert written(capsys, finished_run, *words) == written(capsys, out, *words)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in out.iterdir()}


def test_an_exported_folder_has_exactly_the_weights(finished_run, tmp_path):
    assert main(["export", str(finished_run), str(tmp_path / "out")]) == 0
    ours, theirs = load_run(finished_run, None)[0].state_dict(), load_folder(tmp_path / "out")[0].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_checkpoint_is_chosen_by_its_step(finished_run):
    assert find_checkpoint(finished_run, None).step == 4
    assert find_checkpoint(finished_run, 2).step == 2
    early, late = (load_run(finished_run, step)[0].state_dict() for step in (2, 4))
    assert any(not early[name].equal(late[name]) for name in early)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["generate", "RUN", "--prompt", "x", "--step", "3"], "has no checkpoint of step 3; there are: "),
        (["generate", "RUN", "--prompt", "x", "--tokens", "0"], "--tokens must be at least 1, got 0"),
        (
            ["generate", "RUN", "--prompt", "x", "--temperature", "-1"],
            "temperature must be at least 0, got -1",
        ),
        (["generate", "RUN"], "the following arguments are required: --prompt"),
        (["generate", "/nowhere", "--prompt", "x"], "there is no run in /nowhere"),
        (["export", "RUN", "RUN"], "is not empty"),
    ],
)
def test_what_cannot_work_is_refused(finished_run, capsys, words, text):
    assert main([str(finished_run) if word == "RUN" else word for word in words]) == 2
    assert text in capsys.readouterr().err


def test_a_run_that_saved_nothing_is_refused(finished_run, tmp_path, capsys):
    (tmp_path / "config.json").write_text((finished_run / "config.json").read_text())
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err


def test_a_folder_has_no_steps(finished_run, tmp_path, capsys):
    assert main(["export", str(finished_run), str(tmp_path / "out")]) == 0
    assert main(["generate", str(tmp_path / "out"), "--prompt", "x", "--step", "2"]) == 2
    assert "is no run and has no checkpoints; leave --step out" in capsys.readouterr().err
