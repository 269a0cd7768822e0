"""Checks between settings, made before torch is imported."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardy.config import ConfigError, from_dict
from hardy.train.config import TrainConfig
from hardy.train.plan import MicroBatches, RunPlan, World, micro_batches, plan_run

RELEASED = {"release": True, "clip_norm": None, "guard": {"history": "off"}}


def config(**sections):
    return from_dict(TrainConfig, sections)


def test_the_size_of_a_run():
    sections = {"train": {"batch_packs": 12, "micro_packs": 2, "steps": 30}, "data": {"pack_tokens": 100}}
    assert plan_run(config(**sections), num_workers=3) == RunPlan(
        num_workers=3,
        replicas=3,
        shards=1,
        micro=MicroBatches(packs=2, count=2),
        steps=30,
        tokens_per_step=1200,
        total_tokens=36000,
        num_parameters=5 * (4 * 128**2 + 3 * 128 * 320 + 2 * 128) + 128 + 320 * 128,
    )


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_micro_batches_cover_the_batch(num_workers, packs, count):
    micro = micro_batches(num_workers * packs * count, num_workers, packs)
    assert micro == MicroBatches(packs=packs, count=count)


def test_without_micro_packs_a_worker_takes_its_whole_share():
    assert micro_batches(12, 3, None) == MicroBatches(packs=4, count=1)


@pytest.mark.parametrize(
    ("batch_packs", "num_workers", "micro_packs", "text"),
    [
        (
            16,
            3,
            None,
            "train.batch_packs=16 must be a multiple of workers=3; set train.batch_packs to 15 or 18",
        ),
        (2, 3, None, "train.batch_packs=2 must be a multiple of workers=3; set train.batch_packs to 3"),
        (
            16,
            2,
            3,
            "train.batch_packs=16 must be a multiple of workers=2 x train.micro_packs=3; "
            "set train.batch_packs to 12 or 18, or train.micro_packs to 2",
        ),
        (
            7,
            2,
            2,
            "train.batch_packs=7 must be a multiple of workers=2 x train.micro_packs=2; "
            "set train.batch_packs to 4 or 8",
        ),
    ],
)
def test_a_batch_that_does_not_divide_names_what_does(batch_packs, num_workers, micro_packs, text):
    with pytest.raises(ConfigError) as caught:
        micro_batches(batch_packs, num_workers, micro_packs)
    assert str(caught.value) == text


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 8))
def test_the_batch_sizes_that_an_error_names_work(batch_packs, num_workers, micro_packs):
    try:
        micro_batches(batch_packs, num_workers, micro_packs)
    except ConfigError as error:
        sizes, _, micro = (
            str(error).partition("set train.batch_packs to ")[2].partition(", or train.micro_packs to ")
        )
        for size in sizes.split(" or "):
            micro_batches(int(size), num_workers, micro_packs)
        if micro:
            micro_batches(batch_packs, num_workers, int(micro))


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        (
            {"data": {"pack_tokens": 64, "document_tokens": 65}},
            "data.document_tokens=65 must be at most data.pack_tokens=64",
        ),
        (
            {"data": {"pack_tokens": 64}, "model": {"context_tokens": 32}},
            "data.document_tokens=64 is longer than model.context_tokens=32",
        ),
        ({"model": {"name": "2m"}}, "there is no preset '2m'; did you mean"),
        ({"data": {"tokenizer": "byte"}}, "there is no tokenizer 'byte'; did you mean 'bytes'"),
        (
            {"train": {"steps": 10}, "optim": {"name": "adamw", "schedule": {"warmup_steps": 10}}},
            "optim.schedule.warmup_steps=10 must be below train.steps=10",
        ),
        (
            {"strategy": {"name": "synchronous", "mesh": {"shards": 2}}},
            "1 replicas x 2 shards needs 2 workers, but 1 run",
        ),
        (
            {"balance": {"mode": "dispatch"}, "strategy": {"name": "diloco"}},
            "strategy.name='diloco' lets each have its own",
        ),
        (
            {"balance": {"mode": "dispatch"}, "optim": {"name": "apollo"} | RELEASED},
            "optim.release=true must know",
        ),
        (
            {"balance": {"mode": "dispatch"}, "model": {"name": "hf:somewhere"}},
            "model.name='hf:somewhere' brings its own",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(sections, text):
    with pytest.raises(ConfigError, match=text):
        plan_run(config(**sections), num_workers=1)


@pytest.mark.parametrize(
    ("strategy", "optim", "text"),
    [
        (
            {"name": "push_sum", "topology": {"name": "hypercube"}},
            {},
            "needs a power of two replicas, but there are 6; run 4 or 8",
        ),
        (
            {"name": "diloco", "every_steps": 14, "fragments": 7},
            {},
            "strategy.fragments=7 is more than the 6 units",
        ),
        (
            {"name": "synchronous", "mesh": {"shards": 2}},
            {"name": "qapollo"},
            "optim.name=qapollo .* cannot be sharded yet, and strategy.mesh.shards is 2; set it to 1",
        ),
        (
            {"name": "synchronous"},
            {"name": "apollo"} | RELEASED,
            "optim.release=true .* and 6 workers hold a whole model each; set strategy.mesh.shards to 6",
        ),
        (
            {"name": "local_sgd", "copies": 3},
            {"name": "apollo"} | RELEASED,
            "and 3 workers hold a whole model each; set strategy.mesh.shards to 3",
        ),
    ],
)
def test_what_so_many_workers_cannot_do_is_refused(strategy, optim, text):
    sections = {"strategy": strategy, "optim": {"name": "adamw"} | optim, "train": {"batch_packs": 12}}
    with pytest.raises(ConfigError, match=text):
        plan_run(config(**sections), num_workers=6)


@pytest.mark.parametrize(
    ("strategy", "optim"),
    [
        ({"name": "diloco", "every_steps": 12, "fragments": 6}, {}),
        ({"name": "synchronous", "mesh": {"shards": 6}}, RELEASED),
        ({"name": "local_sgd"}, RELEASED),
        ({"name": "push_sum", "topology": {"name": "torus"}}, RELEASED),
    ],
)
def test_what_they_can_do_is_not(strategy, optim):
    sections = {"strategy": strategy, "optim": {"name": "apollo"} | optim, "train": {"batch_packs": 12}}
    assert plan_run(config(**sections), num_workers=6).num_workers == 6


def test_the_parameters_of_a_foreign_model_are_not_known():
    assert plan_run(config(model={"name": "hf:somewhere"}), num_workers=1).num_parameters is None


def test_a_trained_vocabulary_counts_in_whole_rows():
    small, large = (
        plan_run(config(data={"tokenizer": f"bpe:{size}"}), num_workers=1).num_parameters
        for size in (500, 600)
    )
    assert large - small == (640 - 512) * 128


def test_a_worker_alone_is_the_default():
    assert World() == World(rank=0, size=1, local_rank=0, address=None)


def test_a_worker_is_a_replica_unless_replicas_have_several():
    me = World(rank=3, size=4)
    assert (me.replica, me.replicas, me.rank_in_replica) == (3, 4, 0)
    me = World(rank=3, size=6, replica_size=3)
    assert (me.replica, me.replicas, me.rank_in_replica) == (1, 2, 0)


def test_planning_imports_no_torch():
    code = "import sys, hardy.train.plan; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
