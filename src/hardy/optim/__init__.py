"""Optimizers and learning-rate schedules.

    optimizer = hardy.optim.make_optimizer(model, "apollo-mini", lr=1e-2)

Names are loaded on first use, so that settings can be checked without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "APOLLO",
    "SMMF",
    "APOLLOMini",
    "AdaptiveAdamW",
    "GradGuard",
    "PerfExpDecay",
    "QAPOLLO",
    "apollo_scale_from_released",
    "describe_optimizer",
    "make_optimizer",
    "route_params",
]

if TYPE_CHECKING:
    from hardy.optim.guard import GradGuard as GradGuard
    from hardy.optim.make import describe_optimizer as describe_optimizer
    from hardy.optim.make import make_optimizer as make_optimizer
    from hardy.optim.optimizers import APOLLO as APOLLO
    from hardy.optim.optimizers import QAPOLLO as QAPOLLO
    from hardy.optim.optimizers import SMMF as SMMF
    from hardy.optim.optimizers import AdaptiveAdamW as AdaptiveAdamW
    from hardy.optim.optimizers import APOLLOMini as APOLLOMini
    from hardy.optim.optimizers import apollo_scale_from_released as apollo_scale_from_released
    from hardy.optim.perf_decay import PerfExpDecay as PerfExpDecay
    from hardy.optim.routing import route_params as route_params
else:
    _HOME = {
        "APOLLO": "hardy.optim.optimizers",
        "APOLLOMini": "hardy.optim.optimizers",
        "AdaptiveAdamW": "hardy.optim.optimizers",
        "GradGuard": "hardy.optim.guard",
        "PerfExpDecay": "hardy.optim.perf_decay",
        "QAPOLLO": "hardy.optim.optimizers",
        "SMMF": "hardy.optim.optimizers",
        "apollo_scale_from_released": "hardy.optim.optimizers",
        "describe_optimizer": "hardy.optim.make",
        "make_optimizer": "hardy.optim.make",
        "route_params": "hardy.optim.routing",
    }

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module 'hardy.optim' has no attribute {name!r}")
        return getattr(import_module(_HOME[name]), name)
