"""The outer optimizer: moves the anchor by the aggregated pseudo-gradient, as if that were a gradient.

Papers: A. Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023 (arXiv
2311.08105); J. Cheng et al., "EDiT", 2024 (arXiv 2412.07210). Both take SGD with Nesterov momentum.
Letters: A anchor, S aggregated pseudo-gradient, B momentum, m its decay, lr outer learning rate; each a flat
vector of the n elements of one unit that this worker holds.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hardy.config import ConfigError, class_at

Factory = Callable[[list[nn.Parameter]], Optimizer]

STEPS = "outer_steps"
"""Name under which `TorchOuter` keeps the number of its steps: until the first, its state does not count."""


class OuterOptimizer(Protocol):
    """Moves anchors. Equal A, S and state give equal A on all replicas."""

    def start_if_new(self, unit: int, anchor_n: Tensor) -> None:
        """Make the state that a unit has after its first step, if it has none; a step does it by itself."""
        ...

    def step(self, unit: int, anchor_n: Tensor, S_n: Tensor) -> None:
        """Move `anchor_n` in place; `S_n`, as large, is only read."""
        ...

    def buffers(self, unit: int) -> dict[str, Tensor]:
        """Return the state of a unit that was started: tensors [n] or 0-d, themselves, not copies.

        Whoever copies another replica's into them goes on as that replica; the names are the same on both.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all state as `UNIT/NAME`."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take it back, instead of what is there.

        Raises:
            ConfigError: the state is another optimizer's.
        """
        ...


class OuterSGD:
    """SGD with momentum: B = m B + S, then A -= lr (S + m B) with Nesterov, A -= lr B without.

    The move of one round is at most lr phi / (1 - m) where the norm of S is at most phi. Without momentum
    there is no state, and lr = 1 is the mean of the replicas' parameters.

    Args:
        lr: outer learning rate; above 1 is allowed.
        momentum: m.
        nesterov: whether to look ahead; says nothing without momentum.

    Raises:
        ConfigError: lr not above 0, or momentum outside [0, 1).

    Example:
        >>> outer, A = OuterSGD(0.5, momentum=0.0), torch.tensor([1.0, 2.0])
        >>> outer.step(0, A, torch.tensor([1.0, -1.0]))
        >>> A
        tensor([0.5000, 2.5000])
    """

    def __init__(self, lr: float, *, momentum: float = 0.9, nesterov: bool = True) -> None:
        if not 0 < lr < math.inf:
            raise ConfigError(
                f"the outer lr={lr} must be above 0 and finite; 1 takes the mean of the replicas"
            )
        if not 0 <= momentum < 1:
            raise ConfigError(f"the outer momentum={momentum} must be in [0, 1); from 1 on it never decays")
        self.lr, self.momentum, self.nesterov = lr, momentum, nesterov
        self._momentum: dict[int, Tensor] = {}

    def start_if_new(self, unit: int, anchor_n: Tensor) -> None:
        """Make B of zeros, unless it is there or m is 0; the first step makes it S either way."""
        if self.momentum and unit not in self._momentum:
            self._momentum[unit] = torch.zeros_like(anchor_n)

    @torch.no_grad()
    def step(self, unit: int, anchor_n: Tensor, S_n: Tensor) -> None:
        """Move `anchor_n` in place, in the order of operations of `torch.optim.SGD`."""
        if not self.momentum:
            anchor_n.add_(S_n, alpha=-self.lr)
            return
        self.start_if_new(unit, anchor_n)
        B_n = self._momentum[unit] = self._momentum[unit].to(anchor_n.device)
        B_n.mul_(self.momentum).add_(S_n)
        anchor_n.add_(S_n.add(B_n, alpha=self.momentum) if self.nesterov else B_n, alpha=-self.lr)

    def buffers(self, unit: int) -> dict[str, Tensor]:
        """Return B as `momentum`; nothing where m is 0."""
        return {"momentum": self._momentum[unit]} if unit in self._momentum else {}

    def state_dict(self) -> dict[str, Any]:
        """Return copies of B as `UNIT/momentum`."""
        return {f"{unit}/momentum": B_n.clone() for unit, B_n in self._momentum.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take B back."""
        units = _by_unit(state_dict)
        names = {name for state in units.values() for name in state}
        if names - ({"momentum"} if self.momentum else set()):
            raise ConfigError(
                f"the saved outer optimizer has {', '.join(sorted(names))}, which SGD with "
                f"momentum={self.momentum} has no use for; go on with the outer optimizer that was saved"
            )
        self._momentum = {unit: state["momentum"].clone() for unit, state in units.items()}


class TorchOuter:
    """Any optimizer of the torch.optim kind, one for each unit; its parameter is the anchor's own memory.

    One that is not elementwise (Adafactor) sees the part of a unit that this worker holds, so its result
    depends on the number of shards. Refused, by a step on two zeros when built: what needs a closure (LBFGS),
    sparse gradients (SparseAdam) or matrices (Muon), and what keeps other state than tensors of its
    parameter, each of the parameter's shape or 0-d, because a checkpoint would lose it.

    Args:
        factory: makes the optimizer of a list of one parameter.

    Raises:
        ConfigError: the optimizer is refused.

    Example:
        >>> outer, A = TorchOuter(lambda params: torch.optim.Adam(params, lr=0.25)), torch.zeros(2)
        >>> outer.step(0, A, torch.tensor([7.0, -0.1]))
        >>> A
        tensor([-0.2500,  0.2500])
    """

    def __init__(self, factory: Factory) -> None:
        _try_out(factory)
        self._factory = factory
        self._optimizers: dict[int, Optimizer] = {}
        self._num_steps: dict[int, Tensor] = {}
        self._saved: dict[int, dict[str, Tensor]] = {}

    @classmethod
    def named(cls, path: str, **settings: Any) -> "TorchOuter":
        """Return the outer optimizer of the class at a dotted path, such as torch.optim.Adam.

        Raises:
            ConfigError: no such class (the nearest is named), settings it does not take, or refused.
        """
        optimizer_class = class_at(path, Optimizer, kind="outer optimizer")
        try:
            return cls(lambda params: optimizer_class(params, **settings))
        except (TypeError, ValueError) as error:
            given = ", ".join(f"{key}={value!r}" for key, value in settings.items())
            raise ConfigError(f"the outer optimizer {path}({given}) cannot be used: {error}") from error

    def start_if_new(self, unit: int, anchor_n: Tensor) -> None:
        """Make the state that a step on zeros leaves; a first step begins without it."""
        if unit in self._optimizers:
            return
        optimizer = self._fresh(unit, anchor_n)
        trial = nn.Parameter(torch.zeros_like(anchor_n))
        state = _state_after_zeros(self._factory([trial]), trial)
        saved = self._saved.pop(unit, {})
        self._num_steps[unit] = saved.pop(STEPS, torch.zeros((), dtype=torch.int64))
        if saved and set(saved) != set(state):
            raise ConfigError(
                f"the saved outer optimizer has {', '.join(sorted(saved))}, {type(optimizer).__name__} has "
                f"{', '.join(sorted(state)) or 'no state'}; go on with the outer optimizer that was saved"
            )
        for name, value in saved.items():
            state[name] = value.to(state[name].device)
        optimizer.state[_param_of(optimizer)].update(state)

    @torch.no_grad()
    def step(self, unit: int, anchor_n: Tensor, S_n: Tensor) -> None:
        """Move `anchor_n` in place."""
        self.start_if_new(unit, anchor_n)
        is_first = not self._num_steps[unit]
        optimizer = self._fresh(unit, anchor_n) if is_first else self._optimizers[unit]
        param = _param_of(optimizer)
        param.data = anchor_n  # the same memory, also when the anchor has moved
        param.grad = S_n
        optimizer.step()
        param.grad = None
        self._num_steps[unit] += 1

    def buffers(self, unit: int) -> dict[str, Tensor]:
        """Return the optimizer's state tensors, and the number of steps."""
        return {**_tensors(self._optimizers[unit]), STEPS: self._num_steps[unit]}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all units that have made a step."""
        units = {unit: self.buffers(unit) for unit, count in self._num_steps.items() if count}
        units |= self._saved
        return {f"{unit}/{name}": x.clone() for unit, state in units.items() for name, x in state.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take it back with its own dtypes; a unit has it, and checks its names, from its next use on."""
        self._optimizers, self._num_steps = {}, {}
        self._saved = {
            unit: {name: value.clone() for name, value in state.items()}
            for unit, state in _by_unit(state_dict).items()
        }

    def _fresh(self, unit: int, anchor_n: Tensor) -> Optimizer:
        """Make a unit's optimizer anew."""
        self._optimizers[unit] = self._factory([nn.Parameter(anchor_n)])
        return self._optimizers[unit]


def _param_of(optimizer: Optimizer) -> Tensor:
    return optimizer.param_groups[0]["params"][0]


def _by_unit(state_dict: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return `UNIT/NAME` as tables by unit."""
    units: dict[int, dict[str, Any]] = {}
    for key, value in state_dict.items():
        unit, _, name = key.partition("/")
        units.setdefault(int(unit), {})[name] = value
    return units


def _try_out(factory: Factory) -> None:
    """Take a step on two zeros; refuse what does not fit."""
    param = nn.Parameter(torch.zeros(2))
    optimizer = factory([param])
    name = type(optimizer).__name__
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{name} evaluates the loss within a step (it needs a closure), but an outer step has no loss, "
            f"only a pseudo-gradient; take one without, such as torch.optim.Adam"
        )
    before = _numbers(optimizer)
    try:
        state = _state_after_zeros(optimizer, param)
    except RuntimeError as error:
        raise ConfigError(
            f"{name} cannot step a dense flat vector, which is what a unit's anchor is: {error}; take one "
            f"that can, such as torch.optim.Adam"
        ) from error
    kept = {key for key, value in optimizer.state[param].items() if value is not None}
    odd = [key for key in sorted(kept) if key not in state or state[key].shape not in ((), (2,))]
    after = _numbers(optimizer)
    odd += [f"param_groups[0][{key!r}]" for key in sorted(after) if after[key] != before.get(key)]
    odd += [f"state[{key!r}]" for key in optimizer.state if key is not param]
    if odd:
        raise ConfigError(
            f"{name} keeps {', '.join(odd)} between steps, which a checkpoint of the outer optimizer cannot "
            f"hold (only tensors of the parameter's shape, or 0-d, in its state); take another, such as "
            f"torch.optim.Adam"
        )


def _state_after_zeros(optimizer: Optimizer, param: Tensor) -> dict[str, Tensor]:
    """Take a step with a gradient of zeros and return the state tensors."""
    param.grad = torch.zeros_like(param)
    optimizer.step()
    return _tensors(optimizer)


def _tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    return {name: x for name, x in optimizer.state[_param_of(optimizer)].items() if torch.is_tensor(x)}


def _numbers(optimizer: Optimizer) -> dict[str, Any]:
    """Return the plain values of the only parameter group."""
    return {
        key: value.item() if torch.is_tensor(value) and value.dim() == 0 else value
        for key, value in optimizer.param_groups[0].items()
        if key != "params" and not (torch.is_tensor(value) and value.dim())
    }
