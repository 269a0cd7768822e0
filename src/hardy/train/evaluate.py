"""Validation: the exact mean over held-out packs, whatever the number of workers."""

from typing import NamedTuple

import torch

from hardy.data.stream import PackStream
from hardy.train.step import Worker


class Evaluation(NamedTuple):
    """What a model makes of held-out text."""

    loss: float
    """Mean negative log-likelihood per target, in nats."""
    accuracy: float
    """Share of targets with the largest logit. A loss may hide what it shows: averaged replicas are surer."""


def evaluate(worker: Worker, stream: PackStream, *, num_packs: int, micro_packs: int) -> Evaluation:
    """Return means over the targets of packs 0 ... num_packs-1.

    Every worker runs the same number of forward passes, since sharded models meet in each; a worker that has
    run out of packs takes another's without counting it.
    """
    comm = worker.world
    totals = torch.zeros(3, dtype=torch.float64, device=worker.device)
    was_training = worker.model.training
    worker.model.eval()
    with torch.no_grad(), worker.strategy.evaluation_parameters():
        for first in range(0, num_packs, comm.size * micro_packs):
            packs = range(first, min(first + comm.size * micro_packs, num_packs))
            mine = packs[comm.rank :: comm.size]
            batch = stream.batch(mine or packs[:1]).to(worker.device)
            with worker.autocast.context():
                sums = worker.model(batch.tokens_T, batch.layout, batch.labels_T, with_correct=True)
            if mine:
                totals[:2] += sums.double()
                totals[2] += batch.num_targets
    worker.model.train(was_training)
    nll_sum, num_right, num_targets = comm.sum(totals).tolist()
    return Evaluation(loss=nll_sum / num_targets, accuracy=num_right / num_targets)
