"""A replica that comes and goes: when it is one, what it shares with others, where it begins."""

import json
import threading
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from hardy.config import UserError
from hardy.data.corpus import prepare
from hardy.distributed.comm import Alone
from hardy.distributed.elastic import StoreHost
from hardy.distributed.groups import FixedGroup, Regrouping
from hardy.distributed.simulation import SimWorld
from hardy.train.config import LoopConfig, TrainConfig
from hardy.train.device import choose_hardware
from hardy.train.folder import RunFolder
from hardy.train.manifest import sound
from hardy.train.membership import (
    Membership,
    check_alike,
    fingerprint,
    join_replica,
    leads,
    membership_of,
    newest_of_any,
    one_at_a_time,
    patience_of,
)
from hardy.train.metrics import read_metrics
from hardy.train.plan import World
from hardy.train.run import Surroundings, resume, start
from hardy.train.setup import assemble

ELASTIC = {"name": "diloco", "elastic": True, "every_steps": 2}


@pytest.fixture
def elastic(make_config):
    return lambda **dotted: make_config(strategy=ELASTIC, **dotted)


def test_only_replicas_of_a_launcher_with_a_store_have_a_membership(make_config, elastic):
    with ExitStack() as held:
        assert membership_of(make_config(), World(rank=1, size=2, address="env://"), held) is None
        assert membership_of(elastic(), World(), held) is None  # one alone has nobody to lose
        with pytest.raises(UserError, match="strategy.elastic=true needs replicas that `hardy train --work"):
            membership_of(elastic(), World(rank=1, size=2, address="env://"), held)
        for config in (elastic(), make_config(strategy={"name": "push_sum", "elastic": True})):
            found = membership_of(config, World(rank=1, size=2, store="localhost:1"), held)
            assert (found.replica, found.replicas) == (1, 2)


def test_the_workers_of_a_sharded_replica_have_one_membership(make_config):
    config = make_config(strategy=ELASTIC | {"mesh": {"shards": 2}})
    with ExitStack() as held:
        for rank in (2, 3):
            world = World(rank=rank, size=4, address="file:///x", store="localhost:1", replica_size=2)
            found = membership_of(config, world, held)
            assert (found.replica, found.replicas) == (1, 2)
        assert membership_of(config, World(rank=1, size=2, address="file:///x"), held) is None  # one replica
        with pytest.raises(UserError, match="needs replicas that `hardy train --workers N` starts"):
            membership_of(config, World(rank=1, size=4, address="env://"), held)


def test_a_replica_of_one_worker_meets_nobody(elastic):
    with ExitStack() as held:
        world = World(rank=1, size=2, store="localhost:1")
        assert isinstance(join_replica(elastic(), world, held, device_type="cpu"), Alone)


def test_a_fingerprint_changes_with_every_setting_but_the_display(elastic):
    mine = fingerprint(elastic())
    assert fingerprint(elastic(log__progress="plain")) == mine
    others = [elastic(optim__lr=0.02), elastic(strategy__timeout_s=5.0), elastic(train__seed=1)]
    assert len({mine, *map(fingerprint, others)}) == 4


def test_the_lowest_of_those_that_live_leads():
    group = Regrouping(Alone(), (2, 1), generation=3)
    assert leads(group, 1) and not leads(group, 2) and not leads(group, 0)


@pytest.mark.parametrize("timeout_s", [0.5, 10.0, 3600.0])
def test_a_silent_replica_is_lost_within_the_time_out_and_not_at_once(timeout_s):
    patience = patience_of(timeout_s)
    assert patience.timeout_s == timeout_s and patience.limit_s <= timeout_s
    assert patience.limit_s == 5 * patience.heartbeat_s


def test_replicas_share_the_batch_by_their_number_at_launch_whoever_lives(elastic, cache_dir):
    config = elastic()
    corpus = prepare(config.data, cache_dir=cache_dir)
    parts = []
    for replica in range(2):
        member = Membership(replica=replica, replicas=2, enter=lambda: FixedGroup(Alone()))
        made = assemble(
            config, Alone(), corpus=corpus, hardware=choose_hardware("cpu", "fp32"), membership=member
        )
        assert (made.worker.world.size, made.worker.replicas, made.grid.replica) == (1, 2, replica)
        parts += [t for b in made.plan.batches.at(3, made.worker) for t in b.tokens_T.tolist()]
    alone = assemble(elastic(), Alone(), corpus=corpus, hardware=choose_hardware("cpu", "fp32"))
    whole = [t for b in alone.plan.batches.at(3, alone.worker) for t in b.tokens_T.tolist()]
    assert sorted(parts) == sorted(whole) and len(parts) == 4 * 32


def live(config, run_dir, cache_dir, host, *, restarts=0, begin=start, **more):
    """Run replica 0 of one, which has a store."""
    world = World(rank=0, size=1, store=host.address, restarts=restarts)
    return begin(config, run_dir, Surroundings(cache_dir=cache_dir, world=world, **more))


def resumed(config, run_dir, around):
    return resume(run_dir, around, config=config)


def test_a_run_of_one_with_a_store_is_one_without_and_ends_with_a_round(elastic, cache_dir, tmp_path):
    constant = {"name": "constant", "warmup_steps": 2}  # so that the number of steps changes no rate
    config = elastic(train__steps=5, optim__schedule=constant)
    assert live(config, tmp_path / "run", cache_dir, StoreHost()).steps == 6
    start(
        elastic(train__steps=6, optim__schedule=constant),
        tmp_path / "plain",
        Surroundings(cache_dir=cache_dir),
    )
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("run", "plain")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert live(config, tmp_path / "run", cache_dir, StoreHost(), begin=resumed).steps == 6  # nothing to do


def test_a_gossiping_replica_alone_with_a_store_trains_and_resumes(make_config, cache_dir, tmp_path):
    strategy = {"name": "push_sum", "elastic": True}
    config, run_dir = make_config(strategy=strategy, train__steps=4), tmp_path / "run"
    assert live(config, run_dir, cache_dir, StoreHost()).steps == 4
    plain = next((run_dir / "checkpoints" / "step-00000004").glob("plain.json"))
    about = json.loads(plain.read_text())["plain"]["strategy"]["about"]
    assert about["replica"] == 0 and about["members"] == [0]
    longer = make_config(strategy=strategy, train__steps=6)
    assert live(longer, run_dir, cache_dir, StoreHost(), begin=resumed).steps == 6
    steps = [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")]
    assert steps == [*range(1, 7)]


def test_a_resume_takes_the_newest_good_checkpoint_of_any_replica(elastic, cache_dir, tmp_path, caplog):
    folder = RunFolder(tmp_path / "run")
    start(elastic(checkpoint__keep_last=9), folder.path, Surroundings(cache_dir=cache_dir))
    for replica, steps in ((1, (2, 4)), (2, (4, 6))):
        for step in steps:
            name = f"step-{step:08d}"
            to = folder.checkpoints_of(replica) / name
            to.mkdir(parents=True)
            for path in (folder.checkpoints / name).iterdir():
                (to / path.name).write_bytes(path.read_bytes())

    def found(replica):
        source, checkpoint = newest_of_any(folder, replace(members, replica=replica))
        return source, checkpoint.step

    members = Membership(replica=0, replicas=4, enter=lambda: FixedGroup(Alone()))
    assert [found(replica) for replica in range(4)] == [(0, 6), (0, 6), (2, 6), (0, 6)]
    damaged = next((folder.checkpoints / "step-00000006").glob("*.safetensors"))
    damaged.write_bytes(bytes([damaged.read_bytes()[0] ^ 1]) + damaged.read_bytes()[1:])
    assert [found(replica) for replica in range(4)] == [(2, 6)] * 4
    assert "damaged checkpoint left out" in caplog.text
    other = next((folder.checkpoints_of(2) / "step-00000006").glob("*.safetensors"))
    other.write_bytes(b"")
    assert [found(replica) for replica in range(4)] == [(0, 4), (1, 4), (2, 4), (0, 4)]
    for replica in range(3):
        for checkpoint in sound(folder.checkpoints_of(replica)):
            (checkpoint.folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint of any replica in .* is good"):
        found(1)
    assert newest_of_any(RunFolder(tmp_path / "new"), members) is None


def test_a_replica_that_was_lost_before_resumes_at_the_others_weights(elastic, cache_dir, tmp_path):
    """Replica 0 was lost at step 2 for good; replica 1 has step 6."""
    config, run_dir = elastic(checkpoint__keep_last=9), tmp_path / "run"
    start(config, run_dir, Surroundings(cache_dir=cache_dir))
    (run_dir / "checkpoints").rename(run_dir / "checkpoints-replica-1")
    host, longer = StoreHost(), elastic(train__steps=8, checkpoint__keep_last=9)
    world = World(rank=0, size=1, store=host.address)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "hardy.train.run.newest_of_any",
            lambda folder, mine: newest_of_any(folder, replace(mine, replicas=2)),
        )
        summary = resume(run_dir, Surroundings(cache_dir=cache_dir, world=world), config=longer)
    assert summary.steps == 8
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")] == [*range(1, 9)]
    saved = load_file(next((run_dir / "checkpoints" / "step-00000008").glob("*.safetensors")))
    assert all(torch.isfinite(value).all() for value in saved.values() if value.is_floating_point())


def test_a_start_that_was_cut_off_is_made_again_and_a_run_that_is_there_is_kept(elastic, cache_dir, tmp_path):
    config = elastic()
    assert live(config, tmp_path / "run", cache_dir, StoreHost(), restarts=1).steps == 6
    before = (tmp_path / "run" / "run.json").read_text()
    live(config, tmp_path / "run", cache_dir, StoreHost(), restarts=2)
    assert (tmp_path / "run" / "run.json").read_text() == before
    with pytest.raises(UserError, match="already holds this run"):
        live(config, tmp_path / "run", cache_dir, StoreHost())


def test_one_process_at_a_time_prepares(tmp_path):
    with one_at_a_time(tmp_path / "cache"):
        other = threading.Thread(target=lambda: one_at_a_time(tmp_path / "cache").__enter__(), daemon=True)
        other.start()
        other.join(0.2)
        assert other.is_alive()
    other.join(5)
    assert not other.is_alive()


def test_workers_that_were_started_differently_are_refused():
    def body(comm):
        config = TrainConfig() if comm.rank != 2 else TrainConfig(train=LoopConfig(steps=7))
        check_alike(TrainConfig(), comm)
        with pytest.raises(UserError, match="workers 2 of 3 have other settings or versions than worker 0"):
            check_alike(config, comm)

    SimWorld(3).run(body)
