"""The fastest k of replicas that are sharded (FSDP2): as dense, as unsharded; late, killed, replayed."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from hardy.distributed.aggregation import aggregate
from hardy.distributed.build import Trained, build_strategy
from hardy.distributed.comm import WorkerLostError
from hardy.distributed.groups import split
from hardy.distributed.robust.config import DStarConfig, RobustConfig
from hardy.distributed.robust.control import ElectionHost, RunKey, StoreWire
from hardy.distributed.robust.elected import ElectedComm
from hardy.distributed.robust.election import rules_of
from hardy.distributed.robust.election_log import ElectionLog, read_log
from hardy.distributed.robust.fastest import FastestGroup
from hardy.distributed.robust.fastest_config import FastestConfig
from hardy.distributed.sharded import parallelize

pytestmark = pytest.mark.mp

KEY = RunKey(run_id="a run", fingerprint="settings 1", secret=b"only ours")
REPLICAS, STEPS, LR = 3, 8, 0.05
CLIPPED = RobustConfig(rule="mean", f=0, pre=("clip:0.5",), fastest=FastestConfig(k=2, silence_s=0.3))


class Net(nn.Module):
    """Odd sizes, so that shards are uneven and some are empty."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 1)
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=generator) * 0.4

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def loss_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, wanted = torch.randn(6, 5, generator=generator), torch.randn(6, 1, generator=generator)
    return (model(inputs) - wanted).square().mean()


def vector_of(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def dense(config, elected, *, bad=None):
    """Return the weights after steps on whole stacks of the elected's gradients, in one process."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    sizes = [param.numel() for param in model.parameters()]
    for step, replicas in sorted(elected.items()):
        rows = [
            vector_of(torch.autograd.grad(loss_of(model, 100 * step + replica), list(model.parameters())))
            * (torch.nan if replica == bad else 1.0)
            for replica in replicas
        ]
        vector = aggregate(torch.stack(rows), config.rule, num_faulty=config.f, pre=config.pre)
        for param, part in zip(model.parameters(), vector.split(sizes), strict=True):
            param.grad = part.view_as(param).clone()
        optimizer.step()
    return vector_of(model.parameters())


def trained(comm, config, folder, *, steps=STEPS, bad=None, sleeps=None, before=None, replay=None):
    """Be one worker of three replicas; return the weights, and how often this replica was overtaken.

    Args:
        bad: the replica whose gradients are NaN.
        sleeps: takes a replica and a step; how long it is late.
        before: takes the rank and the step, when the gradient is there.
    """
    grid = split(comm, replicas=REPLICAS, shards=comm.size // REPLICAS)
    if comm.rank == 0:
        folder.mkdir()
        host = ElectionHost(
            rules_of(config.fastest, num_faulty=config.f),
            KEY,
            replicas=REPLICAS,
            record_line=ElectionLog(folder / "elections.jsonl").write,
            replay=replay,
        )
        (folder / "address").write_text(host.address)
    comm.barrier()
    options = {"unit_names": ["first"], "device_type": "cpu", "precision": "fp32"}
    model = parallelize(Net(), grid.inner, replicas=1, shards=grid.shards, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

    def elect(step):
        address, limits = (folder / "address").read_text(), {"silence_s": 2.0, "timeout_s": 10.0}
        wire = StoreWire(address, grid.replica, KEY, shard=grid.shard, **limits)
        return FastestGroup(wire, replicas=REPLICAS, step=step, inner=grid.inner)

    made = Trained(
        model=model,
        optimizer=optimizer,
        unit_names=["first"],
        comm=comm,
        grid=grid,
        draw_trusted=lambda draw: loss_of(model, 10**6 + draw).backward(),
        elect=elect,
    )
    strategy, step, overtaken = build_strategy(config, made), 0, 0
    while step < steps:
        strategy.before_forward()
        loss = loss_of(model, 100 * strategy.own_steps(step) + grid.replica)
        (loss * (torch.nan if grid.replica == bad else 1.0)).backward()
        strategy.note_loss(loss)
        time.sleep(sleeps(grid.replica, step) if sleeps else 0.0)
        (before or (lambda *_: None))(comm.rank, step)
        strategy.reduce_gradients()
        overtaken += strategy.is_overtaken
        if not strategy.is_overtaken:
            optimizer.step()
        strategy.after_step()
        optimizer.zero_grad()
        step = strategy.standing(step + 1)
    strategy.finish()
    full = [param.full_tensor() if grid.shards > 1 else param for param in model.parameters()]
    return vector_of(full), overtaken


def assert_alike(found, expected):
    assert all(torch.equal(weights, found[0][0]) for weights, _ in found)
    torch.testing.assert_close(found[0][0], expected, rtol=0, atol=1e-6)


def test_rules_that_need_norms_and_products_are_those_of_whole_gradients(run_workers, tmp_path):
    fastest = FastestConfig(k=3)
    nnm = RobustConfig(rule="trimmed_mean", f=1, pre=("nnm",), fastest=fastest)
    configs = {"nnm": nnm, "dstar": DStarConfig(f=1, fastest=fastest)}

    def body(comm):
        return {
            name: trained(comm, config, tmp_path / f"{name} {comm.size}", steps=3, bad=1)
            for name, config in configs.items()
        }

    sharded, whole = run_workers(body, size=6), run_workers(body, size=3)
    for name in sharded[0]:
        assert_alike([found[name] for found in sharded], whole[0][name][0])
    everybody = dict.fromkeys(range(3), (0, 1, 2))
    assert_alike([found["nnm"] for found in sharded], dense(nnm, everybody, bad=1))


def test_a_replica_that_is_late_takes_over_shard_by_shard_and_the_log_replays(run_workers, tmp_path):
    # The last one is left out first, and then the first, so that the last must be there again.
    wanted = {step: (0, 1) if step < 3 else (1, 2) for step in range(STEPS)}

    def sharded(comm):
        late = lambda replica, step: 0.1 if replica == 2 and step < 3 else 0.0  # noqa: E731
        return trained(comm, CLIPPED, tmp_path / "six", sleeps=late, replay=wanted)

    found = run_workers(sharded, size=6)
    elected = read_log(tmp_path / "six" / "elections.jsonl")
    assert elected == wanted and found[4][1] == found[5][1] >= 1
    assert_alike(found, dense(CLIPPED, elected))
    assert not torch.allclose(found[0][0], dense(replace(CLIPPED, pre=()), elected), atol=1e-6)

    def replayed(comm):
        return trained(comm, CLIPPED, tmp_path / "three", replay=elected)

    assert_alike(run_workers(replayed, size=3), found[0][0])


def test_a_process_that_dies_takes_its_replica_along_and_costs_one_round(run_workers, tmp_path):
    def trouble(rank, step):
        """Be killed while norms are added up: those in its place lose it, and their neighbours nobody."""
        if rank == 3 and step == 2:
            ElectedComm.sum = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        if rank == 5 and step == 5:  # a link that cannot be made, at one of two shards
            real, StoreWire.comm = StoreWire.comm, fail_once
            fail_once.real = real

    def fail_once(wire, *arguments, **named):
        StoreWire.comm = fail_once.real
        raise WorkerLostError("a link that cannot be made")

    def body(comm):
        begin = dict.fromkeys(range(2), (0, 1))  # from step 2 on the first come
        late = lambda replica, step: 0.5 if replica == 2 and step == 2 else 0.0  # noqa: E731
        try:
            return trained(comm, CLIPPED, tmp_path / "run", sleeps=late, before=trouble, replay=begin)
        except WorkerLostError as error:
            assert comm.rank == 2, error
            return None

    found = run_workers(body, size=6, may_die=(3,), timeout_s=20.0)
    assert len(found) == 5 and found.pop(2) is None
    lines = [json.loads(text) for text in (tmp_path / "run" / "elections.jsonl").read_text().splitlines()]
    assert [line["elected"] for line in lines] == [[0, 1]] * 2 + [[0, 2]] * 6
    assert [line["attempts"] for line in lines] == [1, 1, 2, 1, 1, 2, 1, 1]
    assert_alike(found, dense(CLIPPED, {line["step"]: line["elected"] for line in lines}))
