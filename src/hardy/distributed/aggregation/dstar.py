"""dSTAR-style filter: a row counts when it agrees with the gradient of a small trusted batch.

Paper: J. Yan, P. Chaudhari, L. Kleinrock, "dSTAR: Straggler Tolerant and Byzantine Resilient Distributed
SGD", 2024 (arXiv 2412.07151). Letters: g_i row, g_v trusted gradient, n_i = ||g_i||^2, p_i = <g_i, g_v>,
n_v = ||g_v||^2, c_i factor, delta_i = ||c_i g_i - g_v|| / ||g_v||, m_t lower median of delta, H its history,
T_w warm-up, A accepted rows.

Differs from the paper: a reconstruction. The paper accepts a row by its normalised distance, below a
historical median, and by its dot product, after a warm-up; the normalisation, what the history holds, the
bound of the dot product and all numbers are ours, and options. Scaling rows to the trusted norm is ours: the
plain reading (scale "none", threshold "current") lets an attacker in who knows the trusted gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hardy.config import NonNegativeFloat, NonNegativeInt, PositiveInt
from hardy.distributed.aggregation.rule import Weighing
from hardy.distributed.aggregation.trusted import MOST_STRETCH, TrustedRule, stretches
from hardy.distributed.aggregation.view import View

SMALL_DELTA = 0.2
"""Below this, delta is the difference of nearly equal numbers and is formed directly."""


@dataclass(frozen=True, kw_only=True)
class DStar(TrustedRule):
    """Keeps rows whose distance to the trusted gradient is at most the threshold and whose dot is above 0.

    Args:
        scale: "clip" shortens rows to the trusted norm, "unit" gives them that norm, "none" leaves them.
        threshold: after the warm-up: "history" is the lower median of the last medians, "current" this
            step's, "min" the smaller of this step's and (1 + `slack`) times that of history; "none" accepts
            any distance.
        window: W, medians that history holds.
        warm_up_steps: T_w, steps at which the threshold is this step's median.
        slack: see `threshold`.
        dot_test: "positive" accepts p_i > 0 only, "none" any.
        empty_limit: after so many empty steps in a row the threshold is this step's median, once.
    """

    name: ClassVar[str] = "dstar"
    uses_sample_weights: ClassVar[bool] = True
    scale: Literal["clip", "unit", "none"] = "clip"
    threshold: Literal["history", "current", "min", "none"] = "history"
    window: PositiveInt = 20
    warm_up_steps: NonNegativeInt = 10
    slack: NonNegativeFloat = 0.1
    dot_test: Literal["positive", "none"] = "positive"
    empty_limit: PositiveInt = 5

    def least_rows(self, num_faulty: int) -> int:
        """Return 2f + 1: then the median lies between two honest distances."""
        return 2 * num_faulty + 1

    def start(self) -> dict[str, Any]:
        """Return t, H (oldest first) and the empty steps in a row and in all."""
        history = torch.zeros(0, dtype=torch.float64)
        return {"steps": 0, "history": history, "empties_in_a_row": 0, "empties": 0}

    def weigh_against(self, view: View, state: Mapping[str, Any]) -> Weighing:
        """Return the weights of the accepted rows."""
        factors_n = self.factors(view)
        delta_n = self.distances(view, factors_n)
        median = delta_n.sort().values[(view.num_rows - 1) // 2]
        history = torch.cat([state["history"], median[None]])[-self.window :]
        is_reset = state["empties_in_a_row"] >= self.empty_limit
        threshold = median if is_reset else self._threshold(median, history, state["steps"])
        accepted_n = delta_n <= threshold
        if self.dot_test == "positive":
            accepted_n = accepted_n & (view.trusted_dots_n > 0)
        is_empty = not bool(accepted_n.any())
        after = {
            "steps": state["steps"] + 1,
            "history": history,
            "empties_in_a_row": state["empties_in_a_row"] + 1 if is_empty and not is_reset else 0,
            "empties": state["empties"] + is_empty,
        }
        metrics = {
            "delta": delta_n.tolist(),
            "delta_median": median.item(),
            "threshold": float(threshold),
            "threshold_reset": float(is_reset),
            "factor_mean": factors_n.mean().item(),
        }
        return self.average(view, accepted_n, factors_n, state=after, metrics=metrics)

    def factors(self, view: View) -> Tensor:
        """Return c."""
        ratios_n = stretches(view)
        if self.scale == "none":
            ratios_n = torch.ones_like(ratios_n)
        elif self.scale == "clip":
            ratios_n = ratios_n.clamp(max=1.0)
        return torch.where(ratios_n < MOST_STRETCH, ratios_n, 1.0)

    def distances(self, view: View, factors_n: Tensor) -> Tensor:
        """Return delta; small ones directly, unless only what workers report is known."""
        n_v = view.reference_square
        squares_n = factors_n.square() * view.squares_n - 2 * factors_n * view.trusted_dots_n + n_v
        delta_n = (squares_n / n_v).clamp(min=0).sqrt()
        small = (delta_n < SMALL_DELTA).nonzero()[:, 0]
        if len(small) and view.rows is not None:
            exact = view.rows.residual_squares(factors_n[small, None] * view.mix_nR[small])
            delta_n[small] = (exact / n_v).sqrt()
        return delta_n

    def _threshold(self, median: Tensor, history: Tensor, num_steps: int) -> Tensor:
        if self.threshold == "none":
            return torch.full_like(median, torch.inf)
        if num_steps < self.warm_up_steps or self.threshold == "current":
            return median
        of_history = history.sort().values[(len(history) - 1) // 2]
        if self.threshold == "history":
            return of_history
        return torch.minimum(median, (1 + self.slack) * of_history)
