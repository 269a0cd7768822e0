"""`hardy train --balance.mode` on real workers: FSDP2 and DDP give the losses of one worker, step by step."""

import pytest

from hardy.config import from_dict, override, to_dict
from hardy.data.corpus import prepare
from hardy.distributed.comm import Alone
from hardy.train.config import TrainConfig
from hardy.train.device import choose_hardware
from hardy.train.loop import Progress, run_loop
from hardy.train.setup import assemble

pytestmark = pytest.mark.mp


def losses(config, folder, comm):
    corpus = prepare(config.data, cache_dir=folder)
    assembly, lines = assemble(config, comm, corpus=corpus, hardware=choose_hardware("cpu", "fp32")), []
    if config.balance.mode != "none":  # where workers run freely, FSDP2 must be told so at each micro-batch
        expected = "lock_step" if config.strategy.mesh.shards > 1 else "free_running"
        assert assembly.plan.batches.planning.objective == expected
    run_loop(
        assembly.worker,
        assembly.plan,
        Progress(),
        save=lambda _: None,
        record=lines.append,
        stop=lambda: False,
    )
    if config.balance.mode != "none":
        assert all(line["plan_slowest_s"] >= line["plan_own_s"] > 0 for line in lines)
        assert all(0 <= line["plan_measured_idle_share"] < 1 for line in lines)
    return [(line["loss"], line.get("plan_groups")) for line in lines]


@pytest.mark.parametrize("shards", [1, 4])
def test_planned_batches_give_the_losses_of_one_worker(shards, few_words, run_workers, tmp_path):
    changes = {"train.steps": 4, "train.evaluate_packs": 2}
    alone = losses(from_dict(TrainConfig, override(to_dict(few_words), changes)), tmp_path, Alone())
    changes |= {"balance.mode": "dynamic_cp", "balance.cap_tokens": 16, "balance.split_tokens": 0}
    changes |= {"strategy.mesh.shards": shards}
    config = from_dict(TrainConfig, override(to_dict(few_words), changes))
    for found in run_workers(lambda comm: losses(config, tmp_path, comm), size=4):
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in alone], abs=1e-5)
        assert any(max(groups) > 1 for _, groups in found)
