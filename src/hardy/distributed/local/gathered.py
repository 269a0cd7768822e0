"""Weights that FSDP2 gathered before their unit had met: found, and gathered anew.

Paper: "EDiT" (arXiv 2412.07210), layer-wise rounds; this part is ours. A unit meets just before it is
gathered. `FSDPModule.set_modules_to_forward_prefetch` gathers units while an earlier one runs, so they would
compute with weights of before the meeting. torch has no public way to ask for that setting; but after the
gathering each worker can compare its own part with what it holds.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hardy.config import UserError
from hardy.distributed.comm import Communicator
from hardy.distributed.sharded import gather_again, is_shard, is_sharded_unit, local_part, own_part


def keep_fresh(
    model: nn.Module, unit_names: Sequence[str], *, inner: Communicator, meets: Callable[[], bool]
) -> list[RemovableHandle]:
    """Gather units again that were gathered too early; costs one number over `inner` for each unit and round.

    Attach after `fully_shard`: appended, the hook runs when FSDP2 has gathered the unit.

    Args:
        model: as it is trained.
        unit_names: units that meet in the forward pass; what FSDP2 does not shard is left alone.
        inner: the workers of this replica.
        meets: whether a round runs within this forward pass, the same on all of them.
    """
    units = [model.get_submodule(name) for name in unit_names]
    return [
        unit.register_forward_pre_hook(partial(_refresh, _shards(unit), inner=inner, meets=meets))
        for unit in units
        if is_sharded_unit(unit)
    ]


def _shards(unit: nn.Module) -> dict[str, Tensor]:
    """Return the shards of a unit by name; while it is gathered its own names are of other tensors."""
    return {name: param for name, param in unit.named_parameters() if is_shard(param)}


def _refresh(
    shards: dict[str, Tensor],
    unit: nn.Module,
    _args: object,
    *,
    inner: Communicator,
    meets: Callable[[], bool],
) -> None:
    if not (shards and meets()):
        return

    def is_stale() -> bool:
        """All workers of a replica ask, as a worker without a part of its own cannot tell."""
        stale = [_is_stale(unit.get_parameter(name), shard) for name, shard in shards.items()]
        return bool(inner.sum(torch.stack(stale).sum()) > 0)

    if not is_stale():
        return
    gather_again(unit)
    if is_stale():  # nothing shows what is kept but that it heeds no request
        gather_again(unit, is_kept=True)
        if is_stale():
            raise UserError(
                "FSDP2 gathered a unit before its round and cannot gather it again; call its "
                "set_modules_to_forward_prefetch([]), or set strategy.layerwise=false"
            )


def _is_stale(gathered: Tensor, shard: Tensor) -> Tensor:
    """Return whether this worker's part of what was gathered is other than what it holds, 0-d int64."""
    if is_shard(gathered):  # of a unit within, gathered later
        return torch.zeros((), dtype=torch.int64, device=shard.device)
    own = own_part(gathered.detach(), shard)
    held = local_part(shard.detach()).to(own.dtype)
    return ((own != held) & ~(own.isnan() & held.isnan())).any().to(torch.int64)
