"""The verb `balance`: what it is given."""

import pytest

from hardy.balance.cost import analytic_cost
from hardy.balance.plan import Scheme
from hardy.cli.balance import cost_model, model_sizes, read_strategies
from hardy.cli.main import main
from hardy.config import UserError


def test_costs_come_from_models_presets_and_files(tmp_path):
    assert cost_model("1m", ranks=4, cap_tokens=99).of(Scheme(context=4)).cap_tokens == 396
    assert cost_model("flexsp-13b-192k", ranks=4, cap_tokens=9).unit == "ms"
    made = analytic_cost(model_sizes("1m"), cap_tokens=7)
    made.save(tmp_path / "cost.json")
    assert cost_model(str(tmp_path / "cost.json"), ranks=1, cap_tokens=1) == made
    with pytest.raises(UserError, match="--cost: .*hydraulis-32b"):
        cost_model("hydraulis-32", ranks=1, cap_tokens=1)


def test_strategies_are_read_as_they_are_written():
    found = read_strategies("4x tp16 | 1x tp8 pp3 + 2x cp4")
    eight = Scheme(tensor=8, pipeline=3)
    assert found == ((Scheme(tensor=16),) * 4, (eight, Scheme(context=4), Scheme(context=4)))
    for text in ("", "tp4", "0x tp4", "1x tp0", "1x dp4", "1x tp4 +"):
        with pytest.raises(UserError, match="--strategies"):
            read_strategies(text)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["plan", "--ranks", "0"], "--ranks must be at least 1, got 0"),
        (["plan", "--sequences", "5", "--tokens", "9"], "give one of them"),
        (["plan", "--lengths", "wikipeda"], "wikipedia"),
        (["plan", "--context", "4096", "--overlong", "error"], "longer than 4,096 tokens.*raise the limit"),
        (["plan", "--mode", "dispatch", "--degree", "3"], "degree=3 does not divide"),
        (["plan", "--mode", "dispatch"], "raise cap_tokens or the largest degree, or split"),
        (["plan", "--cost", "flexsp-13b-192k", "--ranks", "1"], "no scheme of --cost"),
        (["plan", "--cost", "hydraulis-7b", "--ranks", "8", "--strategies", "published"], "write others out"),
        (["simulate", "--methods", "lpt"], "no method 'lpt'"),
        (["simulate", "--cost", "hydraulis-32b", "--strategies", "9x tp16", "--ranks", "64"], "144 ranks"),
        (["profile", "--cost", "hydraulis-32b"], "profile measures a model"),
        (["profile", "--cost", "1m", "--context", "100"], "too short to see attention"),
        (["propose", "--bridge-bandwidth", "-1"], "from 0 on, got -1; 0 does not count the bridge"),
        (["propose", "--bridge-bandwidth", "nan"], "from 0 on, got nan"),
        (
            ["plan", "--methods", "dispatch"],
            "--methods is for `hardy balance simulate`; leave it out of `plan`",
        ),
        (["simulate", "--mode", "pack"], "--mode is for `hardy balance plan`"),
        (["propose", "--out", "cost.json"], "--out is for `hardy balance profile`"),
        (["dance"], "there is no action 'dance'"),
    ],
)
def test_what_makes_no_sense_is_refused(capsys, words, text):
    assert main(["balance", *words]) == 2
    import re

    assert re.search(text, capsys.readouterr().err.replace("\n", " "))


def test_a_cost_file_that_is_none(capsys, tmp_path):
    (tmp_path / "cost.json").write_text("{}")
    assert main(["balance", "plan", "--cost", str(tmp_path / "cost.json")]) == 2
    assert "is no cost file" in capsys.readouterr().err


def test_lengths_of_a_file_and_of_a_histogram(capsys, tmp_path):
    (tmp_path / "lengths.txt").write_text("".join(f"{n}\n" for n in (100, 200, 300, 400)))
    words = ["balance", "plan", "--sequences", "4", "--batches", "1", "--ranks", "2"]
    assert main([*words, "--lengths", str(tmp_path / "lengths.txt")]) == 0
    assert "4 sequences, 1,000 tokens on 2 ranks" in capsys.readouterr().out
    (tmp_path / "bins.csv").write_text("lo,hi,documents,tokens\n10,10,5,50\n")
    assert main([*words, "--lengths", str(tmp_path / "bins.csv")]) == 0
    assert "4 sequences, 40 tokens" in capsys.readouterr().out
