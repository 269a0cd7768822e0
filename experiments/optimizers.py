"""The optimizers that experiments compare, each as a function of model and learning rate."""

from functools import partial

import torch
from galore import GaLore

from hardy.optim.make import make_optimizer
from hardy.optim.routing import route_params

RANK = 16
"""A quarter of the small model's width, as in the papers."""


def _galore(model, lr):
    groups = route_params(model, kind="apollo", embed_kind="adamw")
    return GaLore(
        [
            {"params": [p for _, p in group["params"]], "rank": RANK if group["kind"] == "apollo" else None}
            for group in groups
        ],
        lr=lr,
    )


def _own(preset, model, lr, **settings):
    return make_optimizer(model, preset, lr=lr, **settings)


APOLLO = partial(_own, "apollo", rank=RANK)
MINI = partial(_own, "apollo_mini")
SMMF = partial(_own, "smmf")

TABLE = {
    "adamw": lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0),
    "sgd": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
    "plain sgd": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr),
    "adagrad": lambda model, lr: torch.optim.Adagrad(model.parameters(), lr=lr),
    "rmsprop": lambda model, lr: torch.optim.RMSprop(model.parameters(), lr=lr),
    "adam": lambda model, lr: torch.optim.Adam(model.parameters(), lr=lr),
    "adafactor": lambda model, lr: torch.optim.Adafactor(model.parameters(), lr=lr, weight_decay=0.0),
    "galore": _galore,
    "adaptive_adamw": partial(_own, "adaptive_adamw"),
} | {
    f"{name}, embeddings by {kind}": partial(make, embed_kind=kind)
    for name, make in {"apollo": APOLLO, "apollo-mini": MINI, "smmf": SMMF}.items()
    for kind in ("adamw", "smmf", "apollo")
}
"""By name."""

GRIDS = {
    "adamw": (1e-3, 2e-3, 4e-3, 8e-3),
    "sgd": (0.05, 0.1, 0.2, 0.4),
    "plain sgd": (0.5, 1.0, 2.0, 4.0),
    "adagrad": (5e-3, 1e-2, 2e-2, 4e-2),
    "rmsprop": (5e-4, 1e-3, 2e-3, 4e-3),
    "adam": (1e-3, 2e-3, 4e-3, 8e-3),
    "adafactor": (2e-2, 4e-2, 8e-2, 1.6e-1),
    "galore": (8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
    "adaptive_adamw": (1e-3, 2e-3, 4e-3, 8e-3),
    "apollo": (8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
    "apollo-mini": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "smmf": (4e-3, 8e-3, 1.6e-2, 3.2e-2),
}
"""Four learning rates for each, a factor of two apart; an optimizer's variants share its grid."""


def grid_of(name):
    """Return the learning rates to try."""
    return GRIDS[name.split(",")[0]]
