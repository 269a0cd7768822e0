"""How far the replicas drift apart between rounds, and whether the average still rests on several of them.

Papers: H. Zhu et al., "Effectiveness of Distributed Gradient Descent with Local Steps for Overparameterized
Models", 2024 (arXiv 2412.07971); J. Cheng et al., "EDiT", 2024 (arXiv 2412.07210). The measures are ours.
Letters: N replicas, n elements, U units, D pseudo-gradient of a replica, p or w its weight (columns sum to
1), avg = sum of p D. A replica of weight 0 is not looked at, whatever its D holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hardy.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Measures of one exchange; 0-d float64 tensors on the device. Cosines with a zero vector are 0."""

    mean_cosine: Tensor
    """Of the cosines between D and avg, over the replicas that count."""
    min_cosine: Tensor
    """Smallest cosine between the D of two of them; 1 where only one counts."""
    dispersion: Tensor
    """sum of p ||D - avg||^2 / ||avg||^2: 0 where all agree, infinite where they cancel."""
    norm_ratio: Tensor
    """Largest ||D|| over the smallest; 1 where all are 0."""


@torch.no_grad()
def drift(D_Nn: Tensor, weight_N: Tensor) -> Drift:
    """Return how far the pseudo-gradients of one unit, or of all as one vector, lie apart.

    Args:
        D_Nn: their rows; also the negative of how far each replica went.
        weight_N: p.

    Example:
        >>> apart = drift(torch.tensor([[4.0, 3.0], [4.0, -3.0]]), torch.tensor([0.5, 0.5]))
        >>> apart.mean_cosine.item(), round(apart.min_cosine.item(), 9), apart.dispersion.item()
        (0.8, 0.28, 0.5625)
    """
    counts_N, weight_N = weight_N > 0, weight_N.double()
    D_Nn = torch.where(counts_N.unsqueeze(1), D_Nn.double(), 0.0)
    avg_n = weight_N @ D_Nn
    norm_N, norm_avg = D_Nn.norm(dim=1), avg_n.norm()
    cosine_N = cosine_to_mean(D_Nn @ avg_n, norm_N, norm_avg)
    unit_Nn = D_Nn / torch.where(norm_N > 0, norm_N, 1.0).unsqueeze(1)
    pairs_NN = (
        counts_N.unsqueeze(0)
        & counts_N.unsqueeze(1)
        & ~torch.eye(len(D_Nn), dtype=torch.bool, device=D_Nn.device)
    )
    spread = weight_N @ (D_Nn - avg_n).square().sum(1)
    least, most = torch.where(counts_N, norm_N, torch.inf).amin(), norm_N.amax()
    return Drift(
        mean_cosine=torch.where(counts_N, cosine_N, 0.0).sum() / counts_N.sum().clamp(min=1),
        min_cosine=torch.where(pairs_NN, unit_Nn @ unit_Nn.T, 1.0).amin(),
        dispersion=torch.where(spread > 0, spread / norm_avg.square(), 0.0),
        norm_ratio=torch.where(most > 0, most / least, 1.0),
    )


def cosine_to_mean(dot_N: Tensor, norm_N: Tensor, norm_mean: Tensor) -> Tensor:
    """Return the cosines [N] between pseudo-gradients and their mean from inner products alone.

    Inner products add up over units and over the workers of a replica, so no D needs to be kept.

    Args:
        dot_N: D . avg.
        norm_N: ||D||.
        norm_mean: ||avg||, 0-d.
    """
    product_N = norm_N * norm_mean
    return torch.where(product_N > 0, dot_N / product_N, 0.0)


def effective_contributors(weights_NU: Tensor) -> Tensor:
    """Return N_eff = 1 / sum of w^2 of each unit [U]: N at equal weights, 1 where one is alone, else 0.

    Example:
        >>> effective_contributors(torch.tensor([[0.5, 1.0, 0.0], [0.5, 0.0, 0.0]])).tolist()
        [2.0, 1.0, 0.0]
    """
    squares_U = weights_NU.square().sum(0)
    return torch.where(squares_U > 0, 1 / squares_U, 0.0)


class Watch:
    """Warns when averages rest on fewer than 1.5 replicas, or are clipped in most rounds.

    The temperature of the softmax of norms and the clip norm are absolute numbers, while norms grow with the
    size of a unit and with learning rate x steps: what suits a small model may leave a large one with its
    best replica. Waits for the device once in `rounds` calls.

    Args:
        num_units: U.
        rounds: how many rounds are judged together.
        least_contributors: N_eff, averaged over those rounds, below which a unit is named.
        most_clipped: share of the rounds in which a unit may be clipped.

    Raises:
        ConfigError: `rounds` below 1.
    """

    def __init__(
        self,
        *,
        num_units: int,
        rounds: int = 10,
        least_contributors: float = 1.5,
        most_clipped: float = 0.5,
    ) -> None:
        if rounds < 1:
            raise ConfigError(f"a watch over rounds={rounds} sees nothing; it must be at least 1")
        self.rounds, self.least_contributors, self.most_clipped = rounds, least_contributors, most_clipped
        self._num_rounds = 0
        # Rows: sum of N_eff and rounds with several healthy replicas, rounds clipped and rounds with any.
        self._sums_4U = torch.zeros(4, num_units, dtype=torch.float64)

    def record(self, weights_NU: Tensor, ok_NU: Tensor, clipped_U: Tensor) -> str | None:
        """Take note of a round; every tenth returns a warning, if one is due.

        A round in which fewer than two replicas were left says nothing about the weights.

        Args:
            weights_NU: w.
            ok_NU: bool, which were not left out.
            clipped_U: bool, whether S was made smaller.
        """
        healthy_U = ok_NU.sum(0)
        several_U = healthy_U >= 2
        new = [
            torch.where(several_U, effective_contributors(weights_NU), 0.0),
            several_U,
            clipped_U & (healthy_U > 0),
            healthy_U > 0,
        ]
        self._sums_4U = self._sums_4U.to(weights_NU.device) + torch.stack([x.double() for x in new])
        self._num_rounds += 1
        if self._num_rounds < self.rounds:
            return None
        contributors, several, clipped, stepped = self._sums_4U.tolist()
        self._num_rounds, self._sums_4U = 0, torch.zeros_like(self._sums_4U)
        few = {u: contributors[u] / several[u] for u in range(len(several)) if several[u]}
        often = {u: clipped[u] / stepped[u] for u in range(len(stepped)) if stepped[u]}
        few = {u: value for u, value in few.items() if value < self.least_contributors}
        often = {u: value for u, value in often.items() if value > self.most_clipped}
        return self._text(few, often, num_units=len(several))

    def _text(self, few: dict[int, float], often: dict[int, float], *, num_units: int) -> str | None:
        """Return the warning about units by number."""
        parts: list[str] = []
        if few:
            worst = min(few, key=lambda u: few[u])
            parts.append(
                f"the averages of {len(few)} of {num_units} units rest on fewer than "
                f"{self.least_contributors} replicas (unit {worst}: {few[worst]:.2f}): their norms lie far "
                f"apart for the temperature; set strategy.relative_temperature=true, or raise "
                f"strategy.temperature"
            )
        if often:
            worst = max(often, key=lambda u: often[u])
            parts.append(
                f"{len(often)} of {num_units} units are clipped in more than {self.most_clipped:.0%} of the "
                f"rounds (unit {worst}: {often[worst]:.0%}): raise strategy.clip_norm, or set it to none"
            )
        return f"over the last {self.rounds} rounds, " + "; ".join(parts) if parts else None

    def state_dict(self) -> dict[str, Any]:
        """Return the rounds since the last judgement, and their sums."""
        return {"rounds": self._num_rounds, "sums": self._sums_4U.clone()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take them back."""
        self._num_rounds, self._sums_4U = int(state_dict["rounds"]), state_dict["sums"].clone()
