"""The shape of SMMF's square-ish matrix, on integers: free of torch, so that memory is planned without it.

Paper: K. Park, S. Lee, "SMMF: Square-Matricized Momentum Factorization", AAAI 2025 (arXiv 2412.08894).
Differs from the paper: shapes 'virtual' and 'auto', for tensors whose size has no divisor near its root.
"""

import math
from functools import lru_cache
from typing import Literal

from hardy.config import ConfigError

ShapePolicy = Literal["exact", "virtual", "auto"]
AUTO_MIN_NUMEL = 65536
"""Smaller tensors keep the exact shape under 'auto', however long."""
AUTO_MAX_RATIO = 16
"""Height over width beyond which 'auto' gives up the exact shape."""


@lru_cache(maxsize=4096)
def matrix_shape(numel: int, *, policy: ShapePolicy = "auto") -> tuple[int, int]:
    """Return (height, width) of the matrix that a tensor of `numel` elements is seen as.

    Args:
        numel: elements of the whole tensor, at least 1.
        policy: "exact": the width is the largest divisor of numel not above its root. "virtual": it is the
            root rounded up, and the last row may end early. "auto": exact, unless numel >= 65536 and
            height > 16 * width.

    Raises:
        ConfigError: no elements.

    Example:
        >>> matrix_shape(50257 * 768), matrix_shape(7919), matrix_shape(100_003)
        ((6932, 5568), (7919, 1), (316, 317))
    """
    if numel < 1:
        raise ConfigError(
            f"SMMF needs a tensor with elements, got one of {numel}; leave it out of the groups"
        )
    # Below 2^33 these are at most 92 681 trials, a few milliseconds, and only for a prime.
    width = next(divisor for divisor in range(math.isqrt(numel), 0, -1) if numel % divisor == 0)
    height = numel // width
    stretched = numel >= AUTO_MIN_NUMEL and height > AUTO_MAX_RATIO * width
    if policy == "virtual" or (policy == "auto" and stretched):
        width = math.isqrt(numel - 1) + 1
        height = -(-numel // width)
    return height, width
