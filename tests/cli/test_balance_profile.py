"""`hardy balance profile`."""

import json

import pytest
import torch

from hardy.balance.cost import load_cost, shape_hash
from hardy.balance.fit import fit_cost
from hardy.balance.plan import Scheme
from hardy.cli import balance_profile
from hardy.cli.balance import add_balance, model_sizes
from hardy.cli.main import main
from hardy.cli.parser import Parser
from hardy.clock import WallClock
from hardy.distributed.balance import profile
from hardy.distributed.balance.profile import rows_to_measure
from hardy.distributed.comm import Alone
from hardy.distributed.simulation import SimWorld


def test_rows_have_the_same_tokens_in_other_pieces():
    rows = rows_to_measure(2048)
    assert (64,) in rows and (2048,) in rows and (64,) * 32 in rows
    assert all(len(set(row)) == 1 and sum(row) <= 2048 for row in rows)
    assert len(rows) == len(set(rows)) == 11


@pytest.fixture
def steady(monkeypatch):
    """Steps that take exactly what a law says: what a busy machine measures is no test."""

    def law(_model, row, *_, **__):
        return 2.0 + sum(1e-5 * s * s + 0.01 * s for s in row)

    monkeypatch.setattr(profile, "_step_ms", law)


def test_what_is_measured_is_fitted_and_stored(steady, capsys, tmp_path):
    path = tmp_path / "cost.json"
    assert main(["balance", "profile", "--cost", "1m", "--context", "512", "--out", str(path)]) == 0
    text = capsys.readouterr().out
    assert "held out" in text and f"wrote {path}" in text and "not measured" in text
    cost = load_cost(path, model_hash=shape_hash(model_sizes("1m")))
    own = cost.of(Scheme())
    assert (own.a, own.b, own.c) == pytest.approx((1e-5, 0.01, 2.0))
    assert [each.scheme.context for each in cost.schemes] == [1, 2, 4, 8]
    facts = dict(cost.facts)
    assert facts["derived"] == "cp2, cp4, cp8" and {"torch", "device", "dtype", "recompute"} <= set(facts)
    assert main(["balance", "plan", "--cost", str(path), "--sequences", "9", "--batches", "1"]) == 0


def test_as_json(steady, capsys):
    words = ["balance", "profile", "--cost", "1m", "--context", "512", "--ranks", "1", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"][0]["error"] < 1e-6 and len(found["measured"]) == 10
    assert len(found["cost"]["schemes"]) == 1


def test_a_step_is_really_run(capsys):
    rows = rows_to_measure(64, shortest=16)
    assert max(map(sum, rows)) <= 64
    measured = balance_profile.measure(
        "1m", Alone(clock=WallClock()), longest=128, device=torch.device("cpu")
    )
    assert all(each.time > 0 for each in measured)
    assert {each.lengths for each in measured} == set(rows_to_measure(128))


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(balance_profile, "measure", lambda *_, **__: pytest.fail("minutes were lost"))
    words = ["balance", "profile", "--cost", "1m", "--context", "512"]
    assert main([*words, "--out", str(tmp_path / "none" / "cost.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_groups_are_measured_too(monkeypatch):
    def law(_model, row, group, *_, **__):
        return 2.0 + sum(1e-5 * s * s + 0.01 * s for s in row) / (1 + 0.5 * (group.size - 1))

    monkeypatch.setattr(profile, "_step_ms", law)
    here = torch.device("cpu")
    found = SimWorld(4).run(lambda comm: balance_profile.measure("1m", comm, longest=512, device=here))
    assert found[0] == found[3]
    cost, fits = fit_cost(found[0], cap_tokens=512)
    assert [own.scheme.context for own in cost.schemes] == [1, 2, 4]
    assert [own.a for own in cost.schemes] == pytest.approx([1e-5, 1e-5 / 1.5, 1e-5 / 2.5])
    told = list(balance_profile._lines(fits, {"source": "s", "device": "d", "torch": "t", "dtype": "f"}, 0))
    assert [line.split(":")[0] for line in told[1::2]] == ["one worker", "a group of 2", "a group of 4"]
    assert not any("not measured" in line for line in told)


def test_workers_are_started_with_the_same_words(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(balance_profile, "run_workers", lambda *given: seen.append(given) or 0)
    words = ["balance", "profile", "--cost", "1m", "--context", "512", "--ranks", "4"]
    words += ["--out", str(tmp_path / "cost.json"), "--json"]
    assert main([*words, "--workers", "2"]) == 0
    (number, given), parser = seen[0], Parser()
    add_balance(parser)
    assert number == 2 and vars(parser.parse_args(given[1:])) == vars(parser.parse_args(words[1:]))


@pytest.mark.parametrize(
    "number, text", [("3", "2, 4, 8, ... workers; give such a --workers, got 3"), ("0", "1")]
)
def test_numbers_of_workers_that_make_no_groups(number, text, capsys):
    assert main(["balance", "profile", "--cost", "1m", "--context", "512", "--workers", number]) == 2
    assert text in capsys.readouterr().err
