"""Attacks and faults that need nothing but the worker's own gradient.

Letters: A attackers, c columns of a chunk, D columns of the whole stack, k steps of delay.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from hardy.config import ConfigError, NonNegativeFloat, PositiveInt, Range
from hardy.distributed.attacks_stage import Attack, Chunk, Finite, Stage, dot, exact, normal_from, uniform_at
from hardy.rng import seed_for

EXPONENTS = {
    torch.bfloat16: (torch.int16, 7, 8),
    torch.float16: (torch.int16, 10, 5),
    torch.float32: (torch.int32, 23, 8),
    torch.float64: (torch.int64, 52, 11),
}
"""By dtype: integers of its size, the exponent's lowest bit, and how many bits it has."""


@dataclass(kw_only=True)
class Zero(Attack):
    """All zeros: a worker that contributes nothing."""

    fill: ClassVar[float] = 0.0

    def play(self, stage: Stage) -> None:
        """Write the number into every column."""
        stage.write(lambda chunk: torch.full_like(chunk.rows[0], self.fill))


@dataclass(kw_only=True)
class Nan(Zero):
    """Not a number, everywhere."""

    fill: ClassVar[float] = torch.nan


@dataclass(kw_only=True)
class Inf(Zero):
    """Infinity, everywhere."""

    fill: ClassVar[float] = torch.inf


@dataclass(kw_only=True)
class Huge(Attack):
    """The same finite number everywhere, whose square leaves fp32."""

    value: Finite = 1e20
    """The number."""

    def play(self, stage: Stage) -> None:
        """Write the number into every column; in a dtype that ends before it, the last one."""
        stage.write(lambda chunk: torch.full_like(chunk.rows[0], self.value, dtype=torch.float64))


@dataclass(kw_only=True)
class OneNan(Attack):
    """The worker's own gradient with one number, that of column 0, lost."""

    def play(self, stage: Stage) -> None:
        """Overwrite column 0, where this worker holds it."""
        for chunk in stage.chunks():
            if chunk.first == 0:
                for row in stage.attackers:
                    chunk.rows[row, 0] = torch.nan


@dataclass(kw_only=True)
class SignFlip(Attack):
    """The worker's own gradient turned round. (That of the honest mean is `ipm` with strength 1.)

    Example:
        >>> rows = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
        >>> SignFlip()([rows], attackers=[1])
        >>> rows
        tensor([[ 1.,  2.],
                [-3.,  4.]])
    """

    def play(self, stage: Stage) -> None:
        """Write -g of each attacker."""
        stage.write(lambda chunk: -stage.own_rows(chunk))


@dataclass(kw_only=True)
class Gaussian(Attack):
    """Noise instead of a gradient."""

    sd: NonNegativeFloat = 10.0
    """Standard deviation of each number."""

    def play(self, stage: Stage) -> None:
        """Write other noise for each attacker and step."""

        def noise(chunk: Chunk) -> Tensor:
            uniform, other = (stage.draws(chunk, self.seed, f"gaussian/{part}") for part in (0, 1))
            return self.sd * normal_from(uniform, other)

        stage.write(noise)


@dataclass(kw_only=True)
class BitFlip(Attack):
    """The worker's own gradient after a fault of the hardware: exponent bits turned over at random."""

    share: Annotated[float, Range(above=0, most=1)] = 1e-3
    """Of the numbers that lose a bit."""

    def play(self, stage: Stage) -> None:
        """Turn over one bit of the exponent of some numbers."""

        def flipped(chunk: Chunk) -> Tensor:
            own = stage.own_rows(chunk)
            if own.dtype not in EXPONENTS:
                raise ConfigError(f"bit_flip knows {[*map(str, EXPONENTS)]}, but the gradient is {own.dtype}")
            integers, lowest, count = EXPONENTS[own.dtype]
            hit = stage.draws(chunk, self.seed, "bit_flip/hit") < self.share
            place = lowest + (count * stage.draws(chunk, self.seed, "bit_flip/place")).to(integers)
            mask = torch.where(hit, torch.ones_like(place) << place, torch.zeros_like(place))
            return (own.view(integers) ^ mask).view(own.dtype)

        stage.write(flipped)


@dataclass(kw_only=True)
class Drift(Attack):
    """The worker's own gradient plus a bias that grows with the steps: a part that wears out.

    The bias points the same way for all attackers and steps, +-1 in each column, and is as long as `growth` x
    steps x the worker's own gradient.
    """

    growth: Finite = 0.01
    """Of the bias, per step, in lengths of the worker's own gradient."""

    def play(self, stage: Stage) -> None:
        """Write own + growth (step + 1) ||own|| / sqrt(D) s."""
        squares_A = stage.sum(lambda chunk: (lambda own: dot(own, own))(exact(stage.own_rows(chunk))))
        scale_A = self.growth * (stage.step + 1) * (squares_A / stage.num_columns()).sqrt()
        key = seed_for(self.seed, "drift")

        def biased(chunk: Chunk) -> Tensor:
            signs_c = torch.where(uniform_at(chunk, key) < 0.5, -1.0, 1.0)
            return stage.own_rows(chunk) + scale_A[:, None] * signs_c

        stage.write(biased)


@dataclass(kw_only=True)
class Stale(Attack):
    """The worker's own gradient of an earlier step, as if it were of this one; the oldest it has until then.

    Keeps `steps` gradients of each attacker.
    """

    steps: PositiveInt = 10
    """k: how old the gradient is; replay keeps one for ever."""
    _kept: dict[int, list[list[Tensor]]] = field(init=False, repr=False, default_factory=dict)
    """By row: own gradients, oldest first, as one vector for each block."""

    @property
    def remembers_columns(self) -> bool:
        """Whether it keeps gradients: it does."""
        return True

    def play(self, stage: Stage) -> None:
        """Keep the attackers' gradients and write old ones."""
        for row in stage.attackers:
            own = [block[row].clone() for block in stage.blocks]
            for block, old in zip(stage.blocks, self._exchanged(row, own), strict=True):
                block[row].copy_(old)

    def _exchanged(self, row: int, own: list[Tensor]) -> list[Tensor]:
        """Keep a worker's gradient and return the one to be sent."""
        kept = self._kept.setdefault(row, [])
        kept.append(own)
        return kept.pop(0) if len(kept) > self.steps else kept[0]

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept, as `ROW/AGE/BLOCK`."""
        return {
            f"{row}/{age}/{block}": vector.clone()
            for row, kept in self._kept.items()
            for age, own in enumerate(kept)
            for block, vector in enumerate(own)
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take it back."""
        places = sorted((*map(int, key.split("/")), key) for key in state_dict)
        self._kept = {}
        for row, age, _block, key in places:
            kept = self._kept.setdefault(row, [])
            if age == len(kept):
                kept.append([])
            kept[age].append(state_dict[key].clone())


@dataclass(kw_only=True)
class Replay(Stale):
    """The worker's first gradient for ever."""

    steps: int = field(init=False, default=1)

    def _exchanged(self, row: int, own: list[Tensor]) -> list[Tensor]:
        return self._kept.setdefault(row, [own])[0]
