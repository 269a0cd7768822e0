"""Which replica's unit is left out of a round: norms that are not finite, or far above what they used to be.

Paper: J. Cheng et al., "EDiT", 2024 (arXiv 2412.07210), its anomaly elimination by z-test.
Letters: N replicas, U units, G norm of a replica's pseudo-gradient, mu, v, c running mean, variance and
number of accepted norms, z = (G - mu) / sigma, delta threshold, alpha rate of the averages, a their weight of
one norm.

    accepted  c += 1,  a = max(alpha, 1 / c),  d = G - mu,  mu += a d,  v = (1 - a) (v + a d^2)

For c <= 1 / alpha these are the mean and the population variance. A small norm is never an anomaly.
Differs from the paper: the first norms need no correction; sigma is at least a share of mu; a lasting jump of
the level, which the statistics of accepted norms would never learn, is accepted after three rounds.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from hardy.config import ConfigError

LOCK_IN_ROUNDS = 3
"""Consecutive rounds in which replicas flag a unit together before its statistics start anew."""
COUNTERS = ("flagged", "non_finite", "resets")
"""Own units left out, those of them whose norm was not finite, and statistics that started anew."""


class AnomalyGuard(Protocol):
    """Says which units of its own replica are to be left out. Nothing waits for the device."""

    def flags(self, norms_U: Tensor) -> Tensor:
        """Return which units to leave out, bool [U], from this replica's norms; changes nothing."""
        ...

    def observe(self, norms_U: Tensor, flags_NU: Tensor, all_norms_NU: Tensor) -> None:
        """Learn from a round that took effect.

        Args:
            norms_U: this replica's norms, for which `flags` was asked; not finite ones stand as they are.
            flags_NU: what all replicas flagged, bool.
            all_norms_NU: norms of all replicas, before flagged ones were made infinite.
        """
        ...

    def counters(self) -> dict[str, Tensor]:
        """Return the sums so far under the names of `COUNTERS`, 0-d int64."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return tensors of this replica; the others' differ."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take them back."""
        ...


class Finite:
    """Leaves out what is not finite, nothing else.

    Example:
        >>> Finite().flags(torch.tensor([1.0, torch.nan, 1e30, torch.inf])).tolist()
        [False, True, False, True]
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(len(COUNTERS), dtype=torch.int64)

    def flags(self, norms_U: Tensor) -> Tensor:
        """Return where the norm is not finite."""
        return ~norms_U.isfinite()

    def observe(self, norms_U: Tensor, flags_NU: Tensor, all_norms_NU: Tensor) -> None:
        """Count."""
        bad = self.flags(norms_U).sum()
        self._counts = self._counts.to(norms_U.device) + torch.stack([bad, bad, torch.zeros_like(bad)])

    def counters(self) -> dict[str, Tensor]:
        """Return the sums so far."""
        return dict(zip(COUNTERS, self._counts.clone(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the counters."""
        return {"counts": self._counts.clone()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take them back."""
        self._counts = state_dict["counts"].clone()


class ZTest:
    """Leaves out a norm that is not finite, or more than `delta` spreads above the mean of accepted ones.

    Where at least half of the replicas flag the same unit with finite norms in three consecutive rounds, the
    level itself has moved (another learning rate, batch size, unfrozen layers): statistics of that unit start
    anew on all replicas. Of several replicas at least two must agree, so one bad replica stays out for ever,
    of two also.

    Args:
        num_units: U.
        delta: z above which a norm is an anomaly.
        alpha: weight of one norm once 1 / alpha of them are known.
        warmup_rounds: accepted norms before z is looked at.
        relative_floor: least sigma as a share of mu: norms that never varied would allow no variation.

    Raises:
        ConfigError: a number out of range.

    Example:
        >>> guard = ZTest(num_units=1, warmup_rounds=2)
        >>> for norm in (1.0, 1.2):
        ...     norms_U = torch.tensor([norm], dtype=torch.float64)
        ...     guard.observe(norms_U, guard.flags(norms_U).unsqueeze(0), norms_U.unsqueeze(0))
        >>> [guard.flags(torch.tensor([norm])).item() for norm in (0.0, 1.3, 9.0)]
        [False, False, True]
    """

    def __init__(
        self,
        *,
        num_units: int,
        delta: float = 3.0,
        alpha: float = 0.02,
        warmup_rounds: int = 20,
        relative_floor: float = 0.05,
    ) -> None:
        if not delta > 0:
            raise ConfigError(
                f"delta={delta} spreads must be above 0; infinity leaves out non-finite norms only"
            )
        if not 0 < alpha <= 1:
            raise ConfigError(f"alpha={alpha}, the weight of one norm in the averages, must be in (0, 1]")
        if warmup_rounds < 1:
            raise ConfigError(
                f"warmup_rounds={warmup_rounds} must be at least 1: without a norm there is no z"
            )
        if not relative_floor >= 0:
            raise ConfigError(f"relative_floor={relative_floor} of the mean norm must be at least 0")
        self.num_units, self.delta, self.alpha = num_units, delta, alpha
        self.warmup_rounds, self.relative_floor = warmup_rounds, relative_floor
        self._mean_U = torch.zeros(num_units, dtype=torch.float64)
        self._variance_U = torch.zeros_like(self._mean_U)
        self._accepted_U = torch.zeros(num_units, dtype=torch.int64)
        self._streak_U = torch.zeros_like(self._accepted_U)
        self._counts = torch.zeros(len(COUNTERS), dtype=torch.int64)

    def flags(self, norms_U: Tensor) -> Tensor:
        """Return where the norm is not finite, or z is above delta.

        Raises:
            ValueError: other than U norms.
        """
        if norms_U.shape != (self.num_units,):
            raise ValueError(
                f"norms of shape {list(norms_U.shape)} for statistics of {self.num_units} units; each set of "
                f"units that meets on its own needs its own guard"
            )
        self._move_to(norms_U.device)
        spread_U = torch.maximum(self._variance_U.sqrt(), self.relative_floor * self._mean_U)
        z_U = (norms_U.double() - self._mean_U) / spread_U.clamp(min=torch.finfo(torch.float64).tiny)
        return ~norms_U.isfinite() | ((self._accepted_U >= self.warmup_rounds) & (z_U > self.delta))

    def observe(self, norms_U: Tensor, flags_NU: Tensor, all_norms_NU: Tensor) -> None:
        """Learn the accepted norms, and start anew where a jump has lasted."""
        flagged_U, finite_U = self.flags(norms_U), norms_U.isfinite()
        together_U = (flags_NU & all_norms_NU.isfinite()).sum(0)
        enough = max((len(flags_NU) + 1) // 2, min(len(flags_NU), 2))
        self._streak_U = torch.where(together_U >= enough, self._streak_U + 1, 0)
        anew_U = self._streak_U >= LOCK_IN_ROUNDS
        self._streak_U = torch.where(anew_U, 0, self._streak_U)
        self._accepted_U = torch.where(anew_U, 0, self._accepted_U)
        self._learn(norms_U.double(), finite_U & (~flagged_U | anew_U))
        self._counts += torch.stack([flagged_U.sum(), (~finite_U).sum(), anew_U.sum()])

    def _learn(self, norms_U: Tensor, accepted_U: Tensor) -> None:
        """Take `norms_U` into the statistics where accepted."""
        self._accepted_U = self._accepted_U + accepted_U
        rate_U = (1 / self._accepted_U.clamp(min=1).double()).clamp(min=self.alpha)
        gap_U = norms_U - self._mean_U
        variance_U = (1 - rate_U) * (self._variance_U + rate_U * gap_U.square())
        self._variance_U = torch.where(accepted_U, variance_U, self._variance_U)
        self._mean_U = torch.where(accepted_U, self._mean_U + rate_U * gap_U, self._mean_U)

    def counters(self) -> dict[str, Tensor]:
        """Return the sums so far."""
        return dict(zip(COUNTERS, self._counts.clone(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return mean, variance, accepted and streak, each [U], and the counters."""
        return {
            "mean": self._mean_U.clone(),
            "variance": self._variance_U.clone(),
            "accepted": self._accepted_U.clone(),
            "streak": self._streak_U.clone(),
            "counts": self._counts.clone(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take them back.

        Raises:
            ConfigError: they belong to another number of units.
        """
        if state_dict["mean"].shape != (self.num_units,):
            raise ConfigError(
                f"the saved statistics are of {len(state_dict['mean'])} units, the model has "
                f"{self.num_units}; go on with the same units, or start from the anchor with fresh statistics"
            )
        self._mean_U, self._variance_U = state_dict["mean"].clone(), state_dict["variance"].clone()
        self._accepted_U, self._streak_U = state_dict["accepted"].clone(), state_dict["streak"].clone()
        self._counts = state_dict["counts"].clone()

    def _move_to(self, device: torch.device) -> None:
        """Keep everything where the norms are."""
        if self._mean_U.device != device:
            self._mean_U, self._variance_U = self._mean_U.to(device), self._variance_U.to(device)
            self._accepted_U, self._streak_U = self._accepted_U.to(device), self._streak_U.to(device)
            self._counts = self._counts.to(device)
