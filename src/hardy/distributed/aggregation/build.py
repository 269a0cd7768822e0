"""The table of rules, and aggregators by name."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from hardy.config import ConfigError, unknown_name
from hardy.distributed.aggregation.aggregator import Aggregator
from hardy.distributed.aggregation.call import stack_of
from hardy.distributed.aggregation.coordinate import (
    Bulyan,
    MeanAroundMedian,
    Median,
    Phocas,
    SignMajority,
    TrimmedMean,
)
from hardy.distributed.aggregation.dstar import DStar
from hardy.distributed.aggregation.gram_rules import (
    CGE,
    CenteredClip,
    GeometricMedian,
    Krum,
    Mean,
    MoNNA,
    MultiKrum,
)
from hardy.distributed.aggregation.kardam import Kardam
from hardy.distributed.aggregation.preaggregation import build_pre_aggregator
from hardy.distributed.aggregation.rule import Rule
from hardy.distributed.aggregation.subset_rules import (
    CAF,
    Aksel,
    DivideAndConquer,
    MinimumDiameter,
    SmallestVariance,
)
from hardy.distributed.aggregation.trusted import DiverseFL, FLTrust, NormClip, NormScreen, ZenoPlusPlus

RULES: dict[str, type[Rule]] = {
    "aksel": Aksel,
    "bulyan": Bulyan,
    "caf": CAF,
    "centered_clip": CenteredClip,
    "cge": CGE,
    "diversefl": DiverseFL,
    "dnc": DivideAndConquer,
    "dstar": DStar,
    "fltrust": FLTrust,
    "geometric_median": GeometricMedian,
    "kardam": Kardam,
    "krum": Krum,
    "mda": MinimumDiameter,
    "mean": Mean,
    "meamed": MeanAroundMedian,
    "median": Median,
    "monna": MoNNA,
    "multi_krum": MultiKrum,
    "norm_clip": NormClip,
    "norm_screen": NormScreen,
    "phocas": Phocas,
    "sign_majority": SignMajority,
    "smea": SmallestVariance,
    "trimmed_mean": TrimmedMean,
    "zeno_plus_plus": ZenoPlusPlus,
}
"""Every rule by its name."""


def build_rule(name: str, arguments: Mapping[str, Any] | None = None) -> Rule:
    """Return a rule with its settings.

    Raises:
        ConfigError: an unknown rule or setting, or a value that is refused.

    Example:
        >>> build_rule("krum", {"neighbours": "byzfl"})
        Krum(neighbours='byzfl')
    """
    if name not in RULES:
        raise ConfigError(unknown_name(name, "aggregation rule", RULES))
    known = [entry.name for entry in dataclasses.fields(RULES[name])]
    for argument in arguments or {}:
        if argument not in known:
            raise ConfigError(unknown_name(argument, f"setting of the rule {name!r},", known))
    return RULES[name](**(arguments or {}))


def build_aggregator(
    rule: str,
    *,
    num_faulty: int,
    arguments: Mapping[str, Any] | None = None,
    pre: Sequence[str] = (),
    on_excess: Literal["warn", "error"] = "warn",
    seed: int = 0,
    rows_are: Literal["rows", "workers"] = "rows",
    history: float = 0.0,
) -> Aggregator:
    """Return an aggregator by names.

    Args:
        rule: a name of `RULES`.
        num_faulty: f.
        arguments: settings of the rule.
        pre: what is done before, in order: "nnm", "arc", "bucketing:SIZE", "clip:NORM".
        on_excess: see `Aggregator`.
        seed: see `Aggregator`.
        rows_are: see `Aggregator`.
        history: see `Aggregator`.

    Raises:
        ConfigError: an unknown name or a refused value.

    Example:
        >>> import torch
        >>> aggregator = build_aggregator("krum", num_faulty=1, pre=["bucketing:2"])
        >>> aggregator([torch.ones(9, 3)]).vectors
        [tensor([1., 1., 1.])]
    """
    if isinstance(pre, str):
        raise ConfigError(f"pre={pre!r} must be a list, such as [{pre!r}]")
    return Aggregator(
        build_rule(rule, arguments),
        num_faulty=num_faulty,
        pre=[build_pre_aggregator(text) for text in pre],
        on_excess=on_excess,
        seed=seed,
        rows_are=rows_are,
        history=history,
    )


def aggregate(
    rows: Tensor | Sequence[Tensor],
    rule: str = "trimmed_mean",
    *,
    num_faulty: int,
    pre: Sequence[str] = (),
    reference: Tensor | None = None,
    own_row: int | None = None,
    **arguments: Any,
) -> Tensor:
    """Return the vector [D] that a rule makes of rows, a stack [N, D] or a list of vectors.

    Args:
        rows: the rows.
        rule: a name of `RULES`.
        num_faulty: rows that may be anything.
        pre: what is done before, see `build_aggregator`.
        reference: the trusted gradient, [D], for rules that need it.
        own_row: the worker's own, for "monna".
        arguments: settings of the rule.

    Raises:
        ConfigError: an unknown name, a refused value, or too few rows.
        ValueError: no rows, rows that are no vectors of one length on one device, or none that is finite.

    Example:
        >>> import torch
        >>> rows = [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([1e9])]
        >>> aggregate(rows, "median", num_faulty=1)
        tensor([2.])
    """
    aggregator = build_aggregator(rule, num_faulty=num_faulty, pre=pre, arguments=arguments)
    references = None if reference is None else [reference]
    outcome = aggregator([stack_of(rows)], references=references, own_row=own_row)
    if outcome.vectors is None:
        raise ValueError(f"nothing is left to aggregate; rows removed: {list(outcome.removed)}")
    return outcome.vectors[0]
