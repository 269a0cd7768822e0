"""One model on several workers: DDP, FSDP2 or both (HSDP), by public hooks only.

Papers: S. Li et al., "PyTorch Distributed", 2020 (DDP); Y. Zhao et al., "PyTorch FSDP", 2023; FSDP2 is its
successor, one DTensor per parameter. Every wrapper averages gradients over all workers; after the backward
pass a parameter's `grad` is whole under DDP and this worker's shard under FSDP2 and HSDP.
"""

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from hardy._compat import sync_buffers_option
from hardy.config import ConfigError, UserError
from hardy.distributed.comm import Communicator, TorchComm

Sharding: TypeAlias = tuple[DeviceMesh, tuple[Placement, ...]]
"""How a DTensor lies on the workers."""


def parallelize(
    model: nn.Module,
    comm: Communicator,
    *,
    replicas: int,
    shards: int,
    unit_names: Iterable[str],
    device_type: Literal["cpu", "cuda"],
    precision: Literal["fp32", "bf16"],
) -> nn.Module:
    """Return the model as `replicas` x `shards` workers train it; all workers call this with the same model.

    Without shards the parameters must have values: DDP sends worker 0's to all. With shards they may be on
    the meta device; then `model.to_empty(device=...)` and `place` on each parameter give them values.
    Parameters outside the units, such as tied embedding and head, form the last unit, the root. Simulated
    workers keep the plain model, and `Synchronous` averages its gradients.

    Args:
        model: changed in place by sharding.
        comm: all workers.
        replicas: whole copies of the model.
        shards: workers that share one copy; shards of one replica are neighbours in rank.
        unit_names: submodules that are gathered as a whole, in the order of the forward pass.
        device_type: where the model lives.
        precision: bf16 gathers sharded parameters in bf16 and still reduces gradients in fp32 (CUDA only).

    Raises:
        ConfigError: simulated workers were asked to share a model.
    """
    if replicas * shards != comm.size:
        raise ValueError(f"a mesh of {replicas} x {shards} does not hold {comm.size} workers")
    if shards > 1 and not isinstance(comm, TorchComm):
        raise ConfigError(
            f"strategy.mesh.shards is {shards}, but simulated workers cannot share one model; set it to 1, "
            f"or start real workers"
        )
    if comm.size == 1 or not isinstance(comm, TorchComm):
        return model
    if shards == 1:
        # A parameter that is one element many times over (int8 weights have such) cannot be sent around; its
        # buffers, like all weights here, are the same on every worker from the start.
        virtual = any(0 in param.stride() for param in model.parameters() if param.numel() > 1)
        options: dict[str, Any] = {"init_sync": False, sync_buffers_option(): False} if virtual else {}
        return DistributedDataParallel(
            model, process_group=comm.group, gradient_as_bucket_view=True, **options
        )
    policy = MixedPrecisionPolicy()
    if precision == "bf16" and device_type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = _mesh(comm, device_type, replicas=replicas, shards=shards)
    for name in sorted(unit_names, key=lambda name: -name.count(".")):  # inner units before those around them
        fully_shard(model.get_submodule(name), mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def _mesh(comm: TorchComm, device_type: str, *, replicas: int, shards: int) -> DeviceMesh:
    """Return the workers as a line of shards, or as a grid with one replica per row."""
    if comm.group is not None:
        if replicas > 1:
            raise ConfigError(
                f"workers that train alone as a group cannot be {replicas} replicas x {shards} shards at once"
            )
        return DeviceMesh.from_group(comm.group, device_type, mesh_dim_names=("shard",))
    if replicas == 1:
        return init_device_mesh(device_type, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicas, shards), mesh_dim_names=("replicate", "shard"))


def check_same(model: nn.Module, comm: Communicator, *, settings: str) -> None:
    """Refuse real processes whose models or settings differ: gloo would end one of them without a word.

    Simulated workers are told at their first collective.

    Args:
        model: as it is trained; names, whole shapes, dtypes and what trains must be alike, values need not.
        comm: who must hold the same.
        settings: of the strategy, in words.

    Raises:
        UserError: on all of them.
    """
    if comm.size == 1 or not isinstance(comm, TorchComm):
        return
    layout = [
        (name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in bare(model).named_parameters()
    ]
    prints = [zlib.crc32(repr(text).encode()) for text in (layout, settings)]
    device = next((param.device for param in model.parameters()), None)
    rows = comm.all_gather(torch.tensor(prints, dtype=torch.int64, device=device)).tolist()
    for column, what in enumerate(("parameters (names, shapes, dtypes, which train)", "strategy settings")):
        others = [rank for rank, row in enumerate(rows) if row[column] != rows[0][column]]
        if others:
            raise UserError(
                f"workers {others} have other {what} than worker 0; give all the same model and settings"
            )


def bare(model: nn.Module) -> nn.Module:
    """Return the model inside a wrapper that hides it (DDP); FSDP2 leaves a model what it was."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def averages_in_backward(model: nn.Module) -> bool:
    """Whether the wrapper of `model` averages gradients over the workers during the backward pass."""
    return isinstance(model, DistributedDataParallel | FSDPModule)


@contextmanager
def accumulating(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Hold the averaging of gradients back until the `last` micro-batch of a step.

    Forward and backward pass both belong inside. Until the last one FSDP2 keeps whole gradients, not shards.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    yield


def run_freely(model: nn.Module, *, last: bool) -> None:
    """Let a worker have other numbers of micro-batches than others; call before each, inside `accumulating`.

    FSDP2 then gathers weights in the first only and keeps them until the `last` backward pass: a worker that
    gathered more often than the others would wait for them for ever. Others need nothing.
    """
    if isinstance(model, FSDPModule):
        model.set_reshard_after_forward(False)
        model.set_reshard_after_backward(last)


def place(param: Tensor, full: Tensor) -> None:
    """Give `param` the values of `full`, in place: of a sharded parameter its own shard, without
    communication.

    Outside a forward pass only: then FSDP2 parameters are shards.

    Args:
        param: a parameter, plain or sharded.
        full: all its values, the same on every worker; any device and floating dtype.
    """
    with torch.no_grad():
        full = full.detach().to(device=param.device, dtype=param.dtype)
        if isinstance(param, DTensor):
            full = distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
        param.copy_(full)


def gather_full(param: Tensor) -> Tensor:
    """Return all values of `param` as a plain tensor; collective over the workers that share it."""
    detached = param.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients together, a 0-d fp64 tensor, without waiting for a GPU.

    Shards count once, wherever they lie: one small sum over the workers per kind of sharding. Parameters
    without gradient count zero; all workers must have gradients for the same ones.
    """
    grads_by_sharding: dict[Sharding | None, list[Tensor]] = defaultdict(list)
    for grad in _gradients(parameters):
        sharding = (grad.device_mesh, tuple(grad.placements)) if isinstance(grad, DTensor) else None
        grads_by_sharding[sharding].append(local_part(grad))
    squares = [_over_shards(_square(grads), sharding) for sharding, grads in grads_by_sharding.items()]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)


def clip_gradients(parameters: Iterable[Tensor], *, norm: Tensor, clip_norm: float) -> None:
    """Scale all gradients in place so that their norm, now `norm`, is at most `clip_norm`.

    As in torch, the factor is clip_norm / (norm + 1e-6) where that is below 1. Does not wait for a GPU.
    """
    factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in _gradients(parameters):
        local_part(grad).mul_(factor)


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [param.grad for param in parameters if param.grad is not None]


def is_sharded_unit(module: nn.Module) -> bool:
    """Whether FSDP2 gathers the parameters of `module` as a whole."""
    return isinstance(module, FSDPModule)


def gather_again(module: nn.Module, *, is_kept: bool = False) -> None:
    """Gather a unit whose parameters are whole from their shards anew; collective over those who share it.

    Args:
        module: a sharded unit, just before its forward pass.
        is_kept: whether it stays whole after that (`reshard_after_forward=False`), and so heeds no `reshard`.
    """
    assert isinstance(module, FSDPModule), "others have nothing to gather"
    if is_kept:
        module.set_reshard_after_forward(True, recurse=False)
    module.reshard()
    module.unshard()
    if is_kept:
        module.set_reshard_after_forward(False, recurse=False)


def is_shard(x: Tensor) -> bool:
    """Whether `x` is spread over workers."""
    return isinstance(x, DTensor)


def own_part(full: Tensor, like: Tensor) -> Tensor:
    """Return of `full`, the same on all workers, what this worker holds of `like`; no communication."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def local_part(x: Tensor) -> Tensor:
    """Return the part of `x` on this worker; it shares its memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def _square(grads: list[Tensor]) -> Tensor:
    """Return the squared norm of plain tensors, fp64; what is narrower than fp32 is added up in fp32."""
    wide = [
        g if g.dtype in (torch.float32, torch.float64) else torch.linalg.vector_norm(g, dtype=torch.float32)
        for g in grads
    ]
    return nn.utils.get_total_norm(wide).double().square()


def _over_shards(square: Tensor, sharding: Sharding | None) -> Tensor:
    """Add up the parts of one kind of sharding over the mesh axes that split it."""
    if sharding is None:
        return square
    mesh, placements = sharding
    parts = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    return DTensor.from_local(square, mesh, parts, run_check=False).full_tensor()
