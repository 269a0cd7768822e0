"""How far replicas are from their common mean, estimated from the few that one of them hears from.

Paper: "Adaptive Weighting Push-SUM" (arXiv 2412.07252) logs the distance to the mean; the estimate is ours.
Letters: N replicas, z_i de-biased parameters, zbar their mean, D_ij = ||z_i - z_j||^2.

    mean over i of ||z_i - zbar||^2  =  (N - 1) / 2N * mean over i != j of D_ij

A replica takes the mean over those it hears from for the mean over all. Heard from all, its square is halfway
between its own squared distance and the mean of all squared distances, and the mean of squares over replicas
is exact. Heard from a few it is right on average where those are a fair sample, and too low where neighbours
are more alike than strangers, as on a ring.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hardy.distributed.gossip.exchange import Gain


def distance_to_mean(squares: Sequence[float], *, num_replicas: int) -> float:
    """Return the estimated distance to the mean of all replicas.

    Args:
        squares: D to those heard from, at least one.
        num_replicas: N.

    Example:
        >>> distance_to_mean([4.0], num_replicas=2)  # the mean lies half-way
        1.0
    """
    mean = math.fsum(squares) / len(squares)
    return math.sqrt(mean * (num_replicas - 1) / (2 * num_replicas))


def squares_to(own: Sequence[Tensor], mass: float, gains: Sequence[Gain]) -> Tensor:
    """Return D to the sender of each gain, of what this worker holds: fp64 [gains]; one pass for each.

    Args:
        own: x of this replica, one tensor per unit; units of the gains beyond these do not count.
        mass: a of this replica.
        gains: what came.
    """
    squares = torch.zeros(len(gains), dtype=torch.float64, device=own[0].device)
    for place, gain in enumerate(gains):
        for mine, theirs in zip(own, gain.vectors, strict=False):
            apart = (mine / mass).sub_(theirs.to(mine.dtype), alpha=gain.factor / gain.mass)
            squares[place] += torch.linalg.vector_norm(apart).double().square()
    return squares
