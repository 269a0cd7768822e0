"""What every rule says about itself, and the two kinds of rules: weights of rows, or columns reduced."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hardy.distributed.aggregation.settings import check_settings
from hardy.distributed.aggregation.view import View


@dataclass(frozen=True, kw_only=True)
class Weighing:
    """What a rule of weights decides."""

    weights_n: Tensor | None
    """float64 [n]; of a rule with memory [n + 1], the memory's last. None: see `instead`."""
    instead: Literal["nothing", "reference", "fallback"] = "nothing"
    """Without weights: leave the step out, take the trusted gradient, or ask a rule that needs none."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """What the rule is to be given next time."""
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule and its settings; what changes from step to step is handed in and out."""

    name: ClassVar[str] = ""
    needs_reference: ClassVar[bool] = False
    """Whether it compares with a trusted gradient."""
    needs_gram: ClassVar[bool] = False
    """Whether it needs inner products of rows."""
    is_coordinate: ClassVar[bool] = False
    """Whether it looks at each coordinate alone."""
    is_self_reported: ClassVar[bool] = False
    """Whether squared norms and dots with the trusted gradient are all it needs."""
    has_memory: ClassVar[bool] = False
    """Whether its last vector is one more row the next time."""
    remembers_rows: ClassVar[bool] = False
    """Whether it compares rows with what the same workers sent the last time."""
    names_rows: ClassVar[bool] = False
    """Whether it matters which worker a row is of."""
    uses_sample_weights: ClassVar[bool] = False
    """Whether rows may count by their tokens; else all that are kept count alike."""

    def __post_init__(self) -> None:
        """Check the settings; rules whose settings depend on each other call this first."""
        check_settings(self, section=self.name)

    @property
    def forms_gram(self) -> bool:
        """Whether it needs them of all columns, with these settings."""
        return self.needs_gram

    def least_rows(self, num_faulty: int) -> int:
        """Return the smallest number of rows among which `num_faulty` may be anything."""
        return 2 * num_faulty + 1

    def start(self) -> dict[str, Any]:
        """Return the state before the first step: tensors and plain values."""
        return {}

    def is_feasible(self, num_rows: int, num_faulty: int) -> bool:
        """Return whether so many rows can be worked on in reasonable time."""
        return True

    def moved(self, state: Mapping[str, Any], norm: float) -> Mapping[str, Any]:
        """Return the state after a vector of this norm was given out; only of rules that remember rows."""
        return state


@dataclass(frozen=True, kw_only=True)
class WeightRule(Rule):
    """A rule that gives each row a weight."""

    def weigh(self, view: View, num_faulty: int, state: Mapping[str, Any]) -> Weighing:
        """Return the weights of the rows in view, at least one, of which `num_faulty` may be anything.

        With `num_faulty` 0 any number of rows will do.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class CoordinateRule(Rule):
    """A rule that makes one number of each column."""

    is_coordinate: ClassVar[bool] = True

    def pick(self, view: View, num_faulty: int) -> Tensor | None:
        """Return the places of the rows that are to be reduced; None means all."""
        return None

    def reduce(self, rows_nc: Tensor, num_faulty: int) -> Tensor:
        """Return [c] from [n, c], which may be overwritten and holds no NaN."""
        raise NotImplementedError


def one_hot(place: int, size: int) -> Tensor:
    """Return fp64 zeros but for a 1."""
    weights = torch.zeros(size, dtype=torch.float64)
    weights[place] = 1.0
    return weights


def average_of(places: Tensor, size: int) -> Tensor:
    """Return the weights of the mean of some rows."""
    weights = torch.zeros(size, dtype=torch.float64)
    weights[places] = 1.0 / len(places)
    return weights


def smallest(values_n: Tensor, count: int) -> Tensor:
    """Return the places of the `count` smallest values; of equal ones those that come first."""
    return values_n.argsort(stable=True)[:count]
