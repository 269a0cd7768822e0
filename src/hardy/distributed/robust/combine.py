"""A rule at work: it combines blocks of gradients, plays an attack before, and tells who was believed."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hardy.config import ConfigError
from hardy.distributed.aggregation import Aggregator, Outcome, Total
from hardy.distributed.attacks import Attack

_RATE = 0.02
"""At which the share of steps in which a worker was believed follows."""
_ATTACK = "attack/"
"""Before the names of what an attack remembers."""
NOTHING_LEFT = "no gradient of this step that the rule could use"
"""Why a step is left out."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """An attack, who plays it, and from which step on."""

    attack: Attack
    workers: tuple[int, ...]
    from_step: int = 0


class Combiner:
    """Combines the blocks of one step after the other.

    Args:
        aggregator: the rule.
        num_workers: rows of the blocks.
        played: an attack to be played.

    Raises:
        ConfigError: too few workers for the rule, or an attacker who is none of them.
    """

    def __init__(self, aggregator: Aggregator, *, num_workers: int, played: Played | None = None) -> None:
        aggregator.check(num_workers)
        strangers = [worker for worker in played.workers if worker >= num_workers] if played else []
        if strangers:
            raise ConfigError(
                f"strategy.attack.workers names {strangers}, but there are {num_workers} workers, from 0; "
                f"leave them out, or start more"
            )
        self.aggregator, self._played = aggregator, played
        self.believed_rate = torch.ones(num_workers, dtype=torch.float64)
        """By worker: share of the last steps, about fifty, in which its gradient counted."""
        self.report: dict[str, Any] = {}

    def __call__(
        self,
        blocks: Sequence[Tensor],
        *,
        step: int,
        total: Total,
        references: Sequence[Tensor] | None = None,
        first_columns: Sequence[int] | None = None,
        workers: Sequence[int] | None = None,
        sample_weights: Tensor | None = None,
    ) -> list[Tensor] | None:
        """Return one vector [d] for each block [N, d]; None where no row could be used.

        Args:
            blocks: attackers' rows may be overwritten.
            step: from 0.
            total: adds up numbers over all that hold a part of the columns.
            references: this worker's part of the trusted gradient, [d] for each block.
            first_columns: where each block begins among the columns of all workers.
            workers: who sent the rows; none is 0 to N - 1.
            sample_weights: how much each row counts in averages of rules that heed it.
        """
        workers = range(blocks[0].shape[0]) if workers is None else workers
        if self._played is not None and step >= self._played.from_step:
            self._played.attack(
                blocks,
                attackers=[row for row, worker in enumerate(workers) if worker in self._played.workers],
                num_faulty=self.aggregator.num_faulty,
                references=references,
                step=step,
                total=total,
                rule=partial(
                    self._tried, references=references, step=step, total=total, first_columns=first_columns
                ),
                first_columns=first_columns,
            )
        outcome = self.aggregator(
            blocks,
            references=references,
            sample_weights=sample_weights,
            workers=workers,
            step=step,
            total=total,
            first_columns=first_columns,
        )
        self._note(outcome, workers)
        return outcome.vectors

    def weigh(
        self,
        squares_N: Tensor,
        dots_N: Tensor | None,
        reference_square: Tensor | None,
        *,
        step: int,
        workers: Sequence[int],
        sample_weights: Tensor | None = None,
    ) -> Outcome:
        """Decide by what each worker reports of its gradient: squared norm, dot with the trusted one."""
        outcome = self.aggregator.weigh(
            squares_N, dots_N, reference_square, step=step, sample_weights=sample_weights
        )
        self._note(outcome, workers)
        return outcome

    def _tried(self, blocks: Sequence[Tensor], **given: Any) -> list[Tensor] | None:
        """Return what the rule would make of blocks, as if it had not been asked."""
        state = copy.deepcopy(self.aggregator.state_dict())
        try:
            return self.aggregator(blocks, **given).vectors
        finally:
            self.aggregator.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return what the rule and, as `attack/NAME/...`, the attack remember; columns end in `/BLOCK`."""
        if self._played is None:
            return self.aggregator.state_dict()
        attack = self._played.attack
        named = {f"{_ATTACK}{attack.name}/{key}": value for key, value in attack.state_dict().items()}
        return self.aggregator.state_dict() | named

    def load_state_dict(self, state_dict: Mapping[str, Any], *, num_workers: int) -> None:
        """Take it back; with another number of workers than now, nothing that was kept of each of them.

        An attack of another name than the one that was saved begins anew.
        """
        state = {key: value for key, value in state_dict.items() if not key.startswith(_ATTACK)}
        if num_workers == len(self.believed_rate):
            own = "" if self._played is None else f"{_ATTACK}{self._played.attack.name}/"
            attack = {key[len(own) :]: state_dict[key] for key in state_dict if own and key.startswith(own)}
            if self._played is not None and attack:
                self._played.attack.load_state_dict(attack)
        elif any(key.startswith("row/") for key in state):
            return
        self.aggregator.load_state_dict(state)

    def _note(self, outcome: Outcome, workers: Sequence[int]) -> None:
        """Remember for the metrics who was believed."""
        counts = torch.ones(len(workers), dtype=torch.float64)
        if outcome.weights is not None:
            counts = (outcome.weights > 0).double()
        counts[list(outcome.removed)] = 0
        there = list(workers)
        self.believed_rate[there] = self.believed_rate[there].lerp(counts, _RATE)
        self.report = {
            "removed_workers": [there[row] for row in outcome.removed],
            "believed_workers": [there[row] for row in counts.nonzero().flatten().tolist()],
            "believed_rate": self.believed_rate.tolist(),
            **outcome.metrics,
        }

    def take_report(self) -> dict[str, Any]:
        """Return who was believed at the last step, once."""
        report, self.report = self.report, {}
        return report


def middle_loss(losses_N: Tensor, *, num_faulty: int) -> Tensor:
    """Return the mean of the finite losses without the `num_faulty` at either end; NaN where none is finite.

    Example:
        >>> middle_loss(torch.tensor([1.0, 2.0, 3.0, torch.nan, 1e20]), num_faulty=1)
        tensor(2.5000)
    """
    losses = losses_N[losses_N.isfinite()].sort().values
    left_out = min(num_faulty, (len(losses) - 1) // 2)
    middle = losses[left_out : len(losses) - left_out]
    return middle.mean() if len(middle) else losses_N.new_tensor(math.nan)
