"""Do all workers hold the same plan? Asked before a step: workers with different plans wait for ever."""

from collections import Counter

import torch

from hardy.config import UserError
from hardy.distributed.comm import Communicator


class PlanMismatchError(UserError):
    """Workers were about to follow different plans."""


def check_same_plan(comm: Communicator, digest: int) -> None:
    """Compare the plan's hash over all workers; collective, eight bytes each.

    Args:
        comm: all workers.
        digest: at most 63 bits that stand for this worker's plan.

    Raises:
        PlanMismatchError: on every worker, and names those whose plan differs from that of most.
    """
    digests = comm.all_gather(torch.tensor(digest, dtype=torch.int64)).tolist()
    counts = Counter(digests)
    if len(counts) == 1:
        return
    most = max(counts.values())
    usual = next(value for value in digests if counts[value] == most)  # of equally many, the lowest rank's
    strays = [rank for rank, value in enumerate(digests) if value != usual]
    raise PlanMismatchError(
        f"workers {strays} have another plan for this step than the other {most} of {comm.size} workers: "
        f"hashes {[f'{value:x}' for value in digests]} by rank. A plan follows from lengths, cost model and "
        f"settings alone, so compare data, configuration and versions of hardy and numpy on these workers"
    )
