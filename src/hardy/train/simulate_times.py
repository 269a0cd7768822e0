"""How long each simulated step takes: the same numbers whether models are trained or only costs counted."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hardy.rng import numpy_generator_for
from hardy.train.simulate_config import SimulationConfig

_BLOCK = 256
"""Steps whose variation is drawn at once."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class StepTimes:
    """Virtual seconds of steps: step_s x the worker's factor x events x a lognormal number of mean 1.

    The law of `costs.compute_seconds`, but one random stream for each worker, which is drawn in blocks.

    Args:
        config: the cluster; `task.seed` seeds the variation.

    Example:
        >>> times = StepTimes(SimulationConfig(workers=2, step_s=0.5, slow_factors=(1.0, 3.0)))
        >>> [times.seconds(worker, index=0, now_s=0.0) for worker in (0, 1)]
        [0.5, 1.5]
    """

    def __init__(self, config: SimulationConfig) -> None:
        factors = [*config.slow_factors, *[1.0] * (config.workers - len(config.slow_factors))]
        self._factors = np.array(factors, dtype=np.float64)
        self._step_s, self._sigma = config.step_s, config.variation_sigma
        self._slow = [event for event in config.events if event.kind == "slow"]
        seeds = range(config.workers if self._sigma > 0 else 0)
        self._generators = [numpy_generator_for(config.task.seed, "simulated step", w) for w in seeds]
        self._blocks: dict[int, Floats] = {}
        self._num_drawn = 0

    def seconds(self, worker: int, *, index: int, now_s: float) -> float:
        """Return how long a worker's `index`-th step takes if it begins at `now_s`."""
        return float(self.seconds_of([worker], np.array([index]), np.array([now_s]))[0])

    def seconds_of(self, workers: Sequence[int] | Ints, indices: Ints, now_s: Floats) -> Floats:
        """Return the same for several workers at once.

        Args:
            workers: who; no need for them to differ.
            indices: of their steps, from 0.
            now_s: when each begins.
        """
        numbers = np.asarray(workers)
        factors = self._factors[numbers]
        for event in self._slow:
            concerned = (numbers == event.worker) & (now_s >= event.at_s)
            if event.until_s is not None:
                concerned &= now_s < event.until_s
            factors = np.where(concerned, factors * (event.factor or 1.0), factors)
        if self._sigma > 0:
            factors = factors * self._variation(numbers, indices)
        return self._step_s * factors

    def forget(self, before_index: int) -> None:
        """Drop what only steps before `before_index` need."""
        for number in [number for number in self._blocks if (number + 1) * _BLOCK <= before_index]:
            del self._blocks[number]

    def _variation(self, workers: Ints, indices: Ints) -> Floats:
        numbers, places = np.divmod(indices, _BLOCK)
        result = np.empty(len(workers))
        for number in np.unique(numbers):
            mine = numbers == number
            result[mine] = self._block(int(number))[workers[mine], places[mine]]
        return result

    def _block(self, number: int) -> Floats:
        while self._num_drawn <= number:
            normal_WS = np.stack([generator.standard_normal(_BLOCK) for generator in self._generators])
            block_WS = np.exp(self._sigma * normal_WS - self._sigma**2 / 2)
            self._blocks[self._num_drawn] = block_WS
            self._num_drawn += 1
        return self._blocks[number]
