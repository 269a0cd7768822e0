"""Real worker processes, joined by gloo, that run a test body: `run_workers`."""

import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch

from hardy.config import from_dict, override, to_dict
from hardy.distributed.comm import join_world, leave_world
from hardy.train import run as whole_run
from hardy.train.config import TrainConfig

torch.compile(lambda: None, backend="eager")  # imports here, once, what each child's first DTensor call would


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """Let runs end with a sample of few tokens: a sharded model is gathered for each."""
    monkeypatch.setattr(whole_run, "SAMPLE_TOKENS", 4)


@pytest.fixture
def few_words(tmp_path):
    """Return a run of a decoder of a few thousand parameters on files of a few words."""
    for i in range(30):
        (tmp_path / "text").mkdir(exist_ok=True)
        words = [f"w{(i * 7 + j * (1 + i % 3)) % 23}" for j in range(80 + i)]
        (tmp_path / "text" / f"{i:02d}.txt").write_text(" ".join(words))
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    changes = {
        "model": {"name": "1m", "shape": shape | {"head_size": 12}},
        "data": {"source": f"files:{tmp_path / 'text'}", "pack_tokens": 24, "validation_fraction": 0.2},
        "optim": {"lr": 0.01, "schedule": {"warmup_steps": 3}},
        "train": {"batch_packs": 8, "micro_packs": 1, "device": "cpu", "evaluate_packs": 4},
    }
    return from_dict(TrainConfig, override(to_dict(TrainConfig()), changes))


@pytest.fixture
def run_workers(tmp_path):
    """Run `body(comm)` in forked processes joined by gloo and return what each returned, in rank order.

    What fails or hangs in a worker fails here, with the worker's traceback. Results travel by `torch.save`;
    forking lets the body be any function of the test. `timeout_s` is the patience of the process group, the
    test's own is a little longer. `may_die` names ranks whose end does not count.

    On a loaded machine gloo now and then fails to connect processes of one machine ("connectFullMesh failed",
    torch 2.13). Where it did so before any body began, the workers are started once more.
    """
    if torch.cuda.is_available():
        # A backward pass in the parent would have started autograd's GPU threads, which no fork survives.
        pytest.skip(
            "forked workers need the GPU hidden: CUDA_VISIBLE_DEVICES= pytest tests/mp tests/contracts"
        )

    def run(body, *, size=2, timeout_s=60.0, may_die=()):
        counting = [rank for rank in range(size) if rank not in may_die]
        for attempt in range(3):
            folder = Path(tempfile.mkdtemp(dir=tmp_path))  # its own, as a test may call this more than once
            workers = _started(body, size=size, timeout_s=timeout_s, folder=folder)
            failed = _wait_for(workers, counting, timeout_s + 1.5)
            told = [(folder / f"worker{rank}.txt") for rank in range(size)]
            texts = [path.read_text() for path in told if path.exists()]
            unmet = any("connectFullMesh failed" in text for text in texts)
            if not failed or not unmet or any(folder.glob("began*")) or attempt == 2:
                break
        if failed:
            pytest.fail(f"workers failed or hung: {failed}\n" + "\n".join(texts), pytrace=False)
        return [torch.load(folder / f"worker{rank}.pt", weights_only=False) for rank in counting]

    return run


def _started(body, *, size, timeout_s, folder):
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_work, args=(body, rank, size, timeout_s, folder), daemon=True)
        for rank in range(size)
    ]
    with warnings.catch_warnings():
        # Python 3.12 warns of any thread when forking; torch's idle threads are never woken in the child.
        warnings.filterwarnings("ignore", message=".*multi-threaded", category=DeprecationWarning)
        for worker in workers:
            worker.start()
    return workers


def _work(body, rank, size, timeout_s, folder):
    """Be one worker."""
    torch.set_num_threads(1)  # a forked child must not wake the parent's OpenMP threads
    try:
        comm = join_world(
            rank=rank,
            size=size,
            init_method=f"file://{folder}/store",
            device_type="cpu",
            timeout_s=timeout_s,
        )
        (folder / f"joined{rank}").touch()
        while len(list(folder.glob("joined*"))) < size:  # nobody begins unless all can
            if any(folder.glob("*.txt")):
                sys.exit(1)
            time.sleep(0.002)
        (folder / f"began{rank}").touch()
        result = body(comm)
        torch.save(result, folder / f"worker{rank}.pt")
        leave_world()
    except BaseException:
        (folder / f"worker{rank}.txt").write_text(f"--- worker {rank}\n{traceback.format_exc()}")
        sys.exit(1)


def _wait_for(workers, counting, timeout_s):
    """Wait for the workers that count, stop all, and return what went wrong by rank."""
    deadline_s = time.monotonic() + timeout_s
    failed_s = None
    while any(workers[rank].is_alive() for rank in counting):
        if failed_s is None and any(workers[rank].exitcode for rank in counting):
            failed_s = time.monotonic()
        # The others get a second to notice and to write down what they saw.
        if time.monotonic() > min(deadline_s, (failed_s or deadline_s) + 1.0):
            break
        time.sleep(0.005)
    codes = {rank: workers[rank].exitcode for rank in counting}
    for worker in workers:
        if worker.is_alive():
            worker.kill()
        worker.join()
    return {
        rank: "still running" if code is None else f"exit code {code}"
        for rank, code in codes.items()
        if code != 0
    }
