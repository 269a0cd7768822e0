"""SIGKILL at any moment costs at most the steps since the last checkpoint, and changes no number."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from hardy.config import from_dict, override, to_dict
from hardy.distributed.comm import WorkerLostError
from hardy.train.config import TrainConfig
from hardy.train.metrics import read_metrics
from hardy.train.plan import World
from hardy.train.run import Surroundings, resume, start

pytestmark = pytest.mark.mp

NUM_KILLS = 20


@pytest.fixture
def config(tmp_path):
    text = tmp_path / "corpus.txt"
    text.write_text(" ".join(f"w{(i * i) % 97}" for i in range(4000)))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2}
    changes = {
        "model": {"name": "1m", "shape": shape},
        "data": {"source": f"files:{text}", "pack_tokens": 64},
        "train": {
            "steps": 150,
            "batch_packs": 4,
            "evaluate_every_steps": 40,
            "evaluate_packs": 2,
            "device": "cpu",
        },
        "checkpoint": {"every_steps": 2},
    }
    return from_dict(TrainConfig, override(to_dict(TrainConfig()), changes))


def go_on(config, run_dir, cache_dir, world=None):
    """Start the run, or resume it when it has begun."""
    torch.set_num_threads(1)
    around = Surroundings(cache_dir=cache_dir, world=world or World())
    if (run_dir / "config.json").exists():
        resume(run_dir, around)
    else:
        start(config, run_dir, around)


def stream(run_dir):
    return [(r["step"], r["loss"], r["grad_norm"], r.get("validation_loss")) for r in read_metrics(run_dir)]


def wait_for_a_checkpoint_write(run_dir, child):
    """Return when a checkpoint is on its way to the disk, or the child has ended."""
    while child.is_alive() and not any((run_dir / "checkpoints").glob(".tmp-*/*")):
        time.sleep(0.0005)


@pytest.mark.slow
def test_twenty_kills_end_with_the_loss_stream_of_the_uninterrupted_run(config, tmp_path):
    cache_dir = tmp_path / "cache"
    began_s = time.monotonic()
    go_on(config, tmp_path / "whole", cache_dir)
    whole_s = time.monotonic() - began_s
    draw = random.Random(0)
    kills, writing, fork = 0, 0, multiprocessing.get_context("fork")
    run_dirs = [tmp_path / "killed-0"]
    while kills < NUM_KILLS:
        child = fork.Process(target=go_on, args=(config, run_dirs[-1], cache_dir), daemon=True)
        child.start()
        if kills % 4 == 3:
            wait_for_a_checkpoint_write(run_dirs[-1], child)
        else:
            child.join(draw.uniform(0.02, whole_s / 6))
        if child.exitcode == 0:  # it got to the end between two kills: the next kills hit a new run
            run_dirs.append(tmp_path / f"killed-{len(run_dirs)}")
            continue
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        kills += 1
        writing += any((run_dirs[-1] / "checkpoints").glob(".tmp-*"))
    for run_dir in run_dirs:
        go_on(config, run_dir, cache_dir)
        assert stream(run_dir / "metrics.jsonl") == stream(tmp_path / "whole" / "metrics.jsonl")
        assert len(stream(run_dir / "metrics.jsonl")) == 150
    assert writing > 0  # some of them hit a checkpoint that was being written


def two_workers(config, run_dir, cache_dir, meeting):
    """Start two worker processes; a lost peer is told by exit code 7."""

    def work(rank):
        try:
            go_on(config, run_dir, cache_dir, World(rank=rank, size=2, address=f"file://{meeting}"))
        except WorkerLostError:
            os._exit(7)

    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=work, args=(rank,), daemon=True) for rank in range(2)]
    for worker in workers:
        worker.start()
    return workers


@pytest.mark.parametrize(("shards", "victim"), [(1, 0), (2, 1)], ids=["ddp", "fsdp"])
def test_a_killed_worker_is_named_by_the_other_and_costs_steps_only(config, tmp_path, victim, shards):
    config = from_dict(
        TrainConfig, override(to_dict(config), {"strategy.mesh.shards": shards, "train.steps": 60})
    )
    cache_dir = tmp_path / "cache"
    for worker in two_workers(config, tmp_path / "whole", cache_dir, tmp_path / "a"):
        worker.join(60)
        assert worker.exitcode == 0
    metrics = tmp_path / "killed" / "metrics.jsonl"
    workers = two_workers(config, tmp_path / "killed", cache_dir, tmp_path / "b")
    while not metrics.exists() or len(list(read_metrics(metrics))) < 10:
        time.sleep(0.002)
    os.kill(workers[victim].pid, signal.SIGKILL)
    workers[1 - victim].join(30)
    assert workers[1 - victim].exitcode == 7
    for worker in two_workers(config, tmp_path / "killed", cache_dir, tmp_path / "c"):
        worker.join(60)
        assert worker.exitcode == 0
    assert stream(metrics) == stream(tmp_path / "whole" / "metrics.jsonl")
