"""Gradient release: each parameter is updated inside the backward pass, as soon as its gradient is complete.

So the gradients of a whole model never exist at once: peak gradient memory is that of one parameter, or of
one FSDP2 unit. One optimizer object stays in charge; schedulers, checkpoints and `zero_grad` are used as
ever. Source: the idea is old practice ("optimizer in backward", LOMO, arXiv 2306.09782); APOLLO uses it for
its smallest memory.
"""

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from hardy.optim._sharded import ProcessGroup, Split, own_groups, units_of

log = logging.getLogger(__name__)

Update = Callable[[list[Tensor], Callable[[Split], ProcessGroup]], None]
"""Takes parameters that have their gradients and the process groups to use; updates them."""


class GradientRelease:
    """Hooks that update a unit of parameters once all its gradients are there, and then drop them.

    A unit is one plain parameter, or what FSDP2 reduces together; its collectives go over process groups of
    their own, so that they never stand between those of the backward pass.

    Args:
        model: its parameters are watched.
        params: those of the optimizer; all must belong to the model.
        splits: mesh axes that cut them.
        update: called with a unit's parameters; does not drop gradients.
        accumulation_steps: backward passes that add up to one step. Under FSDP2 with
            `set_requires_gradient_sync(False)` the hooks fire in the last one only: leave it at 1.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Tensor],
        *,
        splits: Iterable[Split],
        update: Update,
        accumulation_steps: int,
    ) -> None:
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}")
        if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise ValueError(
                "gradients cannot be released under DistributedDataParallel, which averages them only "
                "after the hooks ran; use fully_shard (FSDP2), on a (replicate, shard) mesh for replicas"
            )
        if accumulation_steps > 1:
            log.warning(
                "gradients are released in the last of the %d backward passes of a step only, and all are "
                "kept until then; to save memory throughout, let train.micro_packs make one of them",
                accumulation_steps,
            )
        self.num_updates = 0
        """Units updated since the last `finish`."""
        self._update = update
        self._group_of = own_groups(splits)
        self._accumulation_steps = accumulation_steps
        self._units = units_of(model, list(params))
        self._unit_of = {param: index for index, unit in enumerate(self._units) for param in unit}
        self._fired: dict[Tensor, int] = {}
        self._waiting: list[set[Tensor]] = [set() for _ in self._units]
        self._handles: list[RemovableHandle] = [
            param.register_post_accumulate_grad_hook(self._on_gradient) for param in self._unit_of
        ]

    def _on_gradient(self, param: Tensor) -> None:
        self._fired[param] = self._fired.get(param, 0) + 1
        if self._fired[param] < self._accumulation_steps:
            return
        self._fired[param] = 0
        index = self._unit_of[param]
        self._waiting[index].add(param)
        if len(self._waiting[index]) == len(self._units[index]):
            self._update_unit(index)

    @torch.no_grad()
    def _update_unit(self, index: int) -> None:
        unit = self._units[index]
        self._update(unit, self._group_of)
        self._waiting[index].clear()
        self.num_updates += 1
        for param in unit:
            self._fired[param] = 0
            param.grad = None

    def check(self, params: Iterable[Tensor]) -> None:
        """Refuse parameters that came, or were unfrozen, after the hooks: they would never be updated."""
        if any(param not in self._unit_of for param in params):
            raise ValueError(
                "parameters were added or unfrozen after enable_release, which does not watch them; call "
                "enable_release again"
            )

    def finish(self) -> bool:
        """Update units that wait for a gradient that never came, or that some backward passes left out.

        Returns whether any unit was updated since the last call.
        """
        for index, unit in enumerate(self._units):
            if self._waiting[index] or any(self._fired.get(param) for param in unit):
                self._update_unit(index)
        updated = self.num_updates > 0
        self.num_updates = 0
        return updated

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
