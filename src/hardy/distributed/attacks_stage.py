"""What every attack is built of: the stack seen by columns, and draws that depend on the place alone.

Letters: N rows of the stack, A of them attackers, H the others (honest), c columns of a chunk.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from hardy.config import ConfigError, Range
from hardy.distributed.aggregation.settings import check_settings
from hardy.distributed.aggregation.stack import Total, identity
from hardy.rng import seed_for

Rule = Callable[[Sequence[Tensor]], Sequence[Tensor] | None]
"""From blocks to one vector per block; none where the step is skipped. Changes nothing, nor its own state."""

Finite = Annotated[float, Range(above=-math.inf, below=math.inf)]
"""A number of either sign."""

CHUNK_COLUMNS = 2**15
"""Columns at once: fp32 sums of so many are exact to 4e-7, and a chunk of 16 rows stays in the cache."""


@dataclass(frozen=True)
class Chunk:
    """Some columns of one block."""

    rows: Tensor
    """[N, c], a view of the block."""
    reference: Tensor | None
    """[c] of the trusted gradient."""
    block: int
    """Number of the block."""
    start: int
    """Where the chunk begins within the block."""
    first: int
    """Number of its first column within the whole stack."""

    @property
    def columns(self) -> slice:
        """Return where the chunk lies within its block."""
        return slice(self.start, self.start + self.rows.shape[1])


@dataclass(frozen=True)
class Stage:
    """What an attack may see and change in one step."""

    blocks: Sequence[Tensor]
    attackers: tuple[int, ...]
    num_faulty: int
    references: Sequence[Tensor] | None
    step: int
    total: Total
    rule: Rule | None
    first_columns: tuple[int, ...]

    @cached_property
    def honest(self) -> tuple[int, ...]:
        """Return the rows of the workers that do not attack."""
        return tuple(row for row in range(len(self.blocks[0])) if row not in self.attackers)

    def chunks(self) -> Iterator[Chunk]:
        """Yield all columns, some at a time."""
        for number, block in enumerate(self.blocks):
            for start in range(0, block.shape[1], CHUNK_COLUMNS):
                yield self._chunk(number, start, start + CHUNK_COLUMNS)

    def _chunk(self, number: int, start: int, stop: int) -> Chunk:
        block = self.blocks[number]
        reference = None
        if self.references is not None:
            reference = self.references[number][start:stop].to(exact(block[:0]))
        return Chunk(block[:, start:stop], reference, number, start, self.first_columns[number] + start)

    def honest_rows(self, chunk: Chunk) -> Tensor:
        """Return the honest rows [H, c] of a chunk, at least fp32."""
        return exact(chunk.rows[list(self.honest)])

    def sum(self, numbers_of: Callable[[Chunk], Tensor]) -> Tensor:
        """Return the sum over all columns of what `numbers_of` a chunk returns, fp64."""
        device = self.blocks[0].device
        parts = [numbers_of(chunk).to(device, torch.float64) for chunk in self.chunks()]
        if not parts:  # this worker holds no column, yet takes part in the total
            parts = [numbers_of(self._chunk(0, 0, 0)).double()]
        return self.total(torch.stack(parts).sum(0))

    def write(self, vectors_of: Callable[[Chunk], Tensor]) -> None:
        """Write [c], or a row for each attacker [A, c], into the attackers' rows of each chunk.

        What is finite and too large for the rows' dtype becomes its largest number; NaN and infinity stay.
        """
        for chunk in self.chunks():
            vectors = vectors_of(chunk)
            if vectors.dtype != chunk.rows.dtype:
                largest = torch.finfo(chunk.rows.dtype).max
                vectors = torch.where(vectors.isfinite(), vectors.clamp(-largest, largest), vectors)
            vectors = vectors.to(chunk.rows.dtype).expand(len(self.attackers), -1)
            for row, vector in zip(self.attackers, vectors, strict=True):
                chunk.rows[row].copy_(vector)

    def own_rows(self, chunk: Chunk) -> Tensor:
        """Return what the attackers' rows hold [A, c], a copy in their own dtype."""
        return chunk.rows[list(self.attackers)]

    def draws(self, chunk: Chunk, seed: int, purpose: str) -> Tensor:
        """Return uniform numbers [A, c] above 0 and below 1, fp64."""
        keys = [seed_for(seed, purpose, self.step, row) for row in self.attackers]
        return torch.stack([uniform_at(chunk, key) for key in keys])

    def num_columns(self) -> Tensor:
        """Return D [1], the number of columns on all workers, fp64."""
        return self.sum(lambda chunk: torch.tensor([chunk.rows.shape[1]]))


@dataclass(kw_only=True)
class Attack:
    """Overwrites the rows of the attackers; all other rows keep their bits.

    Called on the columns that this worker holds, on every worker alike: what depends on whole rows is added
    up by `total`, and draws depend on the seed, the step, the row and the column, so that a stack in parts
    comes out as the whole stack.
    """

    needs: ClassVar[Literal["own", "honest", "reference"]] = "own"
    """own: nothing but the attacker's own gradient, so it may also be played on a stack of one row, before
    anything is sent (with another seed for each worker); honest: those of the others; reference: besides the
    trusted gradient."""
    seed: int = 0
    """Of what is drawn."""

    def __post_init__(self) -> None:
        """Check the settings; those that keep something set it after this."""
        check_settings(self, section=self.name)

    def __call__(
        self,
        blocks: Sequence[Tensor],
        *,
        attackers: Sequence[int],
        num_faulty: int | None = None,
        references: Sequence[Tensor] | None = None,
        step: int = 0,
        total: Total = identity,
        rule: Rule | None = None,
        first_columns: Sequence[int] | None = None,
    ) -> None:
        """Overwrite the attackers' rows, in place.

        Args:
            blocks: floating-point [N, d] each, disjoint columns of one stack.
            attackers: rows that attack; none is allowed, and changes nothing.
            num_faulty: f that the rule was told, for attacks that reckon with it (none of ours does); the
                number of attackers by default.
            references: the trusted gradient, [d] for each block.
            step: number of the step.
            total: adds fp64 numbers over the workers that hold the other columns.
            rule: from blocks to one vector per block, for attacks that try out the actual rule. It must leave
                the blocks and its own state as they are.
            first_columns: number of each block's first column within the stack of all workers; counted from 0
                over `blocks` by default. Only draws depend on it: without it workers that hold different
                columns draw the same numbers.

        Raises:
            ConfigError: the attack needs what is not given.
            ValueError: rows or shapes that cannot be.
        """
        attackers = tuple(sorted(set(attackers)))
        _check(blocks, attackers, references, first_columns)
        if not attackers:
            return
        if first_columns is None:
            widths = [block.shape[1] for block in blocks]
            first_columns = [sum(widths[:number]) for number in range(len(widths))]
        stage = Stage(
            blocks=blocks,
            attackers=attackers,
            num_faulty=len(attackers) if num_faulty is None else num_faulty,
            references=references,
            step=step,
            total=total,
            rule=rule,
            first_columns=tuple(first_columns),
        )
        if self.needs != "own" and not stage.honest:
            raise ConfigError(
                f"attack {self.name!r} looks at the honest workers' gradients, but all {len(attackers)} "
                f"workers attack; let fewer attack, or take one that needs its own gradient only"
            )
        if self.needs == "reference" and references is None:
            raise ConfigError(
                f"attack {self.name!r} works against a trusted gradient, and none was given; use a rule with "
                f"a validation batch, or another attack"
            )
        with torch.no_grad():
            self.play(stage)

    @property
    def remembers_columns(self) -> bool:
        """Whether it keeps gradients, so that each call must bring the same rows and columns."""
        return False

    @property
    def name(self) -> str:
        """Return the attack's name in messages: that of its class, in small letters."""
        return "".join("_" * (c.isupper() and i > 0) + c.lower() for i, c in enumerate(type(self).__name__))

    def play(self, stage: Stage) -> None:
        """Overwrite the attackers' rows of a stage that holds what `needs` says."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and, as `.../BLOCK`, tensors of columns; empty for attacks without memory."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take them back."""


def exact(x: Tensor) -> Tensor:
    """Return `x` in fp32, or as it is where its dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def deviation_of(rows_Hc: Tensor) -> Tensor:
    """Return sigma [c], the unbiased standard deviation; 0 for one row, which shows none."""
    away_Hc = rows_Hc - rows_Hc.mean(0)
    return (away_Hc.square().sum(0) / max(len(rows_Hc) - 1, 1)).sqrt()


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Return the dot products along the last dimension, added in the dtype of `x`."""
    return torch.linalg.vecdot(x, y)


def safe_ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return above / below; 0 where `below` is 0."""
    return torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, below))


def lower_median(numbers: Tensor) -> Tensor:
    """Return the middle number; the lower one of two."""
    return numbers.sort().values[(len(numbers) - 1) // 2]


def uniform_at(chunk: Chunk, key: int) -> Tensor:
    """Return a uniform number above 0 and below 1 for each column [c], fp64, the same on every device.

    Counter-based (the mixing of splitmix64 over column and key), so that neither chunks nor workers matter.

    Example:
        >>> whole = Chunk(torch.zeros(1, 6), None, 0, 0, 0)
        >>> part = Chunk(torch.zeros(1, 2), None, 0, 0, 4)
        >>> torch.equal(uniform_at(whole, 7)[4:], uniform_at(part, 7))
        True
    """
    width, device = chunk.rows.shape[1], chunk.rows.device
    bits = torch.arange(chunk.first + 1, chunk.first + 1 + width, dtype=torch.int64, device=device)
    bits = bits * _signed(0x9E3779B97F4A7C15) + _signed(key)
    bits = (bits ^ _shifted(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shifted(bits, 27)) * _signed(0x94D049BB133111EB)
    bits = bits ^ _shifted(bits, 31)
    return (_shifted(bits, 12).double() + 0.5) * 2.0**-52


def normal_from(uniform: Tensor, other: Tensor) -> Tensor:
    """Return standard normal numbers from two uniform ones each (Box and Muller), fp64."""
    return (-2 * uniform.log()).sqrt() * (2 * math.pi * other).cos()


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Return int64 bits moved to the right, zeros moving in."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _signed(number: int) -> int:
    """Return a 64-bit pattern as int64 reads it."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


def _check(
    blocks: Sequence[Tensor],
    attackers: tuple[int, ...],
    references: Sequence[Tensor] | None,
    first_columns: Sequence[int] | None,
) -> None:
    """Refuse what is no stack, or does not fit it."""
    shapes = [tuple(block.shape) for block in blocks]
    if not shapes or any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(f"an attack needs blocks [N, d] of one stack, got shapes {shapes}")
    num_rows = shapes[0][0]
    wrong = [row for row in attackers if not 0 <= row < num_rows]
    if wrong:
        raise ValueError(f"attackers {wrong} are no rows of a stack of {num_rows}; rows count from 0")
    if references is not None and [tuple(r.shape) for r in references] != [shape[1:] for shape in shapes]:
        raise ValueError(
            f"references must be one [d] per block {shapes}, got {[r.shape for r in references]}"
        )
    if first_columns is not None and len(first_columns) != len(blocks):
        raise ValueError(f"first_columns={first_columns} must be one number for each of {len(blocks)} blocks")
