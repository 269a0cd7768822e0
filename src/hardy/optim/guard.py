"""Clipping and skipping that never wait for the device: by a limit and by the gradient's own history.

Paper: "Adaptive Optimization for Enhanced Efficiency in LLM Training" (arXiv 2412.04718) says no more than L2
clipping at a threshold. The history and the skipping are hardy's reading of it; `tensor` follows AdaGC (arXiv
2502.11034), `zscore` ZClip (arXiv 2504.02507), from memory of their formulas. Every constant is ours.
Letters: n norm, lim limit, c = min(1, lim / n) clip coefficient, gam average of the norms after clipping,
mu and sigma the same average and the spread around it, f factor,
beta decay, b = min(beta, count / (count + 1)).

    global  lim = min(max_norm, f gam);  gam = b gam + (1 - b) c n
    zscore  lim = mu + f^2 sigma^2 / (n - mu) where n is above mu + f sigma;  mu as gam, sigma by its weights
    tensor  c_i = min(1, f gam_i / n_i), then c for what is left;  gam_i = beta gam_i + (1 - beta) c c_i n_i

History counts from `count` = warm-up on; until then tensor takes the smallest c n_i. A step whose norm is not
finite, or a spike, changes nothing here but the counters.
Differs from the page of AdaGC: max_norm holds after the warm-up too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hardy.config import ConfigError
from hardy.optim.config import GuardConfig
from hardy.optim.gradients import nonfinite_flags

HISTORY_DEFAULTS = {
    "off": (2.0, 0.98, 50),
    "global": (2.0, 0.98, 50),
    "tensor": (1.05, 0.98, 100),
    "zscore": (2.5, 0.97, 50),
}
"""Factor, beta and warm-up steps of each history, where the config leaves them out."""
SMALLEST_SPREAD = 0.05
"""Least sigma as a share of mu: norms that never varied would otherwise allow no variation ever after."""
NAMED_OFFENDERS = 5
LARGEST_SCALE = 2.0**64
"""Gradients that stay zero would double a loss scale up to infinity, from where no halving leads back."""


class NonFiniteGradientError(RuntimeError):
    """Too many steps in a row were skipped; the text names the gradients that are not finite."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to be done with the gradients of a step; tensors on the device."""

    divisor: Tensor
    """0-d, float64: gradients are to be divided by it."""
    found_inf: Tensor
    """0-d, fp32: 1 where the step must be left out, else 0."""
    clipped: Tensor
    """0-d, bool: whether anything is made smaller."""
    factors: Tensor | None = None
    """[parameters], float64, to multiply each gradient by besides; only with the history `tensor`."""

    @property
    def grad_scale(self) -> Tensor:
        """The divisor as optimizers take it, fp32."""
        return self.divisor.float()

    @property
    def multiplier(self) -> Tensor:
        """What gradients are to be multiplied by in all, 0-d or [parameters], float64."""
        return 1 / self.divisor if self.factors is None else self.factors / self.divisor


@dataclass(frozen=True, kw_only=True)
class GuardCounts:
    """What a guard did so far, on the host."""

    n_clipped: int
    n_skipped: int
    run: int
    """Skipped steps in a row up to now."""


class LossScale:
    """The factor that keeps fp16 gradients representable: doubles after good steps, halves on an overflow.

    Multiply the loss by `value` and hand this object to `GradGuard.update`, which divides the norm by it,
    folds it into the divisor and moves it. As torch's GradScaler, but without waiting for the device.

    Args:
        initial: first factor.
        growth_steps: steps without overflow before it doubles.
        device: of the gradients.
    """

    def __init__(
        self, *, initial: float = 2.0**16, growth_steps: int = 2000, device: torch.device | str = "cpu"
    ) -> None:
        self.growth_steps = growth_steps
        self.value = torch.full((), initial, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, finite: Tensor) -> None:
        """Move by whether the step's gradients were finite (0-d, bool)."""
        good = torch.where(finite, self.good_steps + 1, 0)
        grows = good >= self.growth_steps
        self.value.mul_(torch.where(finite, 1.0 + grows, 0.5)).clamp_(max=LARGEST_SCALE)
        self.good_steps.copy_(torch.where(grows, 0, good))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the live tensors."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take them back, in place."""
        for key, mine in self.state_dict().items():
            mine.copy_(state_dict[key])


class GradGuard:
    """Decides once per step, after gradients are reduced, how they are clipped and whether the step is made.

    Args:
        config: which history; None means `global` with its defaults.
        max_norm: limit that holds besides; None clips by history alone.
        max_consecutive_skips: skipped steps in a row at which `check` raises.
        num_tensors: gradients whose norms `update` will get; needed for the history `tensor` only.
        device: of the gradients.

    Raises:
        ConfigError: `max_norm` is not above 0.

    Example:
        >>> guard = GradGuard(max_norm=2.0)
        >>> verdict = guard.update(torch.tensor(8.0))
        >>> verdict.grad_scale, verdict.found_inf
        (tensor(4.), tensor(0.))
    """

    def __init__(
        self,
        config: GuardConfig | None = None,
        *,
        max_norm: float | None = 1.0,
        max_consecutive_skips: int = 10,
        num_tensors: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ConfigError(
                f"max_norm must be above 0 or None, got {max_norm}; None clips by history alone"
            )
        config = config or GuardConfig(history="global")
        factor, beta, warmup_steps = HISTORY_DEFAULTS[config.history]
        self.history, self.spike_skip = config.history, config.spike_skip
        self.factor = factor if config.history_factor is None else config.history_factor
        self.beta = beta if config.history_beta is None else config.history_beta
        given = config.history_warmup_steps
        self.warmup_steps = warmup_steps if given is None else given
        self.max_norm, self.max_consecutive_skips = max_norm, max_consecutive_skips
        # float64: a handful of numbers, and an average of many steps should not gather roundings.
        self._average = torch.zeros((), dtype=torch.float64, device=device)
        self._variance = torch.zeros_like(self._average)
        self._averages = torch.full((num_tensors,), torch.inf, dtype=torch.float64, device=device)
        self._count, self._n_clipped, self._n_skipped, self._run = (
            torch.zeros((), dtype=torch.int64, device=device) for _ in range(4)
        )

    @torch.no_grad()
    def update(self, norms: Tensor, *, loss_scale: LossScale | None = None) -> Verdict:
        """Look at a step's gradients and say what is to be done; waits for nothing.

        Args:
            norms: L2 norm of the whole gradient, 0-d, or of each tensor, [parameters] (`tensor_norms`), which
                the history `tensor` needs; equal on all workers that share the model.
            loss_scale: what the loss was multiplied by; moved here.
        """
        if self.history == "tensor" and norms.shape != self._averages.shape:
            raise ValueError(
                f"optim.guard.history='tensor' needs the norm of each of {self._averages.numel()} tensors, "
                f"got shape {tuple(norms.shape)}; pass tensor_norms(parameters)"
            )
        norms = norms.to(torch.float64)
        scale = torch.ones_like(self._average)
        if loss_scale is not None:
            scale = scale * loss_scale.value
            norms = norms / scale
        total = torch.linalg.vector_norm(norms)
        finite = total.isfinite()
        if loss_scale is not None:
            loss_scale.update(finite)
        ready = (self._count >= self.warmup_steps) & (self._average > 0)
        if self.spike_skip is not None:
            finite = finite & ~(ready & (total > self.spike_skip * self._average))
        norms, total = torch.where(finite, norms, 0.0), torch.where(finite, total, 0.0)
        factors = self._tensor_factors(norms) if self.history == "tensor" else None
        left = total if factors is None else torch.linalg.vector_norm(norms * factors)
        limit = self._limit(left, ready)
        divisor = torch.where(left > limit, left / limit, 1.0)
        clipped = left > limit if factors is None else (left > limit) | (factors < 1).any()
        self._learn(torch.minimum(left, limit), None if factors is None else norms * factors / divisor)
        self._n_clipped.add_(clipped)
        self._n_skipped.add_(~finite)
        self._run.copy_(torch.where(finite, 0, self._run + 1))
        return Verdict(divisor=divisor * scale, found_inf=(~finite).float(), clipped=clipped, factors=factors)

    def check(self, named_gradients: Iterable[tuple[str, Tensor | None]] = ()) -> GuardCounts:
        """Read the counters, which waits for the device: do it where metrics are read anyway.

        Args:
            named_gradients: the gradients of the last step, still there, to name those that are not finite.

        Raises:
            NonFiniteGradientError: `max_consecutive_skips` steps in a row were skipped.
        """
        n_clipped, n_skipped, run = torch.stack([self._n_clipped, self._n_skipped, self._run]).tolist()
        if run >= self.max_consecutive_skips:
            named = {name: gradient for name, gradient in named_gradients if gradient is not None}
            flags = nonfinite_flags(list(named.values())).tolist()
            names = [name for name, is_bad in zip(named, flags, strict=True) if is_bad][:NAMED_OFFENDERS]
            spikes = "" if self.spike_skip is None else f", or raise spike_skip={self.spike_skip:g}"
            raise NonFiniteGradientError(
                f"{run} steps in a row were skipped (max_consecutive_skips={self.max_consecutive_skips}); "
                f"NaN or Inf is in the gradient of {', '.join(names) or 'no parameter check() was given'}; "
                f"lower the learning rate, or look at the data{spikes}"
            )
        return GuardCounts(n_clipped=n_clipped, n_skipped=n_skipped, run=run)

    def state_dict(self) -> dict[str, Any]:
        """Return the live tensors, and which history they belong to."""
        return {"history": self.history, **self._tensors()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back, in place.

        Raises:
            ConfigError: the state is of another history or number of tensors.
        """
        mine, saved = self._tensors(), state_dict.get("history")
        if saved != self.history:
            raise ConfigError(
                f"the guard's state is of history {saved!r}, the run has optim.guard.history="
                f"{self.history!r}; set it back, or start without the state"
            )
        for key, value in mine.items():
            if value.shape != state_dict[key].shape:
                raise ConfigError(
                    f"the guard's state {key} is of {state_dict[key].numel()} tensors, the run has "
                    f"{value.numel()}; build the optimizer as for the saved run, or start without the state"
                )
            value.copy_(state_dict[key])

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"count": self._count, "average": self._average}
        tensors |= {"n_clipped": self._n_clipped, "n_skipped": self._n_skipped, "run": self._run}
        if self.history == "zscore":
            tensors["variance"] = self._variance
        if self.history == "tensor":
            tensors["averages"] = self._averages
        return tensors

    def _tensor_factors(self, norms: Tensor) -> Tensor:
        """Return c_i: below 1 where a tensor's norm stands above f gam_i."""
        limits = self.factor * self._averages
        # An average is infinite until its tensor had a gradient other than zero.
        above = (self._count >= self.warmup_steps) & (norms > limits)
        return torch.where(above, limits / norms, 1.0)

    def _limit(self, norm: Tensor, ready: Tensor) -> Tensor:
        """Return the largest norm that is left alone, or the norm to cut to, 0-d."""
        limit = torch.full_like(norm, torch.inf if self.max_norm is None else self.max_norm)
        if self.history == "global":
            return torch.where(ready, torch.minimum(limit, self.factor * self._average), limit)
        if self.history == "zscore":
            spread = torch.maximum(self._variance.sqrt(), SMALLEST_SPREAD * self._average)
            above = norm - self._average
            is_far = ready & (above > self.factor * spread)
            cut = self._average + (self.factor * spread) ** 2 / above
            return torch.where(is_far, torch.minimum(limit, cut), limit)
        return limit

    def _learn(self, kept: Tensor, each: Tensor | None) -> None:
        """Take the clipped norms, of all and of each, into the averages; a norm of 0 teaches nothing."""
        counts = kept > 0
        count = self._count.double()
        decay = torch.clamp(count / (count + 1), max=self.beta)
        away = kept - self._average
        # Weighted mean and variance in one pass (West 1979); exact for the running mean of the first steps.
        self._variance.copy_(
            torch.where(counts, decay * (self._variance + (1 - decay) * away**2), self._variance)
        )
        self._average.copy_(torch.where(counts, decay * self._average + (1 - decay) * kept, self._average))
        if each is not None:
            mean = self.beta * self._averages + (1 - self.beta) * each
            is_new = (self._count < self.warmup_steps) | self._averages.isinf()
            learned = torch.where(is_new, torch.minimum(self._averages, each), mean)
            self._averages.copy_(torch.where(each > 0, learned, self._averages))
        self._count.add_(counts)
