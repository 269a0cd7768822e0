"""How a parameter is seen as matrices, and which worker sketches what of it.

A matrix is contracted along its shorter side; channels lie along the longer one. Where the workers of one
mesh axis hold parts of the contracted side, their sketches are partial sums.
"""

import math
from dataclasses import dataclass
from typing import Literal

from hardy.optim._rule import Group
from hardy.optim._sharded import Shard, Split


@dataclass(frozen=True)
class Geometry:
    """A parameter as a stack of matrices, and how this worker's part of it is sketched."""

    stack: int
    """Local matrices: the experts of a 3-D parameter, else 1."""
    rows: int
    cols: int
    """Of a local matrix."""
    contracts: Literal["rows", "cols"]
    """The axis that the projection takes away: the smaller one of the whole matrix."""
    contracted: int
    """Whole length of that axis."""
    contracted_begin: int
    """Where the local part begins on it."""
    channels: int
    """Whole length of the other axis."""
    rank: int
    scattered: Split | None
    """The axis over which sums of sketches are scattered, so that each worker keeps some channels' state."""
    summed: tuple[Split, ...]
    """Axes over which sketches are summed, all workers keeping the same."""
    channel_splits: tuple[Split, ...]
    """Axes that cut channels, by the parameter's sharding or by scattering."""
    most_channels: int
    """Channels of the local matrices on the worker that has most, over the stack; the same on all workers."""
    most_contracted: int
    """Contracted length of the local matrices on the worker that has most, over the stack."""

    @property
    def is_alone(self) -> bool:
        """Whether no other worker has a part of the matrices; whole experts may be elsewhere."""
        return self.scattered is None and not self.summed and not self.channel_splits

    @property
    def local_contracted(self) -> int:
        """Local length of the contracted axis."""
        return self.cols if self.contracts == "cols" else self.rows

    @property
    def local_channels(self) -> int:
        """Local length of the other axis."""
        return self.rows if self.contracts == "cols" else self.cols


def is_stack(shape: tuple[int, ...], group: Group) -> bool:
    """Whether a 3-D parameter is a stack of matrices [experts, rows, cols]."""
    return len(shape) == 3 and group["stacked"]


def geometry_of(shard: Shard, group: Group, name: str) -> Geometry:
    """Return how a parameter of two or more dimensions is seen as matrices.

    Convolutions `[out, in, ...]` are `[out, in * ...]`; 3-D parameters are stacks of matrices unless the
    group says `stacked=False`.
    """
    shape, local, first = shard.shape, shard.local_shape, int(is_stack(shard.shape, group))
    whole_rows, whole_cols = shape[first], math.prod(shape[first + 1 :])
    row_splits, col_splits = shard.splits_of(first), shard.splits_of(first + 1)
    if any(split.dim > first + 1 for split in shard.splits) or (col_splits and len(shape) > first + 2):
        raise ValueError(
            f"{name} of shape {shape} is cut along a dimension that APOLLO flattens; cut dimension 0"
        )
    tall = whole_rows >= whole_cols
    if group["side"] == "shard_local" and bool(row_splits) != bool(col_splits):
        tall = not col_splits
    contracted = whole_cols if tall else whole_rows
    contracted_splits, channel_splits = (col_splits, row_splits) if tall else (row_splits, col_splits)
    alone = len(contracted_splits) == 1 and not channel_splits and group["wide_state"] == "shard"
    scattered = contracted_splits[0] if alone else None
    stack, most_rows = (shard.largest(0) if first else 1), shard.largest(first)
    most_cols = math.prod([shard.largest(dim) for dim in range(first + 1, len(shape))])
    most = (most_rows, most_cols) if tall else (most_cols, most_rows)
    return Geometry(
        stack=local[0] if first else 1,
        rows=local[first],
        cols=math.prod(local[first + 1 :]),
        contracts="cols" if tall else "rows",
        contracted=contracted,
        contracted_begin=shard.offset[first + 1 if tall else first],
        channels=whole_rows if tall else whole_cols,
        rank=min(group["rank"], contracted),
        scattered=scattered,
        summed=() if alone else contracted_splits,
        channel_splits=contracted_splits if alone else channel_splits,
        most_channels=stack * most[0],
        most_contracted=stack * most[1],
    )
