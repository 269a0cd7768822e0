"""Validation loss: the exact mean over held-out packs, whatever the number of workers."""

import torch

from hardy.data.stream import PackStream
from hardy.train.step import Worker


def evaluate(worker: Worker, stream: PackStream, *, num_packs: int, micro_packs: int) -> float:
    """Return the mean negative log-likelihood per target of packs 0 ... num_packs-1, in nats.

    Every worker runs the same number of forward passes, since sharded models meet in each; a worker that has
    run out of packs takes another's without counting it.
    """
    comm = worker.world
    totals = torch.zeros(2, dtype=torch.float64, device=worker.device)
    was_training = worker.model.training
    worker.model.eval()
    with torch.no_grad(), worker.strategy.evaluation_parameters():
        for first in range(0, num_packs, comm.size * micro_packs):
            packs = range(first, min(first + comm.size * micro_packs, num_packs))
            mine = packs[comm.rank :: comm.size]
            batch = stream.batch(mine or packs[:1]).to(worker.device)
            with worker.autocast.context():
                nll = worker.model(batch.tokens_T, batch.layout, batch.labels_T)
            if mine:
                totals += torch.stack([nll.double(), nll.new_tensor(batch.num_targets, dtype=torch.float64)])
    worker.model.train(was_training)
    nll_sum, num_targets = comm.sum(totals).tolist()
    return nll_sum / num_targets
