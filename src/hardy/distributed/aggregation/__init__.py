"""Rules that make one vector of many, some of which may be anything. Pure functions of a stack.

Names are loaded on first use, so that settings can read `names` without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "PRE_AGGREGATORS",
    "RULES",
    "Aggregator",
    "Outcome",
    "PreAggregator",
    "Rule",
    "Total",
    "aggregate",
    "build_aggregator",
]

if TYPE_CHECKING:
    from hardy.distributed.aggregation.aggregator import Aggregator as Aggregator
    from hardy.distributed.aggregation.aggregator import Outcome as Outcome
    from hardy.distributed.aggregation.build import RULES as RULES
    from hardy.distributed.aggregation.build import aggregate as aggregate
    from hardy.distributed.aggregation.build import build_aggregator as build_aggregator
    from hardy.distributed.aggregation.preaggregation import PRE_AGGREGATORS as PRE_AGGREGATORS
    from hardy.distributed.aggregation.preaggregation import PreAggregator as PreAggregator
    from hardy.distributed.aggregation.rule import Rule as Rule
    from hardy.distributed.aggregation.stack import Total as Total
else:
    _HOME = {
        "PRE_AGGREGATORS": "preaggregation",
        "RULES": "build",
        "Aggregator": "aggregator",
        "Outcome": "aggregator",
        "PreAggregator": "preaggregation",
        "Rule": "rule",
        "Total": "stack",
        "aggregate": "build",
        "build_aggregator": "build",
    }

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module 'hardy.distributed.aggregation' has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
