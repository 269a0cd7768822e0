"""A model as units, each one flat fp32 vector of what this worker holds of it.

A unit is what replicas exchange as a whole: a block, or unit 0 with all that no block owns. Under FSDP2 the
vector is this worker's shard, and may be empty.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hardy.config import ConfigError, unknown_name
from hardy.distributed.sharded import local_part


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """One parameter's place in the vector of its unit."""

    name: str
    param: Tensor
    begin: int
    end: int

    @property
    def local(self) -> Tensor:
        """What this worker holds, in the parameter's memory of now: `model.to` may give it another."""
        return local_part(self.param).detach()


class Units:
    """The trainable parameters of a model by unit; the same order on all workers.

    Args:
        model: as it is trained: plain, or sharded by FSDP2 over a mesh of one dimension.
        names: submodules that are units, in the order of the forward pass. What they leave is unit 0.

    Raises:
        ConfigError: no parameter trains, or a unit is named that is none.
        ValueError: a parameter is sharded over a mesh of several dimensions, or is not a floating tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1, bias=False))
        >>> Units(model, ["1"]).sizes
        (3, 1)
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        known = {".".join(_unwrapped(name)) for name, _ in model.named_modules()} - {""}
        for name in names:
            if name not in known:
                raise ConfigError(unknown_name(name, "submodule to be a unit,", known))
        if not any(param.requires_grad for param in model.parameters()):
            raise ConfigError("the model has no parameter that trains, so replicas have nothing to exchange")
        self.names = ("", *names)
        """Of the units; the first, the root, has none."""
        self._pieces: list[list[_Piece]] = [[] for _ in self.names]
        number_of = {name: number for number, name in enumerate(self.names)}
        for name, param in model.named_parameters():  # shared ones once
            if param.requires_grad:
                _check(name, param)
                unit = next((number_of[head] for head in _heads(name) if head in number_of), 0)
                self._add(unit, name, param)
        self.sizes = tuple(pieces[-1].end if pieces else 0 for pieces in self._pieces)
        """Elements of each unit on this worker."""
        self.is_sharded = any(isinstance(p, DTensor) for p in model.parameters())
        first = next(iter(model.parameters()))
        self.device = first.device
        """Where the parameters live."""

    def __len__(self) -> int:
        return len(self.names)

    def _add(self, unit: int, name: str, param: Tensor) -> None:
        pieces = self._pieces[unit]
        begin = pieces[-1].end if pieces else 0
        pieces.append(_Piece(name, param, begin, begin + local_part(param).numel()))

    def parameters(self, unit: int) -> list[Tensor]:
        """Return the parameters of a unit."""
        return [piece.param for piece in self._pieces[unit]]

    def read(self, unit: int) -> Tensor:
        """Return a unit's parameters as a new fp32 vector `[n]`."""
        result = torch.empty(self.sizes[unit], dtype=torch.float32, device=self.device)
        for piece in self._pieces[unit]:
            result[piece.begin : piece.end].copy_(piece.local.reshape(-1))
        return result

    def write(self, unit: int, values_n: Tensor, *, mix: float = 0.0) -> None:
        """Give a unit's parameters the values of a vector, in their own dtype.

        Args:
            unit: which.
            values_n: fp32 `[n]`, on any device.
            mix: the share of their own values that they keep.
        """
        for piece in self._pieces[unit]:
            local = piece.local
            new = values_n[piece.begin : piece.end].view(local.shape).to(local.device)
            if mix:
                new = torch.lerp(new, local.float(), mix)
            local.copy_(new)

    def named(self, unit: int, values_n: Tensor) -> dict[str, Tensor]:
        """Return a vector as tensors by parameter, laid out as the parameters are, sharing its memory."""
        result: dict[str, Tensor] = {}
        for piece in self._pieces[unit]:
            local = values_n[piece.begin : piece.end].view(piece.local.shape)
            param = piece.param
            if isinstance(param, DTensor):
                mesh, placements = param.device_mesh, param.placements
                local = DTensor.from_local(
                    local, mesh, placements, run_check=False, shape=param.shape, stride=param.stride()
                )
            result[piece.name] = local
        return result


def _heads(name: str) -> Iterable[str]:
    """Yield the submodules that a parameter's name goes through, the innermost first; wrappers left out."""
    parts = _unwrapped(name)
    for length in range(len(parts) - 1, 0, -1):
        yield ".".join(parts[:length])


def _unwrapped(name: str) -> list[str]:
    return [part for part in name.split(".") if part not in ("module", "_orig_mod")]


def _check(name: str, param: Tensor) -> None:
    if not param.is_floating_point():
        raise ValueError(f"parameter {name} is {param.dtype}; only floating parameters are exchanged")
    if isinstance(param, DTensor) and param.device_mesh.ndim != 1:
        raise ValueError(
            f"parameter {name} is sharded over a mesh of {param.device_mesh.ndim} dimensions; replicas that "
            f"train alone are sharded over their own workers: pass a mesh of one dimension to fully_shard"
        )
