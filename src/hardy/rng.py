"""Named random streams: what is drawn depends on a seed and on the purpose's name, never on another draw.

So a draw is the same on every world size, after every restart, and whatever else the program drew before.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def seed_for(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed that depends on `seed` and the words alone.

    Example:
        >>> seed_for(0, "shuffle", 1) == seed_for(0, "shuffle", 1) != seed_for(0, "shuffle", 2)
        True
    """
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_for(seed: int, *purpose: str | int) -> "torch.Generator":
    """Return a fresh CPU generator of torch for the named purpose.

    Example:
        >>> import torch
        >>> a, b = (torch.rand(3, generator=generator_for(7, "noise")) for _ in range(2))
        >>> torch.equal(a, b)
        True
    """
    import torch

    return torch.Generator().manual_seed(seed_for(seed, *purpose))


def numpy_generator_for(seed: int, *purpose: str | int) -> "np.random.Generator":
    """Return a fresh generator of numpy for the named purpose (counter-based Philox)."""
    import numpy as np

    return np.random.Generator(np.random.Philox(seed_for(seed, *purpose)))
