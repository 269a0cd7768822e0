"""Tensors to and from checkpoint files: torch.distributed.checkpoint plans, we write the bytes.

DCP's planners give every piece of every tensor to one worker (replicas share the work) and say, when loading,
which saved pieces make up a shard of any other layout. DCP's own writers would pickle; here each worker
writes its pieces into one safetensors file, and `index.json` says where they belong:
    {"tensors": {key: {"dtype", "shape", "chunks": [{"file", "name", "offset", "shape"}]}}}
"""

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor
from torch.futures import Future

from hardy.config import UserError, reason_of
from hardy.train.durable import DTYPES, dtype_name
from hardy.train.manifest import INDEX, Checkpoint, DamagedError
from hardy.train.peers import Peers

MODEL = "model/"
"""What the keys of a model's tensors begin with."""


@dataclass(frozen=True, kw_only=True)
class WritePlan:
    """What one worker writes."""

    file: str
    """Its file."""
    pieces: dict[str, Tensor]
    """Tensors of the file by name; still the live ones."""
    num_bytes: int
    """Size of all pieces of all workers."""
    index: dict[str, Any] | None
    """Where the pieces of all workers belong; on worker 0 only."""


def plan_write(tensors: Mapping[str, Tensor], peers: Peers) -> WritePlan:
    """Divide the writing among the workers; DTensors are saved shard by shard, equal tensors once.

    Raises:
        UserError: a tensor's dtype cannot be saved.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    index: dict[str, Any] = {}

    def local() -> SavePlan:
        for key, tensor in tensors.items():
            dtype_name(tensor.dtype, of=key)
        planner.set_up_planner(dict(tensors), is_coordinator=peers.rank == 0)
        plan = planner.create_local_plan()
        # An empty shard may have the offset of another worker's full one and would pass for its replica.
        return dataclasses.replace(plan, items=[item for item in plan.items if not _is_empty_shard(item)])

    def together(plans: list[SavePlan]) -> list[tuple[SavePlan, int]]:
        divided, _ = planner.create_global_plan(plans)
        index["tensors"] = {}
        num_bytes = sum(_add_to_index(index["tensors"], plan, rank) for rank, plan in enumerate(divided))
        return [(plan, num_bytes) for plan in divided]

    plan, num_bytes = peers.agree(local, together)
    plan = planner.finish_plan(plan)
    pieces: dict[str, Tensor] = {}
    for item in plan.items:
        name, piece = _piece_name(item), planner.resolve_data(item)
        assert isinstance(piece, Tensor) and name not in pieces, f"piece {name} is no tensor or comes twice"
        pieces[name] = piece
    return WritePlan(file=_rank_file(peers.rank), pieces=pieces, num_bytes=num_bytes, index=index or None)


def copy_to_memory(pieces: Mapping[str, Tensor], *, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in memory that later changes do not reach, in the last call's `buffers` if they fit."""
    copies: dict[str, Tensor] = {}
    for name, piece in pieces.items():
        buffer = buffers.get(name)
        if buffer is None or buffer.shape != piece.shape or buffer.dtype != piece.dtype:
            buffer = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=piece.is_cuda)
        copies[name] = buffer.copy_(piece.detach(), non_blocking=True)
    if any(piece.is_cuda for piece in pieces.values()):
        torch.cuda.synchronize()
    return copies


def _rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"


def _piece_name(item: WriteItem) -> str:
    """Return the tensor's key, with the offset when the item is a part of it."""
    data = item.tensor_data
    whole = data is None or data.chunk.sizes == data.size
    return item.index.fqn if whole else f"{item.index.fqn}@{','.join(map(str, item.index.offset or ()))}"


def _is_empty_shard(item: WriteItem) -> bool:
    data = item.tensor_data
    return data is not None and math.prod(data.chunk.sizes) == 0 and math.prod(data.size) > 0


def _add_to_index(index: dict[str, Any], plan: SavePlan, rank: int) -> int:
    """Add what worker `rank` writes to the index and return its bytes."""
    num_bytes = 0
    for item in plan.items:
        data = item.tensor_data
        assert data is not None, "only tensors are planned"
        dtype = data.properties.dtype
        entry = index.setdefault(
            item.index.fqn,
            {"dtype": dtype_name(dtype, of=item.index.fqn), "shape": list(data.size), "chunks": []},
        )
        chunk = {"offset": list(data.chunk.offsets), "shape": list(data.chunk.sizes)}
        entry["chunks"].append({"file": _rank_file(rank), "name": _piece_name(item), **chunk})
        num_bytes += math.prod(data.chunk.sizes) * dtype.itemsize
    return num_bytes


def mesh_of(tensors: Mapping[str, Tensor]) -> dict[str, int] | None:
    """Return the axes and sizes of the device mesh the tensors live on, None for plain tensors."""
    for tensor in tensors.values():
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            names = mesh.mesh_dim_names or [f"axis_{i}" for i in range(mesh.ndim)]
            return dict(zip(names, mesh.shape, strict=True))
    return None


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """A tensor of a checkpoint, all workers together."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[dict[str, Any], ...]


def read_index(checkpoint: Checkpoint) -> dict[str, SavedTensor]:
    """Return what tensors a checkpoint holds.

    Raises:
        DamagedError: it cannot be read, names a file the manifest does not, or leaves out parts of a tensor.
    """
    try:
        document = json.loads((checkpoint.folder / INDEX).read_bytes())
        saved = {key: _saved_tensor(entry) for key, entry in document["tensors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{checkpoint.folder}: {INDEX} cannot be read ({reason_of(error)})") from error
    for key, tensor in saved.items():
        unknown = {chunk["file"] for chunk in tensor.chunks} - checkpoint.files.keys()
        covered = sum(math.prod(chunk["shape"]) for chunk in tensor.chunks)
        if unknown or covered != math.prod(tensor.shape):
            fault = f"names {sorted(unknown)}" if unknown else f"covers {covered} elements of {tensor.shape}"
            raise DamagedError(f"{checkpoint.folder}: {INDEX} {fault} for {key}")
    return saved


def _saved_tensor(entry: dict[str, Any]) -> SavedTensor:
    return SavedTensor(
        dtype=DTYPES[entry["dtype"]], shape=tuple(entry["shape"]), chunks=tuple(entry["chunks"])
    )


class SafetensorsReader(StorageReader):
    """Reads a checkpoint for torch.distributed.checkpoint, so `dcp.load` of any program can.

    Args:
        checkpoint: what to read; verify it before.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._places: dict[MetadataIndex, tuple[str, str]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Keep the checkpoint given at the start."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return sizes, dtypes and pieces of all tensors."""
        entries: dict[str, Any] = {}
        for key, saved in read_index(self._checkpoint).items():
            chunks = [
                ChunkStorageMetadata(torch.Size(chunk["offset"]), torch.Size(chunk["shape"]))
                for chunk in saved.chunks
            ]
            properties = TensorProperties(dtype=saved.dtype)
            entries[key] = TensorStorageMetadata(properties, torch.Size(saved.shape), chunks)
            for chunk in saved.chunks:
                self._places[MetadataIndex(key, chunk["offset"])] = (chunk["file"], chunk["name"])
        return Metadata(entries)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Need nothing."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the wanted parts of the pieces into their places."""
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self._places[item.storage_index][0], []).append(item)
        for file, items in by_file.items():
            with safe_open(self._checkpoint.folder / file, framework="pt") as pieces:
                for item in items:
                    piece = pieces.get_slice(self._places[item.storage_index][1])
                    wanted = zip(item.storage_offsets, item.lengths, strict=True)
                    target = planner.resolve_tensor(item)
                    target.detach().copy_(piece[tuple(slice(start, start + size) for start, size in wanted)])
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return False: a reader is made for a checkpoint, not found by its path."""
        return False


def fill(targets: dict[str, Tensor], checkpoint: Checkpoint, group: dist.ProcessGroup | None = None) -> None:
    """Copy a checkpoint's values into tensors of any layout, in place.

    Args:
        targets: the tensors by key.
        checkpoint: where from.
        group: processes that load together and fail together; none means this one for itself.

    Raises:
        UserError: a tensor is not in the checkpoint, or has another shape or dtype there.
        RuntimeError: reading failed, here or on another worker.
    """
    saved = read_index(checkpoint)
    for key, target in targets.items():
        now = f"shape {tuple(target.shape)} and {target.dtype}"
        before = f"shape {saved[key].shape} and {saved[key].dtype}" if key in saved else "nothing"
        if now != before:  # copying would stretch or round it without a word
            raise UserError(
                f"{key} has {now} in the run but {before} in {checkpoint.folder}; use the config it was "
                f"saved with"
            )
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with (
            warnings.catch_warnings()
        ):  # torch warns that it loads in one process, which is what was asked for
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(
                targets,
                storage_reader=SafetensorsReader(checkpoint),
                planner=planner,
                process_group=group,
                no_dist=group is None,
            )
    except CheckpointException as error:  # a BaseException
        raise RuntimeError(f"{checkpoint.folder} could not be loaded: {error}") from error


def load_model_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the whole model of a checkpoint by canonical names, in memory, without any processes."""
    targets = {
        key: torch.empty(tensor.shape, dtype=tensor.dtype)
        for key, tensor in read_index(checkpoint).items()
        if key.startswith(MODEL)
    }
    fill(targets, checkpoint)
    return {key.removeprefix(MODEL): tensor for key, tensor in targets.items()}
