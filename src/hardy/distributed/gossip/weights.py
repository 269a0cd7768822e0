"""What share of its parameters and mass a node gives to each neighbour.

Paper: "Adaptive Weighting Push-SUM" (arXiv 2412.07252).   Letters: w share, |O| receivers with the
sender itself, v lower-bound and k rate parameter, D squared distance to the receiver's parameters.

The rule gives most to those far away, (1 - v) / |O|, and hardly anything near agreement,
v (1 - v) / ((1 + v) |O|): partial mixing, so replicas agree less than with equal shares.
"""

import math
from collections.abc import Mapping

from hardy.distributed.gossip.config import WeightsConfig

_TINY = 1e-30


def moreau_shares(
    distances: Mapping[int, float], *, num_receivers: int, v: float, k: float
) -> dict[int, float]:
    """Return w = (1 - v) / (1 + v) * (1 + v - exp(-k D)) / |O| of each neighbour.

    Args:
        distances: D by receiver, the sender itself left out; 0 where nothing was ever heard of it.
        num_receivers: |O|, the sender included.
        v: above 0, below 1.
        k: above 0.

    Example:
        >>> moreau_shares({1: 0.0, 2: math.inf}, num_receivers=3, v=0.5, k=1.0)
        {1: 0.05555555555555555, 2: 0.16666666666666666}
    """
    factor = (1 - v) / (1 + v) / num_receivers
    return {receiver: factor * (v - math.expm1(-k * d)) for receiver, d in distances.items()}


def self_share(shares: Mapping[int, float]) -> float:
    """Return what a node keeps, so that all its shares add up to 1."""
    return 1.0 - math.fsum(shares.values())


def scaled_distance(
    distance: float, config: WeightsConfig, *, own_square: float, num_parameters: int
) -> float:
    """Return D as `config.scale` counts it.

    Args:
        distance: raw squared distance.
        config: the scale.
        own_square: squared norm of the sender's own vector.
        num_parameters: of the whole model.

    Raises:
        ValueError: the distance is NaN, which no message that was accepted can cause.
    """
    if math.isnan(distance):
        raise ValueError("a squared distance is NaN; messages that are not finite must be refused")
    if config.scale == "relative":
        return distance / max(own_square, _TINY)
    return distance / num_parameters if config.scale == "per_parameter" else distance
