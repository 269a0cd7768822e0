"""Which parameters are decayed: matrices are, vectors (norms, biases) are not.

Embeddings and the output head count as matrices and are decayed, like every other tensor of two or more
dimensions: a tied head is both, and one rule without names works for models that are not ours.
"""

from collections.abc import Iterable
from typing import Any

from torch.nn import Parameter


def parameter_groups(
    named_parameters: Iterable[tuple[str, Parameter]], *, weight_decay: float
) -> list[dict[str, Any]]:
    """Return groups for a torch optimizer: decayed matrices, then vectors without decay; none is empty.

    A tied weight appears once, under its first name; frozen parameters are left out. Sharded parameters
    (DTensor) are told apart by their whole shape.

    Args:
        named_parameters: as `model.named_parameters()` gives them.
        weight_decay: decay of the matrices.

    Example:
        >>> from torch import nn
        >>> groups = parameter_groups(nn.Linear(3, 2).named_parameters(), weight_decay=0.1)
        >>> [(group["weight_decay"], [name for name, _ in group["params"]]) for group in groups]
        [(0.1, ['weight']), (0.0, ['bias'])]
    """
    matrices: dict[Parameter, str] = {}
    vectors: dict[Parameter, str] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (matrices if parameter.ndim >= 2 else vectors).setdefault(parameter, name)
    if not matrices and not vectors:
        raise ValueError("the model has no parameter that is trained; all are frozen or it has none")
    return [
        {"params": [(name, parameter) for parameter, name in members.items()], "weight_decay": decay}
        for members, decay in ((matrices, weight_decay), (vectors, 0.0))
        if members
    ]
