"""Where the local part of a parameter lies in the whole, and the three exchanges of an optimizer step.

The only file of the room that may talk to other workers. Nothing here is entered for plain tensors.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from hardy._compat import all_gather_single, reduce_scatter_single


@dataclass(frozen=True)
class Split:
    """One mesh axis that cuts one dimension of a tensor among its workers."""

    dim: int
    mesh: DeviceMesh
    axis: int

    @property
    def size(self) -> int:
        """Workers on this axis."""
        return self.mesh.size(self.axis)

    @property
    def rank(self) -> int:
        """This worker's place on the axis."""
        return self.mesh.get_local_rank(self.axis)


@dataclass(frozen=True)
class Shard:
    """The part of a tensor that this worker holds; a plain tensor is held whole."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    """Index in the whole of the first local element, by dimension."""
    local_shape: tuple[int, ...]
    splits: tuple[Split, ...] = ()
    """Axes that cut the tensor; replicating axes are left out."""
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()

    def splits_of(self, dim: int) -> tuple[Split, ...]:
        """Return the axes that cut `dim`."""
        return tuple(split for split in self.splits if split.dim == dim)

    def largest(self, dim: int) -> int:
        """Return the length of `dim` on the worker that holds most of it."""
        size = self.shape[dim]
        for split in self.splits_of(dim):
            size = -(-size // split.size)
        return size

    def wrap(self, local: Tensor, shape: Sequence[int], dims: Mapping[int, int]) -> Tensor:
        """Return state that is sharded as the parameter is: a DTensor, or `local` itself if no axis cuts it.

        Args:
            local: this worker's part, laid out in chunks as DTensor does.
            shape: of the whole state tensor.
            dims: for each cut dimension of the parameter, the dimension of the state that the same axis cuts;
                axes of dimensions left out hold equal copies.
        """
        if self.mesh is None or not any(split.dim in dims for split in self.splits):
            return local
        cut = {split.axis: split.dim for split in self.splits if split.dim in dims}
        placements = [
            Replicate()
            if axis not in cut
            else placement
            if dims[cut[axis]] == cut[axis]
            else ShardPlacement(dims[cut[axis]])
            for axis, placement in enumerate(self.placements)
        ]
        stride = tuple(torch.empty(tuple(shape), device="meta").stride())
        return DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )


def shard_of(param: Tensor, name: str) -> Shard:
    """Return where this worker's part of `param` lies.

    Raises:
        ValueError: the parameter is a partial sum, or cut in a way that torch.chunk does not cut.
    """
    shape = tuple(param.shape)
    if not isinstance(param, DTensor):
        return Shard(shape, (0,) * len(shape), shape)
    mesh, placements = param.device_mesh, tuple(param.placements)
    size, offset, splits = list(shape), [0] * len(shape), []
    # A strided shard is FSDP over a dimension that tensor parallelism cut before, though its axis comes
    # first.
    for axis in sorted(range(mesh.ndim), key=lambda axis: getattr(placements[axis], "split_factor", 1) > 1):
        placement = placements[axis]
        if placement.is_replicate():
            continue
        if placement.is_partial():
            raise ValueError(
                f"parameter {name} is a partial sum over workers ({placement}); optimizers need values"
            )
        dim = getattr(placement, "dim", 0) % len(shape)
        chunk = -(-size[dim] // mesh.size(axis))
        start = min(chunk * mesh.get_local_rank(axis), size[dim])
        offset[dim] += start
        size[dim] = min(chunk, size[dim] - start)
        splits.append(Split(dim, mesh, axis))
    local_shape = tuple(param.to_local().shape)
    if local_shape != tuple(size) and 0 not in local_shape:
        raise ValueError(
            f"parameter {name} of shape {shape} with placements {placements} holds {local_shape} here where "
            f"{tuple(size)} was expected; only shards as torch.chunk cuts them are understood"
        )
    return Shard(shape, tuple(offset), local_shape, tuple(splits), mesh, placements)


def local_part(x: Tensor) -> Tensor:
    """Return the part of `x` on this worker; it shares its memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def laid_out(grad: Tensor, shard: Shard) -> Tensor:
    """Return the gradient cut as its parameter is."""
    if isinstance(grad, DTensor) and tuple(grad.placements) != shard.placements:
        return grad.redistribute(placements=shard.placements)
    return grad


def gather_whole(x: Tensor) -> Tensor:
    """Return all of `x` as a plain tensor; every worker that shares it must call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def copy_of_first(x: Tensor, splits: Sequence[Split]) -> None:
    """Overwrite `x` by the value of the first worker on each axis, so that copies are equal bit for bit."""
    for split in splits:
        group = split.mesh.get_group(split.axis)
        dist.broadcast(x, group=group, group_src=0)


@dataclass
class Sum:
    """Add `tensor` up over the workers of the axes, in place."""

    tensor: Tensor
    splits: tuple[Split, ...]


@dataclass
class Scatter:
    """Add the `[rows, C]` tensor up over the workers of one axis and keep this worker's columns of it.

    Columns are cut as torch.chunk cuts them. Without an axis the result is the tensor.
    """

    tensor: Tensor
    split: Split | None
    result: Tensor = field(init=False)


@dataclass
class Gather:
    """Lay the workers' columns `[rows, own]` side by side again, `[rows, C]`."""

    tensor: Tensor
    num_columns: int
    split: Split | None
    result: Tensor = field(init=False)


@dataclass
class Round:
    """What a rule wants exchanged before it goes on."""

    sums: list[Sum] = field(default_factory=list)
    scatters: list[Scatter] = field(default_factory=list)
    gathers: list[Gather] = field(default_factory=list)


GroupOf = Callable[[Split], ProcessGroup]
AlongAxis = TypeVar("AlongAxis", Scatter, Gather)


def own_columns(num_columns: int, split: Split | None) -> tuple[int, int]:
    """Return begin and end of this worker's columns."""
    if split is None:
        return 0, num_columns
    chunk = -(-num_columns // split.size)
    begin = min(chunk * split.rank, num_columns)
    return begin, min(begin + chunk, num_columns)


def exchange(rounds: Iterable[Round], *, group_of: GroupOf) -> None:
    """Do what all rules of a step want exchanged now: one collective for each process group involved.

    Sums ride along in a reduce-scatter when the group has one. All workers of a group must come with the same
    requests in the same order.
    """
    sums: dict[ProcessGroup, list[Sum]] = {}
    scatters: dict[ProcessGroup, list[tuple[Scatter, Split]]] = {}
    gathers: dict[ProcessGroup, list[tuple[Gather, Split]]] = {}
    for wanted in rounds:
        _sort_by_group(wanted.scatters, scatters, group_of)
        _sort_by_group(wanted.gathers, gathers, group_of)
        for request in wanted.sums:
            for split in request.splits:
                sums.setdefault(group_of(split), []).append(request)
    for group in {**scatters, **sums}:
        if group in scatters:
            _reduce_scatter(scatters[group], sums.get(group, []), group)
        else:
            _all_reduce(sums[group], group)
    for group, requests in gathers.items():
        _all_gather(requests, group)


def _sort_by_group(
    requests: Iterable[AlongAxis],
    by_group: dict[ProcessGroup, list[tuple[AlongAxis, Split]]],
    group_of: GroupOf,
) -> None:
    """File the requests by process group; without an axis a request is answered by itself."""
    for request in requests:
        if request.split is None:
            request.result = request.tensor
        else:
            by_group.setdefault(group_of(request.split), []).append((request, request.split))


def _all_reduce(requests: list[Sum], group: ProcessGroup) -> None:
    for same in _by_dtype(requests):
        flat = torch.cat([request.tensor.reshape(-1) for request in same])
        dist.all_reduce(flat, group=group)
        _hand_out(flat, same)


def _reduce_scatter(scatters: list[tuple[Scatter, Split]], sums: list[Sum], group: ProcessGroup) -> None:
    size = scatters[0][1].size
    dtype = scatters[0][0].tensor.dtype
    pieces = []
    for request, _ in scatters:
        rows, num_columns = request.tensor.shape
        chunk = -(-num_columns // size)
        padded = request.tensor.new_zeros(rows, size * chunk)
        padded[:, :num_columns] = request.tensor
        pieces.append(padded.view(rows, size, chunk).transpose(0, 1).reshape(size, rows * chunk))
    riding = [request for request in sums if request.tensor.dtype == dtype]
    pieces += [request.tensor.reshape(1, -1).expand(size, -1) for request in riding]
    sent = torch.cat(pieces, dim=1)
    received = sent.new_empty(sent.shape[1])
    reduce_scatter_single()(received, sent.reshape(-1), group=group)
    at = 0
    for request, split in scatters:
        rows, num_columns = request.tensor.shape
        chunk = -(-num_columns // size)
        begin, end = own_columns(num_columns, split)
        request.result = received[at : at + rows * chunk].view(rows, chunk)[:, : end - begin].contiguous()
        at += rows * chunk
    _hand_out(received[at:], riding)
    others = [request for request in sums if request.tensor.dtype != dtype]
    if others:
        _all_reduce(others, group)


def _all_gather(requests: list[tuple[Gather, Split]], group: ProcessGroup) -> None:
    size = requests[0][1].size
    padded = []
    for request, _ in requests:
        rows, own = request.tensor.shape
        chunk = -(-request.num_columns // size)
        piece = request.tensor.new_zeros(rows, chunk)
        piece[:, :own] = request.tensor
        padded.append(piece.reshape(-1))
    sent = torch.cat(padded)
    received = sent.new_empty(size * sent.numel())
    all_gather_single()(received, sent, group=group)
    parts = received.view(size, -1)
    at = 0
    for request, _ in requests:
        rows = request.tensor.shape[0]
        chunk = -(-request.num_columns // size)
        piece = parts[:, at : at + rows * chunk].reshape(size, rows, chunk)
        whole = piece.transpose(0, 1).reshape(rows, size * chunk)
        request.result = whole[:, : request.num_columns].contiguous()
        at += rows * chunk


def _hand_out(flat: Tensor, requests: list[Sum]) -> None:
    """Copy the parts of a summed bucket back to where they came from."""
    sizes = [request.tensor.numel() for request in requests]
    for request, part in zip(requests, flat.split(sizes), strict=True):
        request.tensor.copy_(part.view(request.tensor.shape))


def _by_dtype(requests: list[Sum]) -> list[list[Sum]]:
    kinds: dict[torch.dtype, list[Any]] = {}
    for request in requests:
        kinds.setdefault(request.tensor.dtype, []).append(request)
    return list(kinds.values())


def units_of(model: Any, params: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return which parameters get their gradients together: those of one FSDP2 unit; plain ones alone."""
    wanted = set(params)
    units: list[list[Tensor]] = []
    for module in reversed([module for module in model.modules() if isinstance(module, FSDPModule)]):
        unit: list[Tensor] = [param for param in cast(nn.Module, module).parameters() if param in wanted]
        if unit:
            units.append(unit)
            wanted -= set(unit)
    return units + [[param] for param in params if param in wanted]


def own_groups(splits: Iterable[Split]) -> GroupOf:
    """Return process groups like those of the axes, used by nobody else; all their workers call this."""
    groups: dict[tuple[DeviceMesh, int], Any] = {}
    for split in splits:
        axis = (split.mesh, split.axis)
        if axis not in groups:
            ranks = dist.get_process_group_ranks(split.mesh.get_group(split.axis))
            groups[axis] = dist.new_group(ranks, use_local_synchronization=True)
    return lambda split: groups[split.mesh, split.axis]


def is_sharded(x: Tensor) -> bool:
    """Whether workers hold different parts of `x`."""
    return isinstance(x, DTensor) and not all(placement.is_replicate() for placement in x.placements)
