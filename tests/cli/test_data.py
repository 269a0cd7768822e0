"""The verb `data inspect`."""

import json

from hardy.cli.main import main


def test_the_corpus_in_words_bars_and_samples(small, capsys):
    assert main(["data", "inspect", *small, "--samples", "1"]) == 0
    text = " ".join(capsys.readouterr().out.split())  # a long path may wrap the line
    assert "tokenizer bytes (257 tokens)" in text and "nats per token" in text
    assert "documents by length" in text and "█" in text
    assert text.count("tokens ─") == 1 and "counts: " in text


def test_json_has_the_numbers_of_both_splits(small, capsys):
    assert main(["data", "inspect", "tiny", *small, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    splits = shown["splits"]
    assert splits["train"]["num_documents"] + splits["validation"]["num_documents"] == 40
    assert sum(splits["train"]["histogram"]["documents"]) == splits["train"]["num_documents"]
    assert (shown["vocabulary"], len(shown["samples"])) == (257, 3)


def test_a_picture_is_drawn(small, capsys, tmp_path):
    path = tmp_path / "lengths.png"
    assert main(["data", "inspect", *small, "--png", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert f"drawn: {path}" in capsys.readouterr().out.replace("\n", "")[-len(str(path)) - 40 :]


def test_wrong_words_are_refused(capsys):
    assert main(["data", "inspct"]) == 2
    assert "there is no action 'inspct'; did you mean 'inspect'" in capsys.readouterr().err
    assert main(["data", "inspect", "--data.source", "fils:x"]) == 2
    assert "did you mean 'files'" in capsys.readouterr().err
