"""How workers train together: the five moments at which a strategy may act, and the plainest strategy.

Paper: none; the base of all strategies here. `Synchronous` is ordinary data parallelism.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Strategy:
    """How workers train together: five moments, each empty until a method needs it."""

    def before_forward(self) -> None:
        """Open a round, once a step; only `train/step.py` calls this. Push-sum de-biases here."""

    def before_module_forward(self, name: str) -> None:
        """Act before unit `name` is gathered and run. EDiT finishes the unit's meeting here."""

    def reduce_gradients(self) -> None:
        """Act after the last micro-batch. Data parallel, dSTAR; EDiT settles units that never ran."""

    def after_step(self) -> None:
        """Act after the inner optimizer. Local SGD, DiLoCo, the clock of A-EDiT."""

    def evaluation_parameters(self) -> AbstractContextManager[None]:
        """Show the weights to evaluate, then put the training weights back."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resume needs: tensors and plain values."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""


def watch_units(model: nn.Module, names: Iterable[str], strategy: Strategy) -> list[RemovableHandle]:
    """Call `strategy.before_module_forward` before each unit; attach after `fully_shard`.

    Prepended, so that the strategy acts before FSDP2 gathers the unit; appended, the unit would compute with old
    weights.
    """

    def before(name: str, _module: nn.Module, _args: object) -> None:
        strategy.before_module_forward(name)

    units = [(name, model.get_submodule(name)) for name in names]
    return [unit.register_forward_pre_hook(partial(before, name), prepend=True) for name, unit in units]
