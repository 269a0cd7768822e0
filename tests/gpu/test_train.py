"""A training run on CUDA: bf16 learns, fp32 equals the CPU, a resumed run goes on as it was."""

import pytest
import torch

from hardy.config import from_dict, override, to_dict
from hardy.train.config import TrainConfig
from hardy.train.metrics import read_metrics
from hardy.train.run import Surroundings, resume, start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def config(**dotted):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    changes = {
        "model.shape": shape,
        "data.source": "synthetic:lognormal,documents=400,mean=150",
        "data.pack_tokens": 128,
        "train.steps": 20,
        "train.batch_packs": 8,
        "train.device": "cuda",
        "train.evaluate_every_steps": 10,
        "checkpoint.every_steps": 10,
    } | {key.replace("__", "."): value for key, value in dotted.items()}
    return from_dict(TrainConfig, override(to_dict(TrainConfig()), changes))


def losses(run_dir):
    return [record["loss"] for record in read_metrics(run_dir / "metrics.jsonl")]


def test_bf16_learns_and_says_so(tmp_path):
    summary = start(config(), tmp_path / "run", Surroundings(cache_dir=tmp_path / "cache"))
    assert summary.last_loss < 0.9 * summary.first_loss
    assert summary.skipped_steps == 0
    assert summary.peak_memory_mb > 0


def test_fp32_on_cuda_is_the_run_of_the_cpu(tmp_path):
    around = Surroundings(cache_dir=tmp_path / "cache")
    for device in ("cuda", "cpu"):
        start(config(train__device=device, train__precision="fp32"), tmp_path / device, around)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_run_goes_on_as_it_was(tmp_path, precision):
    around = Surroundings(cache_dir=tmp_path / "cache")
    start(config(train__precision=precision), tmp_path / "whole", around)
    left = iter(range(8))
    stopping = Surroundings(cache_dir=tmp_path / "cache", stop_signal=lambda: None if next(left, 0) else 15)
    start(config(train__precision=precision), tmp_path / "cut", stopping)
    resume(tmp_path / "cut", around)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)
