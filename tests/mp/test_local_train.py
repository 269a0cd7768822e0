"""Whole runs whose replicas train alone: stopped, resumed between rounds, on other numbers of replicas."""

import math
import os
import shutil
import signal
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from hardy.config import from_dict, override, to_dict
from hardy.distributed.comm import WorkerLostError, leave_world
from hardy.distributed.elastic import StoreHost
from hardy.train.config import TrainConfig
from hardy.train.membership import join_replica
from hardy.train.metrics import read_metrics
from hardy.train.plan import World
from hardy.train.run import Surroundings, resume, start

pytestmark = pytest.mark.mp


@pytest.fixture
def config(few_words):
    changes = {
        "train.steps": 16,
        "train.evaluate_every_steps": 6,
        "checkpoint.every_steps": 5,
        "checkpoint.keep_last": 9,
    }
    return from_dict(TrainConfig, override(to_dict(few_words), changes))


def with_strategy(config, **settings):
    return from_dict(TrainConfig, to_dict(config) | {"strategy": settings})


def lines(run_dir, *, after=0):
    """What a run wrote, without what depends on the clock."""
    kept = ("step", "loss", "grad_norm", "validation_loss", "round", "drift_cosine", "outer_grad_norm")
    return [
        {key: line[key] for key in kept if key in line}
        for line in read_metrics(run_dir / "metrics.jsonl")
        if line["step"] > after
    ]


def as_workers(run_workers, tmp_path, name, *, size, work, **how):
    def body(comm):
        leave_world()
        world = World(rank=comm.rank, size=size, address=f"file://{tmp_path}/meeting-{name}")
        return work(Surroundings(cache_dir=tmp_path / "cache", world=world), comm.rank)

    return run_workers(body, size=size, **how)


def as_elastic(run_workers, tmp_path, name, *, size, shards, work, **how):
    """Be the workers of replicas that come and go; the first holds the store that their launcher would."""
    told = tmp_path / f"store-{name}"

    def wait_for(path):
        deadline_s = time.monotonic() + 60.0
        while not path.exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)

    def body(comm):
        rank = comm.rank
        leave_world()
        if rank == 0:
            host = StoreHost()
            told.with_suffix(".tmp").write_text(host.address)
            told.with_suffix(".tmp").rename(told)
        wait_for(told)
        world = World(
            rank=rank,
            size=size,
            address=f"file://{tmp_path}/meeting-{name}-{rank // shards}" if shards > 1 else None,
            store=told.read_text(),
            replica_size=shards,
        )
        result = work(Surroundings(cache_dir=tmp_path / "cache", world=world), rank)
        (tmp_path / f"done-{name}-{rank}").touch()
        for other in range(size if rank == 0 else 0):
            wait_for(tmp_path / f"done-{name}-{other}")
        return result

    return run_workers(body, size=size, **how)


EDIT = {"name": "edit", "every_steps": 4, "warmup_steps": 2}
STREAMING = {"name": "streaming_diloco", "every_steps": 4, "fragments": 2, "delay_steps": 1}


def test_a_plain_round_after_each_step_is_synchronous_training(run_workers, config, tmp_path):
    # Without clipping, which knows one replica's gradient only.
    config = from_dict(
        TrainConfig, to_dict(config) | {"optim": {"name": "sgd", "lr": 0.1, "clip_norm": None}}
    )
    local = with_strategy(config, name="local_sgd", every_steps=1)
    for name, made in (("plain", config), ("local", local)):
        as_workers(
            run_workers,
            tmp_path,
            name,
            size=2,
            work=lambda around, rank, name=name, made=made: start(made, tmp_path / name, around).steps,
        )
    both = [
        [x["validation_loss"] for x in lines(tmp_path / n) if "validation_loss" in x]
        for n in ("plain", "local")
    ]
    assert len(both[0]) == 3 and both[1] == pytest.approx(both[0], abs=2e-5)


@pytest.mark.parametrize(
    "strategy", [EDIT, STREAMING, EDIT | {"layerwise": True}], ids=["edit", "streaming", "layers"]
)
@pytest.mark.parametrize("shards", [1, 2])
def test_a_run_cut_off_between_rounds_goes_on_bit_for_bit(run_workers, config, tmp_path, strategy, shards):
    made = with_strategy(config, mesh={"replicas": 2, "shards": shards}, **strategy)
    size, whole, cut = 2 * shards, tmp_path / "whole", tmp_path / "cut"
    as_workers(run_workers, tmp_path, "a", size=size, work=lambda around, _: start(made, whole, around).steps)
    shutil.copytree(whole, cut)
    for folder in ("checkpoints", "checkpoints-replica-1"):
        saved = sorted((cut / folder).glob("step-*"))
        assert [int(path.name.removeprefix("step-")) for path in saved] == [5, 10, 15, 16]
        for path in saved[1 if folder == "checkpoints" else 2 :]:  # replicas are cut off at different moments
            shutil.rmtree(path)
    as_workers(run_workers, tmp_path, "b", size=size, work=lambda around, _: resume(cut, around).steps)
    assert lines(cut) == lines(whole) and len(lines(whole)) == 16
    assert sum("round" in line for line in lines(whole)) >= 3


def test_a_wish_to_stop_is_agreed_in_a_round_and_saved_there(run_workers, config, tmp_path):
    made, whole, cut = with_strategy(config, **EDIT), tmp_path / "whole", tmp_path / "cut"

    class Stop:
        left = 4

        def __call__(self):
            self.left -= 1
            return 15 if self.left <= 0 else None

    as_workers(run_workers, tmp_path, "a", size=2, work=lambda around, _: start(made, whole, around).steps)

    def stopped(around, rank):
        stop = Stop() if rank == 1 else (lambda: None)
        around = Surroundings(cache_dir=around.cache_dir, world=around.world, stop_signal=stop)
        return start(made, cut, around).steps

    # Replica 1 is told in its fourth step; the round after step 2 + 4 spreads the word.
    assert as_workers(run_workers, tmp_path, "b", size=2, work=stopped) == [6, 6]
    as_workers(run_workers, tmp_path, "c", size=2, work=lambda around, _: resume(cut, around).steps)
    assert lines(cut) == lines(whole)


def test_a_lost_worker_of_a_sharded_replica_ends_the_run_which_goes_on_from_its_checkpoint(
    run_workers, config, tmp_path
):
    made = with_strategy(config, mesh={"replicas": 2, "shards": 2}, **EDIT)
    cut = tmp_path / "cut"

    def lose(around, rank):
        left = iter(range(7))

        def die():
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            start(made, cut, replace(around, stop_signal=die) if rank == 3 else around)
        except WorkerLostError as error:
            return str(error)

    # Of its own replica the next sum tells, of the other the next round: both far below the time-out.
    told = as_workers(run_workers, tmp_path, "a", size=4, work=lose, may_die=(3,), timeout_s=20.0)
    assert len(told) == 3 and all("one of them died" in text and "`hardy resume`" in text for text in told)
    assert 5 < lines(cut)[-1]["step"] < 16
    ended = as_workers(run_workers, tmp_path, "b", size=4, work=lambda around, _: resume(cut, around).steps)
    assert ended == [16] * 4 and [line["step"] for line in lines(cut)] == list(range(1, 17))


def test_a_run_goes_on_in_other_layouts(run_workers, config, tmp_path):
    made = with_strategy(config, mesh={"replicas": 2, "shards": 2}, **EDIT)
    first = tmp_path / "first"
    as_workers(run_workers, tmp_path, "a", size=4, work=lambda around, _: start(made, first, around).steps)

    def longer(replicas, shards):
        name = f"{replicas}x{shards}"
        run_dir = shutil.copytree(first, tmp_path / name)
        mesh = {"strategy.mesh.replicas": replicas, "strategy.mesh.shards": shards}
        config = from_dict(TrainConfig, override(to_dict(made), {"train.steps": 20} | mesh))
        steps = as_workers(
            run_workers,
            tmp_path,
            name,
            size=replicas * shards,
            work=lambda around, _: resume(run_dir, around, config=config).steps,
        )
        assert set(steps) == {20} and math.isfinite(lines(run_dir)[-1]["loss"])
        return lines(run_dir)[-1]["validation_loss"]

    as_before = longer(2, 2)
    assert longer(2, 1) == pytest.approx(as_before, abs=1e-3)  # the same replicas, otherwise sharded
    for replicas, shards in ((1, 4), (4, 1)):
        assert longer(replicas, shards) == pytest.approx(as_before, abs=0.05)


def test_the_workers_of_a_replica_meet_and_are_more_patient_than_replicas_are(run_workers, config, tmp_path):
    strategies = {
        "elastic": {"name": "diloco", "elastic": True, "timeout_s": 30.0},
        "fastest": {"name": "robust", "f": 0, "fastest": {"k": 1, "timeout_s": 30.0}},
    }

    def joined(comm, name):
        where = f"file://{tmp_path}/meeting-{name}"
        world = World(rank=2 + comm.rank, size=4, address=where, store="unused:1", replica_size=2)
        made = with_strategy(config, mesh={"shards": 2}, **strategies[name])
        with ExitStack() as held:
            inner = join_replica(made, world, held, device_type="cpu")
            told = inner.rank, inner.size, inner.timeout_s, inner.sum(torch.tensor(world.rank)).item()
        return told, torch.distributed.is_initialized()

    def body(comm):
        leave_world()
        return [joined(comm, name) for name in strategies]

    endless_s = 365 * 86400.0  # the first worker waits for the coordinator as long as it takes
    for rank, told in enumerate(run_workers(body, size=2)):
        assert told == [((rank, 2, 60.0, 5), False), ((rank, 2, endless_s, 5), False)]


@pytest.mark.slow
def test_sharded_replicas_that_may_die_train_like_those_that_may_not_and_resume_laid_out_anew(
    run_workers, config, tmp_path
):
    changes = {"train.evaluate_every_steps": 4, "checkpoint.every_steps": 4, "train.steps": 12}
    config = from_dict(TrainConfig, override(to_dict(config), changes))

    def made(*, steps=12, **settings):
        strategy = {"name": "diloco", "every_steps": 4, "mesh": {"shards": 2}} | settings
        return from_dict(
            TrainConfig, override(to_dict(with_strategy(config, **strategy)), {"train.steps": steps})
        )

    def begun(name, config):
        return lambda around, rank: start(config, tmp_path / name, around).steps

    def resumed(name, config):
        return lambda around, rank: resume(tmp_path / name, around, config=config).steps

    elastic = made(elastic=True)
    as_workers(run_workers, tmp_path, "fixed", size=4, work=begun("fixed", made()))
    ended = as_elastic(run_workers, tmp_path, "free", size=4, shards=2, work=begun("free", elastic))
    assert ended == [12] * 4
    both = lines(tmp_path / "fixed"), lines(tmp_path / "free")
    assert both[0] == both[1] and len(both[0]) == 12 and "round" in both[0][-1]

    layouts = {"same": (4, 2), "more": (8, 2), "whole": (2, 1)}
    for name, (size, shards) in layouts.items():
        shutil.copytree(tmp_path / "free", tmp_path / name)
        longer = made(elastic=True, steps=16, mesh={"shards": shards})
        ended = as_elastic(run_workers, tmp_path, name, size=size, shards=shards, work=resumed(name, longer))
        assert ended == [16] * size
    after = {name: lines(tmp_path / name, after=12) for name in layouts}
    assert all([line["step"] for line in told] == [13, 14, 15, 16] for told in after.values())
    # Of other workers each replica reads other packs, so only their mean is comparable.
    validation = [told[-1]["validation_loss"] for told in after.values()]
    assert validation == pytest.approx(validation[:1] * 3, rel=0.02)
    assert validation[0] < both[0][3]["validation_loss"]
    members = [
        line["members"] for line in read_metrics(tmp_path / "more" / "metrics.jsonl") if "round" in line
    ]
    assert members == [[0, 1]] * 3 + [[0, 1, 2, 3]]
