"""A corpus of a few kilobytes and a run of a few steps, for tests that train."""

import pytest

from hardy.config import from_dict, keep_known, override, to_dict
from hardy.data.corpus import prepare
from hardy.train import run as whole_run
from hardy.train.config import TrainConfig

WORDS = "the cat sat on a mat and saw the dog run to its red house by the old sea".split()


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """Let runs end with a sample of few tokens."""
    monkeypatch.setattr(whole_run, "SAMPLE_TOKENS", 4)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """Forty documents with some structure, the same in every session."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        words = [WORDS[(i * 7 + j * (1 + i % 3)) % len(WORDS)] for j in range(60 + i)]
        (folder / f"{i:02d}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def make_config(text_folder):
    """Build a run of 6 steps of a toy model; dotted changes as keywords with `__` for the dot."""
    changes = {
        "model": {
            "name": "1m",
            "shape": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_layers": 2,
                "num_heads": 2,
                "num_kv_heads": 1,
            },
        },
        "data": {"source": f"files:{text_folder}", "pack_tokens": 32, "validation_fraction": 0.2},
        "optim": {"lr": 0.01, "schedule": {"warmup_steps": 2}},
        "train": {
            "steps": 6,
            "batch_packs": 4,
            "device": "cpu",
            "evaluate_every_steps": 3,
            "evaluate_packs": 5,
        },
        "checkpoint": {"every_steps": 2},
        "log": {"progress": "none"},
    }

    def make(**dotted):
        chosen = override({}, {key.replace("__", "."): value for key, value in dotted.items()})
        base = keep_known(TrainConfig, override(to_dict(TrainConfig()), changes), chosen=chosen)
        return from_dict(TrainConfig, override(base, chosen))

    return make


@pytest.fixture(scope="session")
def corpus(make_config, cache_dir):
    return prepare(make_config().data, cache_dir=cache_dir)
