"""The experiments on optimizers of a small model: the Markov text, and who is held against whom on what."""

import importlib
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from hardy.config import from_dict
from hardy.data.config import DataConfig
from hardy.data.corpus import prepare

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
pytestmark = pytest.mark.usefixtures("no_modules_of_experiments")


@pytest.fixture
def module(monkeypatch, tmp_path):
    """Import a shared module of the experiments; what they write goes to `tmp_path`."""
    sys.path.insert(0, str(EXPERIMENTS))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return importlib.import_module


@pytest.fixture
def markov(module, monkeypatch):
    """The Markov task with a short text."""
    found = module("markov")
    monkeypatch.setattr(found, "NUM_CHAINS", 20)
    monkeypatch.setattr(found, "CHAIN_SYMBOLS", 60)
    return found


def test_each_symbol_depends_on_the_last_two(markov):
    symbols_NT = markov.draw(3000, 12, torch.Generator().manual_seed(0), num_symbols=3)
    law = markov.transitions(3)
    assert law.sum(-1) == pytest.approx(torch.ones(3, 3).numpy())
    triples = symbols_NT[:, 3:].unfold(1, 3, 1).flatten(0, 1)
    counts = torch.zeros(3, 3, 3).index_put_(tuple(triples.T), torch.ones(len(triples)), accumulate=True)
    seen = counts.sum(-1, keepdim=True) >= 400
    found = (counts / counts.sum(-1, keepdim=True).clamp(min=1))[seen.expand_as(counts)]
    assert seen.sum() >= 6
    assert found.tolist() == pytest.approx(law[seen.expand_as(law)].tolist(), abs=0.06)
    assert torch.bincount(symbols_NT[:, 0]) / 3000 == pytest.approx(torch.full((3,), 1 / 3).numpy(), abs=0.04)


def test_the_text_is_read_symbol_by_symbol(markov, tmp_path):
    settings = markov.settings()
    data = {key.removeprefix("data."): value for key, value in settings.items() if key.startswith("data.")}
    corpus = prepare(from_dict(DataConfig, data), cache_dir=tmp_path)
    begin = corpus.tokenizer.begin_id
    assert (corpus.tokenizer.vocab_size, begin) == (33, 32)
    read = [token for store in (corpus.train, corpus.validation) for token in store.tokens.tolist()]
    drawn = markov.draw(20, 60, markov.generator_for(0, "markov text"), num_symbols=32).flatten()
    assert [token for token in read if token != begin] == drawn.tolist()
    # 2 % of the symbols begin a chain, which the law does not know; they cost a little more than all others.
    assert 0.5 < markov.floor() / 1.735 < 1.3


def test_the_text_is_written_once_and_another_law_is_another_text(markov, monkeypatch):
    path = Path(markov.settings()["data.tokenizer"])
    path.write_text("as it was")
    markov.settings.cache_clear()
    assert Path(markov.settings()["data.tokenizer"]).read_text() == "as it was"
    monkeypatch.setattr(markov, "STRENGTH", 1.0)
    for cached in (markov.settings, markov.transitions, markov._symbols):
        cached.cache_clear()
    assert Path(markov.settings()["data.tokenizer"]).parent != path.parent


class Canned:
    """Answers trials with a loss by task, optimizer, rate and seed, and remembers them."""

    def __init__(self):
        self.asked = []

    def run(self, work, trials, *, label):
        self.asked += trials
        losses = {"text": 2.0, "markov": 3.0}
        extra = {"mini": 0.5, "zeroed": 0.7}
        best = {"adamw": 2e-3, "mini": 8e-3}
        return {
            t: losses[t.task] * (1 + extra.get(t.optimizer, 0))
            + 0.1 * t.seed
            + (t.lr != best.get(t.optimizer))
            for t in trials
        }


def test_each_task_is_tuned_and_judged_by_itself(module, monkeypatch, tmp_path, markov):
    small = module("small_model")
    monkeypatch.setattr(small, "grid_of", {"adamw": (1e-3, 2e-3), "mini": (8e-3, 1e-2)}.get)
    text = small.Contest(names=["adamw", "mini"], claims={"mini": ("mini", "adamw")})
    chain = small.Contest(
        names=["adamw", "mini"],
        claims={"markov_mini": ("mini", "adamw"), "markov_zeroed": ("zeroed", "mini")},
        at_rate_of={"zeroed": "mini"},
    )
    study = small.OptimizerStudy(table={}, text=text, markov=chain).study(tmp_path, "")
    trials = Canned()
    measured = study.measure(trials, False)
    assert {(t.task, t.steps) for t in trials.asked} == {("text", 300), ("markov", 250)}
    assert {t.lr for t in trials.asked if t.optimizer == "zeroed"} == {8e-3}
    assert [row["optimizer"] for row in measured["rows"]] == ["adamw", "mini"]
    expected = {"mini": 100 * (3.1 / 2.1 - 1), "markov_mini": 100 * (4.6 / 3.1 - 1)}
    assert study.numbers(measured) == pytest.approx(expected | {"markov_zeroed": 100 * (6.2 / 4.6 - 1)})
    assert study.numbers(study.of_seed(measured, 0))["markov_mini"] == pytest.approx(50)
    page = study.tables(measured)
    assert "| mini | 0.008 (edge of the grid) | 4.6000 ± 0.1000 | +48.39 % |" in page
    assert (
        page.index("| mini | 0.008 (edge of the grid) | 3.1000")
        < page.index(f"{markov.floor():.4f}")
        < page.index("4.6000")
    )
    plain = small.OptimizerStudy(table={}, text=text).study(tmp_path, "")
    assert "markov" not in plain.measure(Canned(), False)
    assert plain.numbers(measured).keys() == {"mini"}


def test_a_trial_reads_what_its_task_says(module, monkeypatch, markov):
    training = module("training")
    read = []

    def prepared(config):
        read.append((config.source, config.pack_tokens))
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "corpus_of", prepared)
    for task in ("text", "markov"):
        with pytest.raises(KeyboardInterrupt):
            training.validation_loss(
                training.Trial(optimizer="adamw", lr=1e-3, seed=0, steps=50, task=task), None
            )
    assert read == [("pydocs", 128), (markov.settings()["data.source"], 64)]
