"""A training run gives the same losses alone and simulated, and its virtual time follows the formula."""

import pytest
import torch

from hardy.config import from_dict, override, to_dict
from hardy.data.corpus import prepare
from hardy.distributed import costs
from hardy.distributed.comm import Alone
from hardy.distributed.config import ClusterConfig
from hardy.distributed.simulation import SimWorld
from hardy.train.config import TrainConfig
from hardy.train.device import choose_hardware
from hardy.train.loop import Progress, run_loop
from hardy.train.setup import assemble

HARDWARE = choose_hardware("cpu", "fp32")
STEPS = 8


def make_config(**dotted):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    changes = {
        "model.shape": shape,
        "data.source": "synthetic:lognormal,documents=120,mean=40",
        "data.pack_tokens": 32,
        "optim.lr": 0.01,
        "optim.schedule.warmup_steps": 2,
        "train.steps": STEPS,
        "train.batch_packs": 12,
        "train.device": "cpu",
        "train.evaluate_packs": 3,
    } | {key.replace("__", "."): value for key, value in dotted.items()}
    return from_dict(TrainConfig, override(to_dict(TrainConfig()), changes))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepare(make_config().data, cache_dir=tmp_path_factory.mktemp("cache"))


def train(config, corpus, comm, *, work_s=0.0):
    """Train in float64, so that what remains between two worlds is rounding alone."""
    assembly, losses = assemble(config, comm, corpus=corpus, hardware=HARDWARE), []
    assembly.worker.model.double()

    def record(line):
        losses.append(line["loss"])
        if work_s:
            comm.spend(work_s)

    plan, progress = assembly.plan, Progress()
    run_loop(assembly.worker, plan, progress, save=lambda _: None, record=record, stop=lambda: False)
    weights = torch.cat([p.detach().flatten() for p in assembly.worker.model.parameters()])
    return losses, progress.validation_loss, weights


@pytest.mark.parametrize("packing", ["stream", "whole"])
@pytest.mark.parametrize("micro_packs", [None, 1])
def test_any_number_of_workers_and_micro_batches_gives_the_losses_of_one(corpus, packing, micro_packs):
    alone, validation, weights = train(make_config(balance__packing=packing), corpus, Alone())
    config = make_config(balance__packing=packing, train__micro_packs=micro_packs)
    for size in (2, 3):
        for losses, other_validation, other_weights in SimWorld(size).run(
            lambda comm, config=config: train(config, corpus, comm)
        ):
            assert losses == pytest.approx(alone, rel=1e-6)  # the loss itself is summed in fp32
            assert other_validation == pytest.approx(validation, rel=1e-6)
            assert torch.allclose(other_weights, weights, rtol=0, atol=2e-5)


def test_workers_stay_equal_to_the_bit(corpus):
    (_, _, first), *others = SimWorld(4).run(lambda comm: train(make_config(), corpus, comm))
    assert all(torch.equal(first, weights) for _, _, weights in others)


def test_virtual_time_is_the_slowest_workers_work_and_the_traffic(corpus):
    """Per step one sum of 16 bytes and one of the gradients; one sum of 24 bytes for the validation."""
    cluster = ClusterConfig(bandwidth_bytes_per_s=1e6, latency_s=0.001, slow_factors=(1.0, 3.0))
    world = SimWorld(2, cluster=cluster)
    config = make_config(train__evaluate_every_steps=STEPS)
    (_, _, weights), _ = world.run(lambda comm: train(config, corpus, comm, work_s=0.1))

    def seconds(num_bytes):
        return costs.all_reduce(num_bytes, 2).seconds(bandwidth_bytes_per_s=1e6, latency_s=0.001)

    meetings_s = STEPS * (seconds(weights.nbytes) + seconds(16)) + seconds(24)
    # Worker 1 works three times as long; after the last step nobody waits for it any more.
    assert world.report()[1].virtual_s == pytest.approx(STEPS * 0.3 + meetings_s)
    assert world.report()[0].virtual_s == pytest.approx((STEPS - 1) * 0.3 + 0.1 + meetings_s)
