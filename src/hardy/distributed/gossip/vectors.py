"""What a replica mixes, as flat vectors: the trainable parameters by unit, then its floating buffers.

Under FSDP2 a vector is this worker's shard, and knows where it lies in the whole model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from hardy.config import UserError
from hardy.distributed.local.units import Units
from hardy.distributed.sharded import local_part

BUFFERS = "buffers"
"""Name of the vector that holds buffers."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One parameter or buffer in its vector."""

    whole: Tensor
    begin: int
    """Its first element in the vector."""
    origin: int
    """Its first local element, counted over the whole model."""

    @property
    def local(self) -> Tensor:
        """What this worker holds of it, in its memory of now: `model.to` may give it another."""
        return local_part(self.whole).detach()

    @property
    def end(self) -> int:
        """Its last element in the vector, and one."""
        return self.begin + self.local.numel()


class Vectors:
    """The vectors of a model, in the same order on all replicas.

    Args:
        model: plain, or sharded by FSDP2 over a mesh of one dimension.
        unit_names: submodules that are vectors of their own.
        with_buffers: whether floating buffers are mixed too; they are whole on every worker.
        dtype: what is computed in, fp32 or fp64.

    Example:
        >>> vectors = Vectors(nn.Linear(2, 1), [])
        >>> vectors.sizes, vectors.num_parameters
        ((3,), 3)
    """

    def __init__(
        self,
        model: nn.Module,
        unit_names: Sequence[str],
        *,
        with_buffers: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.units = Units(model, unit_names)
        self.dtype, self.device, self.is_sharded = dtype, self.units.device, self.units.is_sharded
        self.names = [str(unit) for unit in range(len(self.units))]
        self.num_parameters = 0
        """Of the whole model, buffers that are mixed included."""
        self.pieces: list[list[Piece]] = []
        for unit in range(len(self.units)):
            self._add(self.units.parameters(unit))
        self.parameter_sets = len(self.pieces)
        """Vectors of parameters; one of buffers may follow."""
        if with_buffers:
            floating = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
            self.names.append(BUFFERS)
            self._add(floating)
        self.sizes = tuple(pieces[-1].end if pieces else 0 for pieces in self.pieces)
        """Elements of each vector on this worker."""

    def __len__(self) -> int:
        return len(self.pieces)

    def _add(self, tensors: Sequence[Tensor]) -> None:
        pieces: list[Piece] = []
        for whole in tensors:
            begin = pieces[-1].end if pieces else 0
            pieces.append(Piece(whole, begin, self.num_parameters + _offset(whole)))
            self.num_parameters += whole.numel()
        self.pieces.append(pieces)

    def read(self, index: int) -> Tensor:
        """Return a copy of a vector `[n]`."""
        result = torch.empty(self.sizes[index], dtype=self.dtype, device=self.device)
        for piece in self.pieces[index]:
            result[piece.begin : piece.end].copy_(piece.local.reshape(-1))
        return result

    def read_all(self) -> list[Tensor]:
        """Return copies of all vectors."""
        return [self.read(index) for index in range(len(self))]

    def write(self, index: int, values_n: Tensor, *, over: float = 1.0) -> None:
        """Give parameters or buffers the values of a vector, divided by a number, in their own dtype."""
        for piece in self.pieces[index]:
            values = values_n[piece.begin : piece.end].view(piece.local.shape)
            if over == 1.0:
                piece.local.copy_(values)
            else:
                torch.div(values, over, out=piece.local)

    def read_gradients(self) -> list[Tensor]:
        """Return copies of the gradients, zero where there is none; buffers are left out."""
        found: list[Tensor] = []
        for index in range(self.parameter_sets):
            result = torch.zeros(self.sizes[index], dtype=self.dtype, device=self.device)
            for piece, param in zip(self.pieces[index], self.units.parameters(index), strict=True):
                if param.grad is not None:
                    result[piece.begin : piece.end].copy_(local_part(param.grad).detach().reshape(-1))
            found.append(result)
        return found

    def write_gradients(self, values: Sequence[Tensor]) -> None:
        """Replace the gradients."""
        for index, values_n in enumerate(values):
            for piece, param in zip(self.pieces[index], self.units.parameters(index), strict=True):
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
                grad = local_part(param.grad)
                grad.copy_(values_n[piece.begin : piece.end].view(grad.shape))

    def located(self, values: Sequence[Tensor], *, with_buffers: bool) -> list[tuple[int, Tensor]]:
        """Return each piece of these vectors and where it lies in the whole model.

        Args:
            values: a vector for each of ours.
            with_buffers: False on all but one worker of a replica, as they hold the same buffers.
        """
        return [
            (piece.origin, values_n[piece.begin : piece.end])
            for name, pieces, values_n in zip(self.names, self.pieces, values, strict=True)
            for piece in (pieces if name != BUFFERS or with_buffers else [])
        ]

    def pack(self, name: str, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return vectors as tensors by parameter, laid out as those are, for a checkpoint."""
        packed: dict[str, Tensor] = {}
        for index, values_n in enumerate(values):
            if self.names[index] == BUFFERS:
                packed[f"{name}/{BUFFERS}"] = values_n
            else:
                named = self.units.named(index, values_n)
                packed |= {f"{name}/{key}": part for key, part in named.items()}
        return packed

    def unpack(self, name: str, packed: Mapping[str, Any], values: list[Tensor]) -> list[Tensor]:
        """Fill vectors with what `pack` was given, and return them.

        Raises:
            UserError: a parameter is missing.
        """
        for key, part in self.pack(name, values).items():
            if key not in packed:
                raise UserError(
                    f"the checkpoint has no {key}; resume with the model and strategy it was saved with"
                )
            local_part(part).copy_(local_part(packed[key]))
        return values

    def zeros(self, *, count: int | None = None, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return zeros for all vectors, or for the first few."""
        return [torch.zeros(n, dtype=dtype or self.dtype, device=self.device) for n in self.sizes[:count]]


def all_finite(parts: Sequence[Tensor]) -> Tensor:
    """Return whether no number is NaN or infinite, 0-d bool; one pass without memory of its own."""
    most = [torch.linalg.vector_norm(part, math.inf) for part in parts if part.numel()]
    return torch.stack(most).isfinite().all() if most else torch.tensor(True)


def _offset(whole: Tensor) -> int:
    """Return how many elements of a tensor lie before this worker's part."""
    if not isinstance(whole, DTensor):
        return 0
    placement = whole.placements[0]
    if not isinstance(placement, ShardPlacement):
        return 0
    if placement.dim != 0:
        raise ValueError(
            f"a parameter is cut along dimension {placement.dim}; replicas gossip when cut along 0"
        )
    rows = -(-whole.shape[0] // whole.device_mesh.size(0))
    first = min(rows * whole.device_mesh.get_local_rank(0), whole.shape[0])
    return first * math.prod(whole.shape[1:])
