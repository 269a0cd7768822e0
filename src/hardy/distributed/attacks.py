"""Workers that lie or break: what stands in their rows of a stack of gradients, and what spoils their data.

Pure: no workers, no models. `build_attack` makes one of `ATTACKS`; `flip_labels` and `permute_targets` spoil
data instead of gradients.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from hardy.config import ConfigError, unknown_name
from hardy.distributed.attacks_adaptive import Cosine, Edge, Mimic, Optimal
from hardy.distributed.attacks_blind import (
    BitFlip,
    Drift,
    Gaussian,
    Huge,
    Inf,
    Nan,
    OneNan,
    Replay,
    SignFlip,
    Stale,
    Zero,
)
from hardy.distributed.attacks_informed import Alie, Fang, Identical, Ipm, MinMax, MinSum
from hardy.distributed.attacks_stage import Attack
from hardy.rng import generator_for

ATTACKS: dict[str, type[Attack]] = {
    "alie": Alie,
    "bit_flip": BitFlip,
    "cosine": Cosine,
    "drift": Drift,
    "edge": Edge,
    "fang": Fang,
    "gaussian": Gaussian,
    "huge": Huge,
    "identical": Identical,
    "inf": Inf,
    "ipm": Ipm,
    "mimic": Mimic,
    "min_max": MinMax,
    "min_sum": MinSum,
    "nan": Nan,
    "one_nan": OneNan,
    "optimal": Optimal,
    "replay": Replay,
    "sign_flip": SignFlip,
    "stale": Stale,
    "zero": Zero,
}
"""All attacks on gradients, by name."""


def build_attack(name: str, *, arguments: Mapping[str, Any] | None = None, seed: int = 0) -> Attack:
    """Return an attack.

    Args:
        name: one of `ATTACKS`.
        arguments: settings of its class, such as strength of ipm.
        seed: of what it draws.

    Raises:
        ConfigError: an unknown name or argument, or a value that cannot be.

    Example:
        >>> rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
        >>> build_attack("ipm", arguments={"strength": 10})([rows], attackers=[2])
        >>> rows[2]
        tensor([-20., -30.])
    """
    if name not in ATTACKS:
        raise ConfigError(unknown_name(name, "attack", ATTACKS))
    known = {f.name for f in fields(ATTACKS[name]) if f.init} - {"seed"}
    for argument in arguments or {}:
        if argument not in known:
            raise ConfigError(
                unknown_name(argument, f"argument of attack {name!r}", known)
                if known
                else f"attack {name!r} takes no arguments, got {argument!r}"
            )
    return ATTACKS[name](seed=seed, **(arguments or {}))


def flip_labels(labels: Tensor, num_classes: int) -> Tensor:
    """Return num_classes - 1 - label; labels below 0 (ignored) stay.

    Example:
        >>> flip_labels(torch.tensor([0, 9, -100]), 10)
        tensor([   9,    0, -100])
    """
    return torch.where(labels < 0, labels, num_classes - 1 - labels)


def permute_targets(labels_T: Tensor, vocab_size: int, seed: int) -> Tensor:
    """Return the tokens that a fixed table puts in the targets' place; labels below 0 (ignored) stay.

    The table is one long cycle, drawn by the seed: each token becomes another one, equal ones stay equal.

    Example:
        >>> permute_targets(torch.tensor([1, 0, -100]), 2, seed=0)
        tensor([   0,    1, -100])
    """
    order = torch.randperm(vocab_size, generator=generator_for(seed, "permute_targets"))
    table = torch.empty_like(order)
    table[order] = order.roll(1)
    table = table.to(labels_T.device, labels_T.dtype)
    return torch.where(labels_T < 0, labels_T, table[labels_T.clamp(min=0)])
