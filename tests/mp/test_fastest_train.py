"""`hardy train` with the fastest k of n: slow, killed, NaN, 1e20; it ends as one without. Sharded too."""

import os
import signal
import statistics
import time

import pytest
import torch

from hardy.config import from_dict, override, to_dict
from hardy.distributed.comm import leave_world
from hardy.distributed.robust.election_log import read_log
from hardy.train import elections, loop, run
from hardy.train.config import TrainConfig
from hardy.train.metrics import read_metrics
from hardy.train.plan import World

pytestmark = pytest.mark.mp
SIZE, K, STEPS, WORK_S, LATE_S = 8, 6, 24, 0.05, 0.4


@pytest.fixture
def fast_words(few_words):
    changes = {
        "train.steps": STEPS,
        "train.batch_packs": SIZE,
        "train.evaluate_every_steps": STEPS,
        "train.evaluate_packs": 8,
        "checkpoint.every_steps": STEPS,
        "optim.schedule.warmup_steps": 3,
        "strategy.name": "robust",
        "strategy.rule": "trimmed_mean",
        "strategy.f": 2,
        "strategy.fastest.k": K,
    }
    return from_dict(TrainConfig, override(to_dict(few_words), changes))


def train(comm, config, folder, *, troubles):
    """Be one replica; `troubles` says what befalls whom. Worker 0 holds the elections too."""
    trouble, real_step, count = troubles.get(comm.rank), loop.train_step, 0
    run_dir, address = folder / "run", folder / "address"
    if comm.rank == 0:
        host = elections.election_host(config, run_dir, replicas=SIZE)
        address.write_text(host.address)
    comm.barrier()

    def step(worker, *arguments, **named):
        nonlocal count
        count += 1
        time.sleep(WORK_S + (LATE_S if trouble == "late" else 0.0))
        if trouble == "killed" and count == STEPS // 3:
            (folder / f"dies-{comm.rank}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if comm.rank == 0:  # as a launcher sees it
            for file in folder.glob("dies-*"):
                host.report_loss(int(file.name.removeprefix("dies-")))
                file.unlink()
        factor = {"nan": torch.nan, "huge": 1e20}.get(trouble)
        hooks = []
        if factor is not None:
            spoil = lambda grad: torch.full_like(grad, factor)  # noqa: E731
            hooks = [p.register_hook(spoil) for p in worker.model.parameters()]
        try:
            return real_step(worker, *arguments, **named)
        finally:
            for hook in hooks:
                hook.remove()

    loop.train_step = step
    world = World(rank=comm.rank, size=SIZE, store=address.read_text())
    around = run.Surroundings(cache_dir=folder / "cache", world=world)
    summary = run.start(config, run_dir, around)
    (folder / f"done-{comm.rank}").touch()
    if comm.rank == 0:  # the host outlives all others
        living = SIZE - list(troubles.values()).count("killed")
        while len(list(folder.glob("done-*"))) < living:
            time.sleep(0.05)
        time.sleep(0.5)
        host.close()
    return summary.validation_loss, summary.steps


def measured(run_workers, config, folder, troubles):
    folder.mkdir()
    dead = [rank for rank, trouble in troubles.items() if trouble == "killed"]
    found = run_workers(
        lambda comm: train(comm, config, folder, troubles=troubles), size=SIZE, may_die=dead, timeout_s=90.0
    )
    lines = list(read_metrics(folder / "run" / "metrics.jsonl"))
    own = [line["step_time_s"] for line in lines]
    losses = {loss for rank, (loss, _) in enumerate(found) if rank not in dead}
    assert all(steps == STEPS for rank, (_, steps) in enumerate(found) if rank not in dead)
    assert len(losses) == 1, "all who live have the same weights at the end"
    return losses.pop(), statistics.median(own), lines


def test_sharded_replicas_of_whom_all_are_awaited_are_one_process(few_words, run_workers, tmp_path):
    changes = {"train.steps": 4, "train.evaluate_every_steps": 2, "checkpoint.every_steps": 2}
    alone = from_dict(TrainConfig, override(to_dict(few_words), changes))
    strategy = {"name": "robust", "rule": "mean", "pre": (), "f": 0, "fastest": {"k": 2}}
    sharded = from_dict(TrainConfig, to_dict(alone) | {"strategy": strategy | {"mesh": {"shards": 2}}})
    cache = tmp_path / "cache"

    def body(comm):
        leave_world()
        address = tmp_path / "address"
        if comm.rank == 0:
            host = elections.election_host(sharded, tmp_path / "four", replicas=2)
            address.with_suffix(".tmp").write_text(host.address)
            address.with_suffix(".tmp").rename(address)
        while not address.exists():
            time.sleep(0.01)
        meeting, store = f"file://{tmp_path}/meeting-{comm.rank // 2}", address.read_text()
        world = World(rank=comm.rank, size=4, address=meeting, store=store, replica_size=2)
        summary = run.start(sharded, tmp_path / "four", run.Surroundings(cache_dir=cache, world=world))
        (tmp_path / f"done-{comm.rank}").touch()
        while comm.rank == 0 and len(list(tmp_path.glob("done-*"))) < 4:
            time.sleep(0.01)
        return summary.steps, summary.validation_loss

    found = run_workers(body, size=4)
    run.start(alone, tmp_path / "one", run.Surroundings(cache_dir=cache))
    one, four = (list(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("one", "four"))
    assert found == [(4, four[-1]["validation_loss"])] * 4
    for key in ("loss", "grad_norm"):
        assert [x[key] for x in four] == pytest.approx([x[key] for x in one], rel=1e-4)
    assert four[-1]["validation_loss"] == pytest.approx(one[-1]["validation_loss"], rel=1e-5)
    assert read_log(tmp_path / "four" / elections.LOG) == dict.fromkeys(range(4), (0, 1))
    assert (tmp_path / "four" / "checkpoints-replica-1" / "step-00000004").is_dir()


@pytest.mark.slow
def test_a_run_with_every_kind_of_trouble_ends_as_one_without(fast_words, run_workers, tmp_path, capsys):
    clean_loss, clean_s, _ = measured(run_workers, fast_words, tmp_path / "clean", {})
    troubles = {3: "late", 5: "killed", 6: "nan", 7: "huge"}
    loss, step_s, lines = measured(run_workers, fast_words, tmp_path / "trouble", troubles)
    with capsys.disabled():
        print(f"\nstep {clean_s:.3f} s clean, {step_s:.3f} s in trouble; loss {clean_loss:.4f}, {loss:.4f}")
    assert abs(loss / clean_loss - 1) <= 0.02
    assert step_s < LATE_S, "nobody waits for the one that is late"
    elected = read_log(tmp_path / "trouble" / "run" / elections.LOG)
    assert sorted(elected) == list(range(STEPS))
    assert all(len(who) == K for who in elected.values())
    assert not any(5 in elected[step] for step in range(STEPS - 4, STEPS)), "the dead one is not waited for"
    assert sum(3 in who for who in elected.values()) < STEPS / 2
    there = [line for line in lines if not line["overtaken"] and 6 in line["elected"]]
    assert all(6 in line["removed_workers"] for line in there)
