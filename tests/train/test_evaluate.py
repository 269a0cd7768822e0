"""Validation loss is the exact mean over held-out packs, on any number of workers."""

import pytest
import torch

from hardy.distributed.comm import Alone
from hardy.distributed.simulation import SimWorld
from hardy.train.device import choose_hardware
from hardy.train.evaluate import evaluate
from hardy.train.setup import assemble

HARDWARE = choose_hardware("cpu", "fp32")


def test_it_is_the_mean_over_targets_and_leaves_the_model_in_training(make_config, corpus):
    assembly = assemble(make_config(), Alone(), corpus=corpus, hardware=HARDWARE)
    model, stream = assembly.worker.model, assembly.plan.validation
    got = evaluate(assembly.worker, stream, num_packs=5, micro_packs=2)
    with torch.no_grad():
        batches = [stream.batch([i]) for i in range(5)]
        nll = sum(model(b.tokens_T, b.layout, b.labels_T).double() for b in batches)
        right = sum((model(b.tokens_T, b.layout).argmax(-1) == b.labels_T).sum().item() for b in batches)
    num_targets = sum(b.num_targets for b in batches)
    assert got.loss == pytest.approx(float(nll) / num_targets, rel=1e-6)
    assert got.accuracy == pytest.approx(right / num_targets) and 0 <= right < num_targets
    assert model.training


@pytest.mark.parametrize("num_workers", [2, 4])
def test_uneven_shares_count_every_pack_once(make_config, corpus, num_workers):
    config = make_config(train__batch_packs=4)

    def run(comm):
        assembly = assemble(config, comm, corpus=corpus, hardware=HARDWARE)
        return evaluate(assembly.worker, assembly.plan.validation, num_packs=5, micro_packs=1)

    alone = run(Alone())
    for shared in SimWorld(num_workers).run(run):
        assert shared == pytest.approx(alone, rel=1e-6)
