"""A run that starts from weights made elsewhere."""

import pytest
import torch

from hardy.config import UserError, from_dict
from hardy.model.build import build_model
from hardy.model.init import initialise
from hardy.train.checkpoint import CheckpointStore
from hardy.train.config import TrainConfig
from hardy.train.imported import start_from
from hardy.train.manifest import newest_good
from hardy.train.run import Surroundings, resume
from hardy.train.storage import load_model_tensors


@pytest.fixture
def config(tmp_path):
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("one two three " * (number + 5))
    sections = {
        "data": {"source": f"files:{tmp_path}/*.txt", "pack_tokens": 32, "validation_fraction": 0.3},
        "model": {"shape": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}},
        "train": {"steps": 3, "batch_packs": 2, "device": "cpu"},
        "optim": {"name": "adamw", "schedule": {"warmup_steps": 0}},
    }
    return from_dict(TrainConfig, sections)


@pytest.fixture
def weights(config):
    model = build_model(config.model, vocab_size=257, device="cpu")
    initialise(model, seed=99)
    return model.state_dict()


def test_the_first_checkpoint_holds_the_weights_and_training_goes_on_from_them(config, weights, tmp_path):
    around = Surroundings(cache_dir=tmp_path / "cache")
    start_from(weights, config, tmp_path / "run", around)
    checkpoint, damaged = newest_good(tmp_path / "run" / "checkpoints")
    assert (checkpoint.step, damaged) == (0, [])
    saved = load_model_tensors(checkpoint)
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    assert resume(tmp_path / "run", around).steps == 3


def test_a_checkpoint_that_cannot_be_written_leaves_no_run_behind(config, weights, tmp_path, monkeypatch):
    def full(*_args, **_rest):
        raise UserError("the disk is full")

    monkeypatch.setattr(CheckpointStore, "save", full)
    with pytest.raises(UserError, match="the disk is full"):
        start_from(weights, config, tmp_path / "run", Surroundings(cache_dir=tmp_path / "cache"))
    assert not (tmp_path / "run" / "config.json").exists()
