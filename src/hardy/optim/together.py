"""Several optimizers as one, for methods that cannot take a whole model: torch's Muon takes matrices only.

Schedulers, checkpoints, gradient scalers and other people's trainers expect one `torch.optim.Optimizer`. Our
own rules need no such thing, since a group chooses its rule (design note 002); this is for those of torch.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hardy.optim._saved import in_our_order

_ABOUT_GROUP = frozenset({"params", "param_names", "kind", "role"})


class Together(Optimizer):
    """Optimizers over disjoint parameters, stepped in turn, with one list of groups and one state.

    What is done to `param_groups` and `state` (a new learning rate, swapped parameters, a load) is done to
    the parts. Each part loads its own state, so the dtypes that it keeps are kept. `defaults` are the
    settings that all groups have.

    Args:
        parts: built optimizers, from now on used through this one. One that needs the closure several times
            in a step (LBFGS) cannot be among them.

    Raises:
        ValueError: no parts, a parameter in two of them, or names in some only.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(3, 2)
        >>> both = Together(
        ...     [
        ...         torch.optim.Muon([("weight", layer.weight)], lr=0.02),
        ...         torch.optim.AdamW([("bias", layer.bias)], lr=0.001),
        ...     ]
        ... )
        >>> [(group["param_names"], group["lr"]) for group in both.param_groups]
        [(['weight'], 0.02), (['bias'], 0.001)]
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        if not parts:
            raise ValueError("Together needs at least one optimizer, got none")
        self.parts = tuple(parts)
        self._counts = tuple(len(part.param_groups) for part in parts)
        self._groups_are_taken = True
        groups = [group for part in parts for group in part.param_groups]
        common = set.intersection(*(set(group) for group in groups)) - _ABOUT_GROUP
        super().__init__(groups, {key: value for key, value in parts[0].defaults.items() if key in common})
        self._groups_are_taken = False
        self._collect_state()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: which part should it go to?

        Raises:
            ValueError: always, once this is built.
        """
        if not self._groups_are_taken:
            names = ", ".join(type(part).__name__ for part in self.parts)
            raise ValueError(
                f"a group cannot be added to optimizers held together ({names}); add it to the one that is "
                f"to update it before they are put together"
            )
        super().add_param_group(param_group)

    @torch.compiler.disable
    @torch.no_grad()
    def step(  # type: ignore[override]  # the decorators' types are too wide for torch's overloads
        self, closure: Callable[[], Any] | None = None
    ) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: called first, once, with gradients enabled; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, _ in self._lent():
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, each part its own; parameters are matched by name (`_saved.py`).

        Raises:
            ValueError: the groups are not those of these optimizers, or a part refuses its state.
        """
        state_dict = {**state_dict, "param_groups": in_our_order(self.param_groups, state_dict)}
        # The groups alone: they are checked and hooks are run; state follows by part, which knows its dtypes.
        super().load_state_dict({**state_dict, "state": {}})
        for part, groups in self._lent():
            saved = state_dict["param_groups"][groups]
            numbers = [number for group in saved for number in group["params"]]
            state = {n: state_dict["state"][n] for n in numbers if n in state_dict["state"]}
            part.load_state_dict({"state": state, "param_groups": saved})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self._collect_state()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs, the parts among it."""
        about = {"parts": self.parts, "_counts": self._counts, "_groups_are_taken": False}
        return super().__getstate__() | about

    def _lent(self) -> Iterator[tuple[Optimizer, slice]]:
        """Yield each part, holding its groups and the state as they are now, and which groups these are."""
        begin = 0
        for part, count in zip(self.parts, self._counts, strict=True):
            groups = slice(begin, begin + count)
            part.param_groups = self.param_groups[groups]
            part.state = self.state
            yield part, groups
            begin += count

    def _collect_state(self) -> None:
        """Make one state of the parts' states, and let them share it."""
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        for part in self.parts:
            state.update(part.state)
        self.state = state
        for part in self.parts:
            part.state = state
