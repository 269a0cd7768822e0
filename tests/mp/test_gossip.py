"""Gossip between real processes: as in simulation, cut off and resumed, sharded, without one that died."""

import json
import multiprocessing
import os
import shutil
import signal
import time
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.tensor import distribute_tensor

from hardy.config import from_dict, override, to_dict
from hardy.distributed.comm import leave_world
from hardy.distributed.elastic import StoreHost
from hardy.distributed.gossip.build import build_push_sum
from hardy.distributed.gossip.config import PushSumConfig, TopologyConfig, WeightsConfig
from hardy.distributed.groups import split
from hardy.distributed.sharded import parallelize
from hardy.distributed.simulation import SimWorld
from hardy.rng import generator_for
from hardy.train.config import TrainConfig
from hardy.train.metrics import read_metrics
from hardy.train.plan import World
from hardy.train.run import Surroundings, resume, start

pytestmark = pytest.mark.mp

ADAPTIVE = WeightsConfig(name="adaptive")
CONFIGS = [
    PushSumConfig(topology=TopologyConfig(name="star"), weights=ADAPTIVE),
    PushSumConfig(overlap=True, on_send_failure="running_sum"),
    PushSumConfig(topology=TopologyConfig(name="base_k"), method="gradient_tracking"),
    PushSumConfig(topology=TopologyConfig(name="random_edges"), weights=ADAPTIVE, comm_dtype="bf16"),
]


def train(comm, config, *, grid=None):
    """Train a small model on data of this replica's own; return its weights, mass and bytes sent."""
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 2))
    with torch.no_grad():
        for place, param in enumerate(model.parameters()):
            param.copy_(torch.randn(param.shape, generator=generator_for(0, "p", place)))
    grid = grid or split(comm, replicas=comm.size, shards=1)
    if grid.shards > 1:
        layout = {"replicas": 1, "shards": grid.shards, "device_type": "cpu", "precision": "fp32"}
        model = parallelize(model, grid.inner, unit_names=["0", "2"], **layout)
        with torch.no_grad():
            for place, param in enumerate(model.parameters()):
                whole = torch.randn(param.shape, generator=generator_for(0, "p", place))
                param.copy_(distribute_tensor(whole, param.device_mesh, param.placements))
    strategy = build_push_sum(config, model, unit_names=["0", "2"], inner=grid.inner, outer=grid.outer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    for step in range(20):
        x = torch.randn(8, 6, generator=generator_for(1, "x", grid.replica, step))
        strategy.before_forward()
        (model(x) - grid.replica).square().mean().backward()
        strategy.reduce_gradients()
        optimizer.step()
        strategy.after_step()
        optimizer.zero_grad()
    strategy.finish()
    whole = [p.full_tensor() if grid.shards > 1 else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole]), strategy.mass, grid.outer.bytes_sent


def test_processes_train_as_simulated_replicas_do(run_workers):
    def body(comm):
        return [train(comm, config) for config in CONFIGS]

    for real, simulated in zip(run_workers(body, size=4), SimWorld(4).run(body), strict=True):
        for (z, mass, sent), (want, want_mass, want_sent) in zip(real, simulated, strict=True):
            torch.testing.assert_close(z, want, rtol=0, atol=1e-6)
            assert (mass, sent) == (want_mass, want_sent)


def test_sharded_replicas_train_as_whole_ones_and_have_the_same_sketches(run_workers):
    config = PushSumConfig(topology=TopologyConfig(name="ring"), weights=ADAPTIVE, store="numerator")

    def body(comm):
        grid = split(comm, replicas=comm.size // 2, shards=2)
        return train(comm, config, grid=grid), grid.replica

    want = SimWorld(2).run(lambda comm: train(comm, config))
    for (z, mass, sent), replica in run_workers(body, size=4):
        torch.testing.assert_close(z, want[replica][0], rtol=0, atol=1e-6)
        assert mass == pytest.approx(want[replica][1], rel=1e-6)
        assert sent < want[replica][2]


@pytest.fixture
def config(few_words):
    changes = {
        "train.steps": 12,
        "train.evaluate_every_steps": 6,
        "checkpoint.every_steps": 5,
        "checkpoint.keep_last": 9,
    }
    return from_dict(TrainConfig, override(to_dict(few_words), changes))


def as_workers(run_workers, tmp_path, name, *, size, work):
    def body(comm):
        leave_world()
        world = World(rank=comm.rank, size=size, address=f"file://{tmp_path}/meeting-{name}")
        return work(Surroundings(cache_dir=tmp_path / "cache", world=world), comm.rank)

    return run_workers(body, size=size)


def lines(run_dir):
    kept = ("step", "loss", "grad_norm", "validation_loss", "mass", "shares", "distance_to_mean")
    read = read_metrics(run_dir / "metrics.jsonl")
    return [{key: line[key] for key in kept if key in line} for line in read]


def test_a_run_of_sharded_replicas_cut_off_goes_on_bit_for_bit(run_workers, config, tmp_path):
    strategy = {
        "name": "push_sum",
        "topology": {"name": "star"},
        "weights": {"name": "adaptive"},
        "overlap": True,
        "store": "numerator",
        "mesh": {"replicas": 2, "shards": 2},
    }
    made = from_dict(TrainConfig, to_dict(config) | {"strategy": strategy})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    as_workers(run_workers, tmp_path, "a", size=4, work=lambda around, _: start(made, whole, around).steps)
    shutil.copytree(whole, cut)
    for folder in ("checkpoints", "checkpoints-replica-1"):
        saved = sorted((cut / folder).glob("step-*"))
        assert [int(path.name.removeprefix("step-")) for path in saved] == [5, 10, 12]
        for path in saved[1:]:
            shutil.rmtree(path)
    as_workers(run_workers, tmp_path, "b", size=4, work=lambda around, _: resume(cut, around).steps)
    assert lines(cut) == lines(whole) and len(lines(whole)) == 12
    assert all("mass" in line and "distance_to_mean" in line for line in lines(whole)[1:])


def hold_store(pipe, killed, replica):
    """Hold the store of a launcher, which tells the others once the replica has ended."""
    host = StoreHost()
    pipe.send(host.address)
    while not killed.exists():
        time.sleep(0.01)
    host.report_loss(replica)
    pipe.recv()


@pytest.fixture
def open_store(tmp_path):
    """Return the address of a store; a process of its own holds it, and reports the loss of a replica."""
    processes = []

    def opened(*, replica):
        ours, theirs = multiprocessing.get_context("fork").Pipe()
        work = {"target": hold_store, "args": (theirs, tmp_path / "killed", replica), "daemon": True}
        processes.append((multiprocessing.get_context("fork").Process(**work), ours))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*multi-threaded", category=DeprecationWarning)
            processes[-1][0].start()
        return ours.recv()

    yield opened
    for process, _ in processes:
        process.kill()
        process.join()


def test_the_others_go_on_without_a_killed_replica_and_fewer_resume_the_run(
    run_workers, config, tmp_path, open_store
):
    strategy = {"name": "push_sum", "elastic": True, "agree_every_steps": 4}
    made = from_dict(TrainConfig, to_dict(config) | {"strategy": strategy})
    made = from_dict(TrainConfig, override(to_dict(made), {"train.steps": 20, "train.batch_packs": 6}))
    longer = from_dict(TrainConfig, override(to_dict(made), {"train.steps": 26}))
    run_dir, address = tmp_path / "run", open_store(replica=1)

    def dies_at_step_8():
        if (run_dir / "metrics.jsonl").exists() and len(list(read_metrics(run_dir / "metrics.jsonl"))) >= 8:
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def train(comm):
        leave_world()
        stop = dies_at_step_8 if comm.rank == 1 else lambda: None
        world = World(rank=comm.rank, size=3, store=address)
        around = Surroundings(cache_dir=tmp_path / "cache", world=world, stop_signal=stop)
        return start(made, run_dir, around).steps

    assert run_workers(train, size=3, may_die=[1]) == [20, 20]
    read = list(read_metrics(run_dir / "metrics.jsonl"))
    (lost,) = [line for line in read if line.get("left")]
    assert lost["left"] == [1] and lost["members"] == [0, 2] and 8 <= lost["step"] <= 12
    assert 0 < lost["lost_mass"] < 3 and [line["generation"] for line in (read[0], read[-1])] == [0, 1]
    assert read[0]["members"] == [0, 1, 2] and read[-1]["members"] == [0, 2] and read[-1]["step"] == 20
    saved = [run_dir / name / "step-00000020" for name in ("checkpoints", "checkpoints-replica-2")]
    masses = [json.loads((path / "plain.json").read_text())["plain"]["strategy"]["about"] for path in saved]
    assert sum(about["mass"] for about in masses) == pytest.approx(2.0, rel=1e-9)

    again = open_store(replica=1)

    def go_on(comm):
        leave_world()
        world = World(rank=comm.rank, size=2, store=again)
        return resume(run_dir, Surroundings(cache_dir=tmp_path / "cache", world=world), config=longer).steps

    assert run_workers(go_on, size=2) == [26, 26]
    read = list(read_metrics(run_dir / "metrics.jsonl"))
    assert [line["step"] for line in read][-6:] == [*range(21, 27)] and read[-1]["members"] == [0, 1]
    assert read[20]["mass"] == 1.0 and read[-1]["loss"] < read[0]["loss"]
