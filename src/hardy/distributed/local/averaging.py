"""How the pseudo-gradients of the replicas become one: by weights, and by what bends their mean.

Papers: J. Cheng et al., "EDiT", 2024 (arXiv 2412.07210): the softmax of negative norms. H. Zhu et al.,
"Effectiveness of Distributed Gradient Descent with Local Steps for Overparameterized Models", 2024 (arXiv
2412.07971): where the mean leads.
Letters: N replicas, U units, G norm of a replica's pseudo-gradient D = A - theta, A anchor, w weight, T
temperature, rho share of the steps, S what the outer optimizer is given, a_k pull towards a fixed point.

Differs from the papers: the temperature may be relative to the norms; weights by steps; `Anchored` is
Halpern's iteration, which has the aim of the second paper's modified method and is not its formula.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hardy.config import ConfigError


class Aggregation:
    """A rule that makes one pseudo-gradient of many: it has `weights`, or `needs_all` and `combine`."""

    needs_all: bool = False
    """Whether `combine` is to be called, with everyone's pseudo-gradients, instead of a weighted sum."""

    def weights(self, norms_NU: Tensor, steps_N: Tensor) -> Tensor:
        """Return the weights of the replicas' units: [N, U], float64; no wait for the device.

        Args:
            norms_NU: float64 norms; not finite where a replica's unit is left out.
            steps_N: float64, inner steps of each replica since the last round.

        Returns:
            0 where the norm is not finite; each column sums to 1, or is all 0 where none is finite.

        Raises:
            NotImplementedError: this rule combines.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no weights; it combines all pseudo-gradients of a unit by `combine`"
        )

    def combine(self, D_Nn: Tensor, ok_N: Tensor) -> Tensor:
        """Return S [n] from the pseudo-gradients [N, n] of a unit; rows where `ok_N` is False do not count.

        Raises:
            NotImplementedError: this rule gives weights.
        """
        raise NotImplementedError(
            f"{type(self).__name__} gives weights and does not combine pseudo-gradients itself; only rules "
            f"with needs_all=True do"
        )

    def finish(self, unit: int, S_n: Tensor, anchor_n: Tensor) -> Tensor:
        """Return what the outer optimizer is given for a unit, from the sum [n] and the anchor [n]."""
        return S_n

    def commit(self) -> None:
        """Take note that a round took effect; not called for a round that is left out or done again."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values; equal on all replicas, so a replica that joins is sent them."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take them back."""


class Mean(Aggregation):
    """Every replica that is not left out counts alike: DiLoCo, local SGD.

    Example:
        >>> norms_NU = torch.tensor([[1.0], [9.0], [torch.inf]])
        >>> Mean().weights(norms_NU, torch.ones(3)).flatten().tolist()
        [0.5, 0.5, 0.0]
    """

    def weights(self, norms_NU: Tensor, steps_N: Tensor) -> Tensor:
        """Return 1 / (replicas with a finite norm) for each of them."""
        return _normalised(norms_NU.isfinite().double())


class SoftmaxNorm(Aggregation):
    """EDiT: w = softmax(-G / T) over the replicas that are not left out; a small norm counts more.

    Norms grow with the size of a unit and with learning rate x steps. At T = 1 the average over a large unit
    may be little more than the replica of the smallest norm; `relative` takes T times the mean norm of the
    unit.

    Args:
        temperature: T; infinity is the mean.
        relative: whether T counts in mean norms of the unit. Off: as published.

    Raises:
        ConfigError: a temperature that is not above 0.

    Example:
        >>> norms_NU = torch.tensor([[10.0], [11.0]])
        >>> SoftmaxNorm().weights(norms_NU, torch.ones(2)).flatten().tolist()
        [0.7310585786300049, 0.2689414213699951]
        >>> w_NU = SoftmaxNorm(relative=True).weights(norms_NU, torch.ones(2))
        >>> w_NU.round(decimals=3).flatten().tolist()
        [0.524, 0.476]
    """

    def __init__(self, temperature: float = 1.0, *, relative: bool = False) -> None:
        if not temperature > 0:
            raise ConfigError(
                f"temperature={temperature} must be above 0; towards 0 the smallest norm counts alone, "
                f"towards infinity all count alike"
            )
        self.temperature, self.relative = temperature, relative

    def weights(self, norms_NU: Tensor, steps_N: Tensor) -> Tensor:
        """Return the softmax of each column."""
        ok_NU = norms_NU.isfinite()
        norms_NU = torch.where(ok_NU, norms_NU.double(), 0.0)
        if self.relative:
            # By the largest first: a mean of huge norms would overflow.
            norms_NU = norms_NU / _one_for_zero(norms_NU.amax(0))
            mean_U = norms_NU.sum(0) / ok_NU.sum(0).clamp(min=1)
            norms_NU = norms_NU / _one_for_zero(mean_U)
        smallest_U = torch.where(ok_NU, norms_NU, torch.inf).amin(0)
        # The smallest norm gives exp(0) at any temperature, so each sum is at least 1.
        powers_NU = torch.exp(-(norms_NU - smallest_U) / self.temperature)
        return _normalised(torch.where(ok_NU, powers_NU, 0.0))


class StepWeighted(Aggregation):
    """Replicas that did more steps count more: w = (1 - rho) w + rho steps / total, for rounds by time.

    Args:
        share: rho, in [0, 1].
        base: gives the other part of the weights, and all the rest; none is `Mean`.

    Raises:
        ConfigError: a share outside [0, 1], or a base that gives no weights.

    Example:
        >>> norms_NU, steps_N = torch.ones(2, 1), torch.tensor([30.0, 10.0])
        >>> StepWeighted(0.5).weights(norms_NU, steps_N).flatten().tolist()
        [0.625, 0.375]
    """

    def __init__(self, share: float = 0.5, base: Aggregation | None = None) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"share={share} of the steps in the weights must be between 0 and 1")
        self.share, self.base = share, base or Mean()
        if self.base.needs_all:
            raise ConfigError(
                f"{type(self.base).__name__} combines pseudo-gradients without weights, so steps cannot be "
                f"mixed into them; use it without StepWeighted"
            )

    def weights(self, norms_NU: Tensor, steps_N: Tensor) -> Tensor:
        """Return the mixture; where the replicas in question did no step at all, the base's weights."""
        base_NU = self.base.weights(norms_NU, steps_N)
        steps_NU = torch.where(norms_NU.isfinite(), steps_N.double().unsqueeze(1), 0.0)
        total_U = steps_NU.sum(0)
        mixed_NU = (1 - self.share) * base_NU + self.share * steps_NU / _one_for_zero(total_U)
        return _normalised(torch.where(total_U > 0, mixed_NU, base_NU))

    def finish(self, unit: int, S_n: Tensor, anchor_n: Tensor) -> Tensor:
        """Do as the base."""
        return self.base.finish(unit, S_n, anchor_n)

    def commit(self) -> None:
        """Do as the base."""
        self.base.commit()

    def state_dict(self) -> dict[str, Any]:
        """Return the base's."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Give it to the base."""
        self.base.load_state_dict(state_dict)


class Anchored(Aggregation):
    """Halpern's iteration: after each round a pull, ever weaker, towards a point that stays the same.

    For linear probes and heads that can fit all data, with (nearly) exact local solves: A goes to the
    solution nearest to the fixed point, where the plain mean stops at any. The outer optimizer must be plain:
    lr 1, no momentum. With avg = A - D and x the fixed point, A becomes x + (1 - a_k) (avg - x), where
    a_k = 1 / (k + 1) and k = 1 in the first round; as a pseudo-gradient, S = a_k (A - x) + (1 - a_k) D.

    Args:
        anchors: the fixed point: `zeros`, or `initial` for A of the first round (kept, one tensor a unit).
        base: gives D; none is `Mean`.

    Raises:
        ConfigError: other anchors.

    Example:
        >>> rule, A = Anchored("zeros"), torch.tensor([4.0])
        >>> A - rule.finish(0, torch.tensor([1.0]), A)  # half way from 0 to A - D = 3
        tensor([1.5000])
    """

    def __init__(self, anchors: Literal["zeros", "initial"], base: Aggregation | None = None) -> None:
        if anchors not in ("zeros", "initial"):
            raise ConfigError(
                f"anchors={anchors!r} must be 'zeros' (heads, probes) or 'initial' (fine-tuning)"
            )
        self.anchors, self.base = anchors, base or Mean()
        self.needs_all = self.base.needs_all
        self._num_rounds = 0
        self._fixed: dict[int, Tensor] = {}

    @property
    def pull(self) -> float:
        """Return a_k of the coming round."""
        return 1 / (self._num_rounds + 2)

    def weights(self, norms_NU: Tensor, steps_N: Tensor) -> Tensor:
        """Return the base's."""
        return self.base.weights(norms_NU, steps_N)

    def combine(self, D_Nn: Tensor, ok_N: Tensor) -> Tensor:
        """Return the base's."""
        return self.base.combine(D_Nn, ok_N)

    def finish(self, unit: int, S_n: Tensor, anchor_n: Tensor) -> Tensor:
        """Return S [n] bent towards the fixed point, which the first call for a unit may set; [n]."""
        S_n = self.base.finish(unit, S_n, anchor_n)
        away_n = anchor_n
        if self.anchors == "initial":
            if unit not in self._fixed:
                self._fixed[unit] = anchor_n.detach().clone()
            self._fixed[unit] = self._fixed[unit].to(anchor_n.device)
            away_n = anchor_n - self._fixed[unit]
        return self.pull * away_n + (1 - self.pull) * S_n

    def commit(self) -> None:
        """Count a round."""
        self._num_rounds += 1
        self.base.commit()

    def state_dict(self) -> dict[str, Any]:
        """Return the rounds so far, the fixed points as `UNIT/fixed`, and the base's state as `base.NAME`."""
        fixed = {f"{unit}/fixed": tensor.clone() for unit, tensor in self._fixed.items()}
        base = {_renamed(key, add="base."): value for key, value in self.base.state_dict().items()}
        return {"anchors": self.anchors, "rounds": self._num_rounds, **fixed, **base}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take it back.

        Raises:
            ConfigError: it was saved with other anchors.
        """
        if state_dict["anchors"] != self.anchors:
            raise ConfigError(
                f"the saved run was pulled towards anchors={state_dict['anchors']!r}, this one towards "
                f"{self.anchors!r}; set it to {state_dict['anchors']!r} to go on"
            )
        self._num_rounds = int(state_dict["rounds"])
        own = {key: value for key, value in state_dict.items() if key.endswith("/fixed")}
        self._fixed = {int(key.partition("/")[0]): tensor.clone() for key, tensor in own.items()}
        others = {key for key in state_dict if key.rpartition("/")[2].startswith("base.")}
        self.base.load_state_dict({_renamed(key, drop="base."): state_dict[key] for key in others})


def _normalised(shares_NU: Tensor) -> Tensor:
    """Return each column divided by its sum; a column of zeros stays."""
    return shares_NU / _one_for_zero(shares_NU.sum(0))


def _one_for_zero(x_U: Tensor) -> Tensor:
    """Return `x_U` as a divisor: 1 where it is 0."""
    return torch.where(x_U == 0, 1.0, x_U)


def _renamed(key: str, *, add: str = "", drop: str = "") -> str:
    """Return `UNIT/NAME`, or `NAME`, with the beginning of NAME changed."""
    home, slash, name = key.rpartition("/")
    return home + slash + add + name.removeprefix(drop)
