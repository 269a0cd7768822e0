"""The verb `probe`: which layer knows what, and refusals."""

import json

import pytest

from hardy.cli.main import main

pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra linear)")


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    lines = [{"text": f"{n} 123", "label": "digits"} for n in range(20)]
    lines += [{"text": f"Document counts {chr(97 + n)}", "label": "words"} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def asked(capsys, *words):
    assert main(["probe", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_a_run_is_probed_layer_by_layer(finished_run, labels, capsys, pool):
    found = asked(capsys, finished_run, "--labels", labels, "--pool", pool)
    assert [layer["layer"] for layer in found["layers"]] == ["embedding", "1"]
    assert (found["classes"], found["train_texts"], found["test_texts"]) == (2, 30, 10)
    assert (found["train_groups"], found["test_groups"]) == (30, 10)
    assert found["majority_accuracy"] == 0.5
    for layer in found["layers"]:
        for one in (layer["ours"], layer["theirs"]):
            assert 0 <= one["accuracy"] <= 1 and one["iterations"] >= 1 and one["seconds"] > 0
    if pool == "mean":
        assert max(layer["ours"]["accuracy"] for layer in found["layers"]) == 1.0
        assert all(layer["ours"]["converged"] for layer in found["layers"])


def test_the_table_says_the_same(finished_run, labels, capsys):
    found = asked(capsys, finished_run, "--labels", labels, "--tokens", "5")
    assert found["cut_texts"] > 0
    assert main(["probe", str(finished_run), "--labels", str(labels), "--tokens", "5"]) == 0
    text = capsys.readouterr().out
    assert (
        f"30 texts of 30 groups to train, 10 of 10 to test, 2 classes; {found['cut_texts']} texts were cut"
        in text
    )
    for layer in found["layers"]:
        row = next(line for line in text.splitlines() if line.startswith(layer["layer"]))
        assert row.split()[1] == f"{layer['ours']['accuracy']:.3f}"
        assert row.split()[4] == f"{layer['theirs']['accuracy']:.3f}"
    assert f"known best by layer: {found['best_layer']} (" in text
    assert "majority        0.500" in text


def test_groups_stay_whole(finished_run, labels, tmp_path, capsys):
    lines = [json.loads(line) for line in labels.read_text().splitlines()]
    path = tmp_path / "grouped.jsonl"
    path.write_text("\n".join(json.dumps(line | {"group": n % 4}) for n, line in enumerate(lines)))
    found = asked(capsys, finished_run, "--labels", path)
    assert (found["train_texts"], found["test_texts"]) == (30, 10)
    assert (found["train_groups"], found["test_groups"]) == (3, 1)


def test_an_exported_folder_is_probed_as_its_run(finished_run, labels, tmp_path, capsys):
    assert main(["export", str(finished_run), str(tmp_path / "out")]) == 0
    capsys.readouterr()

    def accuracies(source):
        layers = asked(capsys, source, "--labels", labels, "--seed", "3")["layers"]
        return [(layer["ours"]["accuracy"], layer["ours"]["iterations"]) for layer in layers]

    assert accuracies(finished_run) == accuracies(tmp_path / "out")


def test_another_architecture_is_probed_through_transformers(labels, finished_run, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPTNeoXConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    for file in (finished_run / "tokenizer").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    capsys.readouterr()
    found = asked(capsys, tmp_path, "--labels", labels)
    assert [layer["layer"] for layer in found["layers"]] == ["embedding", "1", "2"]
    assert max(layer["ours"]["accuracy"] for layer in found["layers"]) == 1.0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["RUN"], "one of the arguments --labels --task is required"),
        (["RUN", "--task", "modul"], "there is no task 'modul'; did you mean 'module'"),
        (
            ["RUN", "--labels", "nowhere.jsonl"],
            "--labels nowhere.jsonl cannot be read: No such file or directory\n",
        ),
        (["RUN", "--labels", "ONE"], "has 1 classes (digits); a probe needs at least two"),
        (["RUN", "--labels", "RARE"], "class 'words' has 1 group (1 text)"),
        (
            ["RUN", "--labels", "LABELS", "--test-share", "1"],
            "--test-share must be above 0 and below 1, got 1",
        ),
        (["RUN", "--labels", "LABELS", "--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["RUN", "--labels", "LABELS", "--max-iter", "0"], "--max-iter must be at least 1, got 0"),
        (["RUN", "--labels", "LABELS", "--step", "3"], "has no checkpoint of step 3"),
        (["/nowhere", "--labels", "LABELS"], "there is no run in /nowhere"),
        (["EMPTY", "--labels", "LABELS"], "there is no"),
    ],
)
def test_what_cannot_work_is_refused(finished_run, labels, tmp_path, capsys, words, text):
    lines = labels.read_text().splitlines()
    (tmp_path / "one.jsonl").write_text("\n".join(lines[:20]))
    (tmp_path / "rare.jsonl").write_text("\n".join(lines[:21]))
    empty = tmp_path / "empty"
    assert main(["export", str(finished_run), str(empty)]) == 0
    (empty / "model.safetensors").unlink()
    named = {"RUN": finished_run, "LABELS": labels, "EMPTY": empty}
    named |= {"ONE": tmp_path / "one.jsonl", "RARE": tmp_path / "rare.jsonl"}
    assert main(["probe", *(str(named.get(word, word)) for word in words)]) == 2
    assert text in capsys.readouterr().err


def test_the_tasks_are_listed(capsys):
    assert main(["probe", "--help"]) == 0
    text = capsys.readouterr().out
    assert "\n  module " in text and "\n  docstring " in text
