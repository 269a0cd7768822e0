"""Kardam-style filter: a worker's gradient may not change faster than most workers' gradients do.

Paper: G. Damaskinos et al., "Asynchronous Byzantine Machine Learning", ICML 2018. Letters: g_i(t) row,
K_i = ||g_i(t) - g_i(before)|| / ||theta_t - theta_before||.

Differs from the paper: only its Lipschitz filter, without the one on how often a worker may be heard. How far
the parameters moved is the length of the vectors given out since: with plain SGD the learning rate is a
factor of all K alike. Workers that are seen for the first time are remembered and not used, and the first
step is that of the fallback. Its dampening of late gradients is `sample_weights`. A liar that repeats itself
passes: put "clip" or "arc" before.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hardy.distributed.aggregation.rule import Weighing, WeightRule
from hardy.distributed.aggregation.view import View


@dataclass(frozen=True, kw_only=True)
class Kardam(WeightRule):
    """The mean of rows whose K is at most the (n - f) / n quantile of all workers' latest K."""

    name: ClassVar[str] = "kardam"
    remembers_rows: ClassVar[bool] = True
    names_rows: ClassVar[bool] = True
    uses_sample_weights: ClassVar[bool] = True

    def least_rows(self, num_faulty: int) -> int:
        """Return 3f + 1."""
        return 3 * num_faulty + 1

    def start(self) -> dict[str, Any]:
        """Return how far the vectors have led so far."""
        return {"moved": 0.0}

    def moved(self, state: Mapping[str, Any], norm: float) -> dict[str, Any]:
        """Return the state after a vector of this norm was given out."""
        return {**state, "moved": state["moved"] + norm}

    def weigh(self, view: View, num_faulty: int, state: Mapping[str, Any]) -> Weighing:
        """Return the weights; before any K is known, ask for the fallback."""
        assert view.changes_n is not None, "the rule says that it remembers rows"
        after = dict(state)
        for worker, change in zip(view.workers, view.changes_n.tolist(), strict=True):
            moved = state["moved"] - state.get(f"seen/{worker}", math.inf)
            after[f"seen/{worker}"] = state["moved"]
            # Somewhere between, a vector was given out; NaN where the row before it was forgotten.
            if moved > 0 and not math.isnan(change):
                after[f"latest/{worker}"] = math.sqrt(change) / moved
        latest = sorted(value for key, value in after.items() if key.startswith("latest/"))
        known = [f"latest/{worker}" in after for worker in view.workers]
        if not any(known):
            return Weighing(weights_n=None, instead="fallback", state=after)
        place = max(-(-(view.num_rows - num_faulty) * len(latest) // view.num_rows), 1) - 1
        limit = latest[place]
        kept = [after.get(f"latest/{worker}", math.inf) <= limit for worker in view.workers]
        shares_n = torch.tensor(kept, dtype=torch.float64) * view.sample_weights_n
        accepted = [i for i, share in enumerate(shares_n.tolist()) if share > 0]
        weights_n = shares_n / shares_n.sum() if accepted else None
        return Weighing(weights_n=weights_n, state=after, metrics={"accepted": accepted, "threshold": limit})
