"""What a rule is: how one kind of parameter group keeps state and moves, on plain local tensors.

A rule holds no state of its own. The shell (`_shell.py`) hands it bundles of parameters that are alike, and
drives its `update` through three rounds of exchange with the other workers.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from hardy.ops.updates import Backend, Place, Prepared, Rounding, choose_backend, preparing
from hardy.optim._sharded import Round, Shard, local_part, own_columns

Group = dict[str, Any]

TEMPORARY_BYTES = 48 * 2**20
"""What a step may hold between its rounds at a time; parameters beyond that wait for the next batch."""
SHARED_DEFAULTS: Mapping[str, Any] = {
    "lr": 1e-3,
    "weight_decay": 0.0,
    "bf16_update": "stochastic",
    "nonfinite": "propagate",
    "backend": "auto",
    "seed": 0,
}
"""Settings that a group of any kind has."""


@dataclass(frozen=True, kw_only=True)
class StateSpec:
    """One state tensor of a parameter, before it exists."""

    shape: tuple[int, ...]
    """Of the whole tensor, over all workers."""
    dtype: torch.dtype
    dims: Mapping[int, int] = field(default_factory=dict)
    """For a dimension of the parameter, the dimension of the state that the same axes cut."""
    fill: int = 0


@dataclass(slots=True, eq=False)
class Member:
    """One parameter and what does not change from step to step."""

    name: str
    param: Tensor
    group: Group
    rule: "Rule"
    shard: Shard
    projection_key: int
    rounding_key: int
    specs: Mapping[str, StateSpec]
    alike: tuple[Any, ...]
    """Members with equal values here may stand in one bundle."""
    temporary_bytes: int = 0
    local: dict[str, Tensor] = field(default_factory=dict)
    """This worker's part of each state tensor."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of state and arithmetic."""
        return compute_dtype(self.param)


def compute_dtype(param: Tensor) -> torch.dtype:
    """Return fp64 for fp64 parameters and fp32 for all others."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


@dataclass(slots=True, eq=False)
class Bundle:
    """Parameters of one group that are alike, and between `bring` and `drop` what one step brings."""

    group: Group
    members: list[Member]
    projections: dict[Any, tuple[int, Tensor]]
    """Random matrices kept between steps, with their epoch; see `apollo.py`."""
    params: list[Tensor] = field(default_factory=list)
    """Contiguous local parts; those of int8 weights are virtual and have one element (`int8_linear.py`)."""
    grads: list[Tensor | None] = field(default_factory=list)
    """Contiguous local parts; None where a parameter has no gradient."""
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    moved: Tensor | None = None
    """Set by `update`: which parameters had a gradient other than zero, over all workers."""
    _memory: dict[range, tuple[list[Tensor], list[int]]] = field(default_factory=dict)
    """Parameters, gradients and state of some members in this step, and their addresses, once a sweep has
    asked.
    """
    _prepared: dict[tuple[str, range], tuple[Any, Prepared]] = field(default_factory=dict)
    """By sweep and members; with what it was prepared for."""

    def bring(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        *,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Take in what a step works on; `members` have their local state already."""
        self.params, self.grads, self._memory = params, grads, {}
        self.grad_scale, self.found_inf = grad_scale, found_inf

    def drop(self) -> None:
        """Let the step's tensors go."""
        self.params, self.grads, self._memory = [], [], {}
        self.grad_scale = self.found_inf = self.moved = None
        for member in self.members:
            member.local = {}

    @property
    def backend(self) -> Backend:
        """Who sweeps."""
        return choose_backend(self.group["backend"], self.device)

    @property
    def all(self) -> range:
        """The indices of all members."""
        return range(len(self.members))

    def sweep(
        self,
        name: str,
        *buffers: Tensor,
        tasks: Callable[[], Sequence[Any]],
        epoch: int = 0,
        part: range | None = None,
    ) -> None:
        """Do a sweep; a back end that can prepare it is told its tasks only once.

        Args:
            name: of the sweep, a function of the back end.
            buffers: contiguous tensors that tasks name besides the parameters, gradients and state of the
                bundle; from step to step as many, of the same sizes.
            tasks: called where the sweep is new; what it returns is a function of all these, of settings of
                the group and of `epoch`, and of nothing else that changes from step to step.
            epoch: see `tasks`.
            part: the members that the tasks are about; none means all.
        """
        backend = preparing(self.backend)
        bound_to = None if backend is None else backend.whereabouts(self.device)
        if backend is None or bound_to is None:
            getattr(self.backend, name)(tasks())
            return
        part = self.all if part is None else part
        memory, addresses = self._memory_of(part)
        settings = [self.group[key] for key in (*self.members[0].rule.defaults, "bf16_update")]
        held = [(self.params[index].dtype, self.grads[index] is None) for index in part]
        told = (bound_to, epoch, settings, held)
        addresses = addresses + [buffer.data_ptr() for buffer in buffers]
        kept, sweep = self._prepared.get((name, part), (None, None))
        if sweep is None or kept != told or not sweep.move(addresses):
            sweep = backend.prepare(name, tasks(), [*memory, *buffers])
            if sweep is None:
                getattr(backend, name)(tasks())
                return
            self._prepared[name, part] = (told, sweep)
        sweep.run()

    def _memory_of(self, part: range) -> tuple[list[Tensor], list[int]]:
        """Return parameters, gradients and state of some members, and where they lie."""
        if part not in self._memory:
            grads = [grad for index in part if (grad := self.grads[index]) is not None]
            states = [value for index in part for value in self.members[index].local.values()]
            memory = [*[self.params[index] for index in part], *grads, *states]
            self._memory[part] = memory, [tensor.data_ptr() for tensor in memory]
        return self._memory[part]

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.params[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return self.members[0].compute_dtype

    def present(self) -> Tensor:
        """Return [n]: 1 where this worker has a gradient."""
        result = torch.ones(len(self.grads), dtype=self.dtype, device=self.device)
        for index, grad in enumerate(self.grads):
            if grad is None:
                result[index].zero_()
        return result

    def stacked(self, key: str) -> Tensor:
        """Return the small state `key` of all members as one tensor; a copy."""
        return torch.stack([member.local[key] for member in self.members])

    def write_back(self, key: str, values: Tensor) -> None:
        """Give the members their new small state `key`."""
        held = [member.local[key] for member in self.members]
        # One launch for all; torch documents it under "Foreach operations".
        torch._foreach_copy_(held, list(values.unbind(0)))  # pyright: ignore[reportPrivateImportUsage]

    def allowed(self) -> Tensor:
        """Return 0-d: 0 where `found_inf` forbids the step, else 1."""
        if self.found_inf is None:
            return torch.ones((), dtype=self.dtype, device=self.device)
        return 1 - self.found_inf.to(self.device, self.dtype).reshape(()).clamp(0, 1)

    def inverse_scale(self) -> Tensor | float:
        """Return what gradients are multiplied with: 1 / grad_scale."""
        return 1.0 if self.grad_scale is None else 1 / self.grad_scale.to(self.device, self.dtype).reshape(())

    def rounding(
        self, index: int, place: Place, step: Tensor, *, shape: tuple[int, int, int], level: int = 0
    ) -> Rounding:
        """Return how the updated parameter `index`, seen as [stack, rows, cols], is written at a level."""
        member = self.members[index]
        rest = member.local.get("rest")
        return Rounding(
            mode=self.group["bf16_update"],
            key=member.rounding_key,
            step=step,
            place=place,
            rest=None if rest is None else rest.view(shape)[level],
        )


class Rule(ABC):
    """How one kind of group is updated."""

    kind: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]]
    """Settings of the kind beyond the shared ones, with their defaults."""

    shaping_settings: ClassVar[tuple[str, ...]] = ()
    """Settings of the kind that say which state is kept, and in which shape."""

    @abstractmethod
    def check(self, group: Group) -> None:
        """Refuse settings out of range; the text names setting and value."""

    def shaping(self, group: Group) -> dict[str, Any]:
        """Return what must not change once there is state, by setting."""
        own = {setting: group[setting] for setting in ("seed", *self.shaping_settings)}
        return own | {"bf16_update": group["bf16_update"] == "kahan"}

    @abstractmethod
    def specs(self, shard: Shard, dtype: torch.dtype, group: Group, name: str) -> dict[str, StateSpec]:
        """Return the state of a parameter; refuse a parameter that the rule cannot update."""

    @abstractmethod
    def alike(self, shard: Shard) -> tuple[Any, ...]:
        """Return what else than group, dtype, device and axes must be equal within a bundle."""

    @abstractmethod
    def temporary_bytes(self, member: Member) -> int:
        """Return what a step holds for this parameter from one round to the next."""

    @abstractmethod
    def update(self, bundle: Bundle) -> Iterator[Round]:
        """Take one step for the bundle: yield the wishes of three rounds, in order, and end."""


def local_shape(spec: StateSpec, shard: Shard) -> tuple[int, ...]:
    """Return the shape of this worker's part of a state tensor."""
    shape = list(spec.shape)
    for split in shard.splits:
        if split.dim in spec.dims:
            dim = spec.dims[split.dim]
            begin, end = own_columns(shape[dim], split)
            shape[dim] = end - begin
    return tuple(shape)


def largest_numel(spec: StateSpec, shard: Shard) -> int:
    """Return the elements of a state tensor's part on the worker that holds most."""
    shape = list(spec.shape)
    for split in shard.splits:
        if split.dim in spec.dims:
            dim = spec.dims[split.dim]
            shape[dim] = -(-shape[dim] // split.size)
    return math.prod(shape)


def own_part(value: Tensor, spec: StateSpec, shard: Shard) -> Tensor:
    """Return state laid out as its parameter is; a plain tensor is the whole, and is cut for this worker."""
    if local_part(value) is not value:
        return value
    for split in shard.splits:
        if split.dim in spec.dims:
            dim = spec.dims[split.dim]
            begin, end = own_columns(value.shape[dim], split)
            value = value.narrow(dim, begin, end - begin)
    return shard.wrap(value, spec.shape, spec.dims)


def table(columns: list[Tensor | float], like: Tensor) -> Tensor:
    """Return [..., len(columns)] in the shape and dtype of `like`, from numbers and tensors.

    Numbers are filled in, not copied from the host, so nothing waits for the device.
    """
    result = like.new_empty(*like.shape, len(columns))
    for index, value in enumerate(columns):
        if isinstance(value, Tensor):
            result[..., index].copy_(value)
        else:
            result[..., index].fill_(value)
    return result


def require(condition: bool, group: Group, setting: str, allowed: str) -> None:
    """Refuse a group setting that does not meet the condition."""
    if not condition:
        raise ValueError(f"{setting} of a {group['kind']!r} group must be {allowed}, got {group[setting]!r}")


def check_settings(group: Group, defaults: Mapping[str, Any]) -> None:
    """Refuse values of another type than the default's, and shared settings out of range."""
    for setting, default in defaults.items():
        allowed = _TYPES.get(setting) or _TYPES.get(type(default))
        if allowed is not None:
            require(allowed[0](group[setting]), group, setting, allowed[1])
    lr = group["lr"]
    require(isinstance(lr, Tensor) or lr >= 0, group, "lr", "at least 0")
    require(not isinstance(lr, Tensor) or lr.numel() == 1, group, "lr", "a number or a 0-d tensor")
    require(group["weight_decay"] >= 0, group, "weight_decay", "at least 0")
    updates = ("stochastic", "kahan", "nearest")
    require(group["bf16_update"] in updates, group, "bf16_update", "'stochastic', 'kahan' or 'nearest'")
    require(group["nonfinite"] in ("propagate", "skip"), group, "nonfinite", "'propagate' or 'skip'")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


_TYPES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda value: isinstance(value, Tensor) or _is_number(value), "a number or a 0-d tensor"),
    "scale": (lambda value: value == "auto" or _is_number(value), "a number, or 'auto'"),
    "beta1": (lambda value: value is None or _is_number(value), "a number, or None"),
    "max_update": (lambda value: value is None or _is_number(value), "a number, or None"),
    bool: (lambda value: isinstance(value, bool), "True or False"),
    int: (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    float: (_is_number, "a number"),
    str: (lambda value: isinstance(value, str), "a word in quotes"),
    tuple: (
        lambda value: isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_number, value)),
        "two numbers",
    ),
}
"""By setting, or by the type of its default: what a value must be, and how that is said."""
