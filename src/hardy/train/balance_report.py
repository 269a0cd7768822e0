"""What a planned step was predicted to take and what it took: times of workers, and how far costs are off.

Paper: Hydraulis (arXiv 2412.07894), whose plans are as good as its costs.
"""

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hardy.balance.cost import LengthCostModel
from hardy.balance.plan import Plan
from hardy.balance.refit import SECONDS_PER_UNIT, Work, refitted, rescaled
from hardy.clock import Clock

logger = logging.getLogger(__name__)

MOST_ERROR = 0.15
"""Median relative error of predictions from which costs are called wrong."""
STEPS_LOOKED_AT = 32
"""Newest steps whose errors count, and fewest before anything is said."""
UNTIMED_STEPS = 2
"""First steps, which are slower: memory is taken, kernels are chosen."""


class OwnTime:
    """How long a worker is busy with forward and backward passes: from `start` to its last gradient.

    Where workers run freely this leaves out what they wait for each other; where weights or documents are
    shared, waiting for those who share them is inside. A GPU is asked when it got there, and never waited
    for in between.

    Args:
        parameters: of the model; their gradients tell when the backward pass ends.
        clock: of the host.
        device: where the model lives.
    """

    def __init__(self, parameters: Iterable[Tensor], clock: Clock, device: torch.device) -> None:
        self._clock = clock
        events = device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if events else []
        self._began = self._ended = 0.0
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _: self._mark(1))

    def start(self) -> None:
        """Begin a step."""
        self._mark(0)

    def seconds(self) -> float:
        """Return how long the passes since `start` took; waits for them."""
        if self._events:
            began, ended = self._events
            ended.synchronize()
            return began.elapsed_time(ended) / 1e3
        return max(self._ended - self._began, 0.0)

    def _mark(self, place: Literal[0, 1]) -> None:
        if self._events:
            self._events[place].record()
        elif place:
            self._ended = self._clock.now()
        else:
            self._began = self._ended = self._clock.now()


class CostCheck:
    """Costs of sequences held against measured steps; knows the seconds of their unit.

    Args:
        cost: what predicts, in any unit.
        refit: whether costs that are off are fitted again.
    """

    def __init__(self, cost: LengthCostModel, *, refit: bool) -> None:
        self.cost, self._refit = cost, refit
        self._seen = 0
        self._warned = False
        self._ratios: deque[float] = deque(maxlen=STEPS_LOOKED_AT)
        self._errors: deque[float] = deque(maxlen=STEPS_LOOKED_AT)
        self._works: deque[Work] = deque(maxlen=8 * STEPS_LOOKED_AT)

    @property
    def seconds_per_unit(self) -> float | None:
        """Of the costs: by their unit, else as measured so far; none before anything was."""
        known = SECONDS_PER_UNIT.get(self.cost.unit)
        return known or (median(self._ratios) if self._ratios else None)

    @property
    def error(self) -> float | None:
        """Median of |predicted - measured| / measured over the newest steps; none before there is any."""
        return median(self._errors) if self._errors else None

    def add(self, made: Plan, lengths: Sequence[int], seconds: Sequence[float]) -> LengthCostModel | None:
        """Take in a step; return fitted costs where the old ones are off, once enough steps were seen.

        Args:
            made: the step's plan, by these costs.
            lengths: tokens of its sequences.
            seconds: how long each worker took.
        """
        self._seen += 1
        if self._seen <= UNTIMED_STEPS or min(seconds) <= 0:
            return None
        # Workers that meet in every slot all take as long as the step.
        joint = made.objective == "lock_step"
        pairs = [(made.cost, max(seconds))] if joint else list(zip(made.rank_times, seconds, strict=True))
        pairs = [(cost, took) for cost, took in pairs if cost > 0]
        scale = self.seconds_per_unit
        if scale is not None:
            self._errors.append(median(abs(scale * cost - took) / took for cost, took in pairs))
        self._ratios.append(median(took / cost for cost, took in pairs))
        if not joint:
            self._works.extend(works_of(made, lengths, seconds))
        return self._judged()

    def use(self, cost: LengthCostModel) -> None:
        """Go on with these costs and forget the errors of the old ones."""
        self.cost = cost
        for told in (self._ratios, self._errors, self._works):
            told.clear()

    def _judged(self) -> LengthCostModel | None:
        error = self.error
        if error is None or len(self._errors) < STEPS_LOOKED_AT or error <= MOST_ERROR:
            return None
        if self._refit:
            logger.warning(
                "predicted step times are off by %.0f %% (median): costs are fitted again", 100 * error
            )
            return refitted(self.cost, self._works) if self._works else self._scaled()
        if not self._warned:
            self._warned = True
            logger.warning(
                "predicted step times are off by %.0f %% (median of %d steps), so plans balance something "
                "else; measure costs with `hardy balance profile` on this machine and give balance.cost, or "
                "set balance.model_error=refit",
                100 * error,
                len(self._errors),
            )
        return None

    def _scaled(self) -> LengthCostModel:
        return rescaled(self.cost, 1e3 * median(self._ratios))


class GroupsFormed:
    """Whether plans ever let several workers share a document, and if not, why not."""

    def __init__(self) -> None:
        self._steps, self._longest, self._any = 0, 0, False

    def add(self, made: Plan, lengths: Sequence[int]) -> None:
        """Take in a step's plan and the tokens of its documents."""
        self._steps += 1
        self._longest = max(self._longest, *lengths)
        shared = (b.sequences for slot in made.slots for b in slot if b.group.scheme.ranks > 1)
        self._any = self._any or any(shared)

    def note(self, cost: LengthCostModel, num_workers: int) -> str | None:
        """Return a line where no group was formed in any step, else none."""
        if self._any or not self._steps:
            return None
        longest = np.array([self._longest])
        alone, *groups = cost.context_schemes(num_workers)
        shares = {
            own.scheme.ranks: float(own.times(longest)[0] + own.c) / float(alone.times(longest)[0] + alone.c)
            for own in groups
        }
        workers = min(shares, key=lambda ranks: shares[ranks])
        return (
            f"no group of several workers was worth it in {self._steps} steps: by the costs {workers} "
            f"workers that share the longest document ({self._longest:,} tokens) take {shares[workers]:.2f} "
            f"of the time that one takes, and no step would have been shorter"
        )


def works_of(made: Plan, lengths: Sequence[int], seconds: Sequence[float]) -> list[Work]:
    """Return what each busy worker of a freely running plan computed; its group stays for the step."""
    found: list[Work] = []
    for group, batches in made.micro_batches.items():
        busy = [batch for batch in batches if batch.sequences]
        taken = [lengths[index] for batch in busy for index in batch.sequences]
        squares, tokens = float(sum(s * s for s in taken)), float(sum(taken))
        found += [
            Work(
                scheme=group.scheme,
                squares=squares,
                tokens=tokens,
                micro_batches=len(busy),
                seconds=seconds[rank],
            )
            for rank in group.ranks
            if busy
        ]
    return found
