"""The shell around all rules: parameters, names, state that comes back with its own dtype, and the step.

Every promise that does not depend on the mathematics of a method is kept here, once.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hardy.config import unknown_name
from hardy.ops.philox import canonical_name, key_for
from hardy.optim._rule import (
    SHARED_DEFAULTS,
    TEMPORARY_BYTES,
    Bundle,
    Group,
    Member,
    Rule,
    StateSpec,
    check_settings,
    compute_dtype,
    local_shape,
    own_part,
)
from hardy.optim._saved import check_state, in_our_order
from hardy.optim._sharded import ProcessGroup, Shard, Split, exchange, laid_out, local_part, shard_of
from hardy.optim.int8_linear import VirtualWeight, check_int8_group
from hardy.optim.release import GradientRelease

log = logging.getLogger(__name__)

_ABOUT_GROUP = frozenset({"params", "param_names", "kind", "role", "calls", "initial_lr"})
"""Keys of a group that are not settings of its kind."""


class RuleOptimizer(Optimizer):
    """A `torch.optim.Optimizer` whose groups choose a rule by `kind`; see `optimizers.py` for those to use.

    Right for plain and sharded (DTensor) parameters; gradients are only read; the host never waits for the
    device inside `step`. State is created for all parameters that are trained at the first step, or by
    `materialize_state`; for one that is unfrozen later, at the next.

    A step in which all gradients are zero and the learning rate is 0, as torch's distributed checkpoint takes
    before it loads, creates the state and changes nothing else.
    """

    rules: ClassVar[Mapping[str, Rule]] = {}
    _step_supports_amp_scaling = True  # torch.amp.GradScaler hands grad_scale and found_inf to us

    def __init__(self, params: Iterable[Any], *, kind: str, settings: Mapping[str, Any]) -> None:
        self._members: dict[Tensor, Member] = {}
        self._projections: dict[Any, tuple[int, Tensor]] = {}
        self._kept: dict[tuple[Member, ...], list[Bundle]] = {}
        self._shaping: dict[int, Mapping[str, Any]] = {}
        self._release: GradientRelease | None = None
        known = {**SHARED_DEFAULTS, **self.rules[kind].defaults}
        for setting in settings:
            if setting not in known:
                raise ValueError(unknown_name(setting, f"setting of {type(self).__name__}", known))
        super().__init__(params, {**SHARED_DEFAULTS, **self.rules[kind].defaults, **settings, "kind": kind})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come back from a copy or a load; what was derived from parameters is derived anew."""
        super().__setstate__(state)
        self._members = {}
        self._projections = {}
        self._kept = {}
        self._shaping = {}
        self._release = None

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters; a group may name another `kind` and then has that kind's defaults.

        Raises:
            ValueError: unknown kind or setting, a value out of range, a parameter or name given twice.
        """
        kind = param_group.get("kind", self.defaults["kind"])
        if kind not in self.rules:
            raise ValueError(unknown_name(str(kind), "kind of parameter group", self.rules))
        known = {**SHARED_DEFAULTS, **self.rules[kind].defaults}
        for key in param_group:
            if key not in known and key not in _ABOUT_GROUP:
                raise ValueError(unknown_name(str(key), f"setting of a {kind!r} group", known))
        shared = {key: self.defaults[key] for key in SHARED_DEFAULTS}
        own = self.defaults if kind == self.defaults["kind"] else {**self.rules[kind].defaults, **shared}
        group = {key: own[key] for key in known} | param_group | {"kind": kind}
        named = self._named(param_group, kind)
        group["params"], group["param_names"] = [param for _, param in named], [name for name, _ in named]
        check_settings(group, {**SHARED_DEFAULTS, **self.rules[kind].defaults})
        self.rules[kind].check(group)
        super().add_param_group(group)
        for key in self.defaults.keys() - known.keys() - _ABOUT_GROUP:
            del self.param_groups[-1][key]
        self.param_groups[-1].setdefault("calls", 0)

    def _named(self, param_group: Group, kind: str) -> list[tuple[str, Tensor]]:
        """Return the parameters with names: their own, the group's, or their place in the order."""
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError("parameters came as a set, whose order changes from run to run; pass a list")
        listed = [params] if isinstance(params, Tensor) else list(params)
        count = sum(len(group["params"]) for group in self.param_groups)
        names = param_group.get("param_names") or [f"param.{count + i}" for i in range(len(listed))]
        named = [x if isinstance(x, tuple) else (n, x) for n, x in zip(names, listed, strict=True)]
        if any(name.startswith("param.") for name, _ in named) and kind == "apollo":
            log.warning(
                "parameters came without names, so random projections follow their order; pass "
                "model.named_parameters() so that they follow the names"
            )
        taken = {x for g in self.param_groups for x in (*g["params"], *g["param_names"])}
        for name, param in named:
            _check_parameter(param, name)
            if param in taken or name in taken:
                raise ValueError(
                    f"parameter {name} is given twice, or its name is; each parameter belongs to one group, "
                    f"once, under its name in the whole model"
                )
            taken |= {param, name}
        return named

    @torch.compiler.disable
    @torch.no_grad()
    def step(  # type: ignore[override]  # torch's overloads have no keyword arguments
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: called first, with gradients enabled; its result is returned.
            grad_scale: 0-d; gradients are divided by it as they are read.
            found_inf: 0-d; where it is 1, nothing changes at all.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if grad_scale is None:
            grad_scale = getattr(self, "grad_scale", None)
        if found_inf is None:
            found_inf = getattr(self, "found_inf", None)
        if self._release is not None:
            if grad_scale is not None or found_inf is not None:
                raise ValueError(
                    "released gradients are gone before step(), so they cannot be scaled or skipped "
                    "together; train without GradScaler and clipping, or call disable_release()"
                )
            self._release.check([x.param for x in self._all_members() if x.param.requires_grad])
            if self._release.finish():
                for group in self.param_groups:
                    group["calls"] += 1
            return loss
        fresh = self.materialize_state()
        bundles = self._bundles(self._all_members())
        moved = self._update(bundles, grad_scale, found_inf, group_of=_mesh_group)
        self._count_call(moved, fresh=fresh)
        return loss

    def enable_release(self, model: nn.Module, *, accumulation_steps: int = 1) -> None:
        """Update each parameter inside the backward pass and drop its gradient there (see `release.py`).

        The learning rate that a group has during the backward pass is used; `step` then only counts. Weights
        are the same bits as without release. Clipping by the global norm, GradScaler and skipping a whole
        step need all gradients and are refused or have nothing to work on.

        Args:
            model: what is trained, already sharded; all its processes must call this.
            accumulation_steps: backward passes that add up to one step.
        """
        self.disable_release()
        self.materialize_state()
        members = self._all_members()
        if any(member.group.get("proj") == "svd" for member in members):
            raise ValueError(
                "proj='svd' needs more memory than release saves; use proj='normal' or 'rademacher'"
            )
        self._release = GradientRelease(
            model,
            [member.param for member in members if member.param.requires_grad],
            splits=dict.fromkeys(split for member in members for split in member.shard.splits),
            update=self._update_unit,
            accumulation_steps=accumulation_steps,
        )

    def disable_release(self) -> None:
        """Let `step` update again."""
        if self._release is not None:
            self._release.remove()
        self._release = None

    def _update_unit(self, params: list[Tensor], group_of: Callable[[Split], ProcessGroup]) -> None:
        members = [self._members[param] for param in params]
        self._update(self._bundles(members), None, None, group_of=group_of)

    def _update(
        self,
        bundles: list[Bundle],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        *,
        group_of: Callable[[Split], ProcessGroup],
    ) -> list[Tensor]:
        """Take a step with some bundles; return what they say of their gradients (`Bundle.moved`)."""
        moved = []
        for batch in _batches(bundles):
            try:
                for bundle in batch:
                    self._bring(bundle, grad_scale, found_inf)
                self._run(batch, group_of=group_of)
                moved += [bundle.moved for bundle in batch if bundle.moved is not None]
            finally:
                for bundle in batch:
                    bundle.drop()
        return moved

    def _bring(self, bundle: Bundle, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        for member in bundle.members:
            member.local = {key: local_part(value) for key, value in self.state[member.param].items()}
        bundle.bring(
            [_work_part(member.param) for member in bundle.members],
            [_local_grad(member) for member in bundle.members],
            grad_scale=grad_scale,
            found_inf=found_inf,
        )

    def _run(self, bundles: list[Bundle], *, group_of: Callable[[Split], ProcessGroup]) -> None:
        """Drive the rules of some bundles through their rounds, in lockstep."""
        updates = [bundle.members[0].rule.update(bundle) for bundle in bundles]
        for _ in range(3):
            exchange([next(update) for update in updates], group_of=group_of)
        for update in updates:
            next(update, None)
        for bundle in bundles:
            for member, work in zip(bundle.members, bundle.params, strict=True):
                local = local_part(member.param)
                if not local.is_contiguous():
                    local.copy_(work.view(local.shape))

    def materialize_state(self) -> bool:
        """Create the state of all trained parameters that have none; return whether any had none."""
        fresh = False
        for member in self._all_members():
            if _is_trained(member.param) and not self.state.get(member.param):
                fresh, state = True, self.state[member.param]
                for key, spec in member.specs.items():
                    shape = local_shape(spec, member.shard)
                    device = local_part(member.param).device
                    local = torch.full(shape, spec.fill, dtype=spec.dtype, device=device)
                    if key == "proj_key":
                        local.fill_(_signed(member.projection_key))
                    state[key] = member.shard.wrap(local, spec.shape, spec.dims)
        return fresh

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; every state tensor keeps its own dtype.

        Parameters are matched by name within their group, in whatever order they stand; those whose names
        are unknown on the other side, by order. Plain tensors are the whole, also where the parameters are
        sharded now.

        Raises:
            ValueError: keys or shapes differ from what the parameters and settings ask for.
        """
        if not self.state:  # settings may have been set since a load that was refused
            self._members, self._shaping = {}, {}
        state_dict = {**state_dict, "param_groups": in_our_order(self.param_groups, state_dict)}
        kept = {number: values for number, values in state_dict["state"].items() if values}
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        # Before the saved settings come in, so that those at hand are held against the saved state; and not
        # where there is none, for then the parameters may still be stubs. What was frozen, or added after the
        # last step, has none and starts anew.
        for member, number in zip(self._all_members() if kept else [], saved, strict=False):
            if number in kept:
                check_state(member, kept[number])
        release = self._release
        # Torch casts state to the dtype of the parameter; so it is not given any.
        super().load_state_dict({**state_dict, "state": {}})
        self._release = release
        for member, number in zip(self._all_members() if kept else [], saved, strict=False):
            if number in kept:
                self.state[member.param] = {
                    key: own_part(kept[number][key].detach(), spec, member.shard).to(
                        member.param.device, spec.dtype, copy=True, memory_format=torch.contiguous_format
                    )
                    for key, spec in member.specs.items()
                }
            if "proj_key" in kept.get(number, {}):
                member.projection_key = _unsigned(int(kept[number]["proj_key"]))
        if kept or release is not None:
            self.materialize_state()

    def _all_members(self) -> list[Member]:
        """Return all parameters in order; parameters may have been swapped since the last call."""
        members = []
        for index, group in enumerate(self.param_groups):
            self._check_shaping(index, group)
            for name, param in zip(group["param_names"], group["params"], strict=True):
                member = self._members.get(param)
                if member is None or member.group is not group:
                    member = self._new_member(index, name, param)
                members.append(member)
        if len(members) != len(self._members):
            self._members = {member.param: member for member in members}
            self._kept = {}
        return members

    def _check_shaping(self, index: int, group: Group) -> None:
        """Refuse another value of a setting on which the state that there is depends."""
        now = self.rules[group["kind"]].shaping(group)
        then = self._shaping.setdefault(index, now)
        for setting in now if now != then else ():
            if now[setting] != then[setting]:
                raise ValueError(
                    f"{setting} of group {index} ({group['kind']!r}) was set to {group[setting]!r} after the "
                    f"state had been made for another value; set it back, or build a new optimizer with it"
                )

    def _new_member(self, index: int, name: str, param: Tensor) -> Member:
        group = self.param_groups[index]
        rule = self.rules[group["kind"]]
        name = canonical_name(name)
        shard = shard_of(param, name)
        dtype = compute_dtype(param)
        specs = rule.specs(shard, dtype, group, name)
        is_int8 = isinstance(param, VirtualWeight)
        if is_int8:
            check_int8_group(name, group)
        if group["bf16_update"] == "kahan" and param.dtype == torch.bfloat16:
            specs["rest"] = _like_parameter(shard, torch.bfloat16)
        key = key_for(group["seed"], name, purpose="hardy.proj.v1")
        held = self.state.get(param, {}).get("proj_key")
        if held is not None:
            key = _unsigned(int(held))
        member = Member(
            name=name,
            param=param,
            group=group,
            rule=rule,
            shard=shard,
            projection_key=key,
            rounding_key=key_for(group["seed"], name, purpose="hardy.q8.v1" if is_int8 else "hardy.sr.v1"),
            specs=specs,
            alike=(index, param.dtype, local_part(param).device, shard.splits, rule.alike(shard)),
        )
        member.temporary_bytes = rule.temporary_bytes(member)
        self._members[param] = member
        return member

    def _bundles(self, members: Iterable[Member]) -> list[Bundle]:
        """Return parameters that are alike together; the same on all workers."""
        held = tuple(
            [x for x in members if x.param.grad is not None or (x.shard.splits and self.state.get(x.param))]
        )
        kept = self._kept.get(held)
        if kept is not None:
            return kept
        alike: dict[Any, list[Member]] = {}
        for member in held:
            alike.setdefault(member.alike, []).append(member)
        if len(self._kept) > len(self._members):  # which gradients there are changes from step to step
            self._kept.clear()
        self._kept[held] = [
            Bundle(group=some[0].group, members=some, projections=self._projections)
            for together in alike.values()
            for some in _portions(together)
        ]
        return self._kept[held]

    def _count_call(self, moved: list[Tensor], *, fresh: bool) -> None:
        """Count the call, unless it was the zero-gradient step at rate 0 of a checkpoint.

        Only where that is possible - every rate is the number 0, or a first step with a rate kept in a tensor
        - does the host look at the device.
        """
        rates = [group["lr"] for group in self.param_groups]
        in_tensor = any(isinstance(rate, Tensor) for rate in rates)
        may_be_empty = fresh if in_tensor else all(rate == 0 for rate in rates)
        if may_be_empty and all(bool(rate == 0) for rate in rates):
            if not any(bool(some.any()) for some in moved):
                return
        for group in self.param_groups:
            group["calls"] += 1


def _mesh_group(split: Split) -> ProcessGroup:
    return split.mesh.get_group(split.axis)


def _portions(members: list[Member]) -> Iterator[list[Member]]:
    """Cut a list so that each part keeps within the temporary memory of a step."""
    some: list[Member] = []
    held = 0
    for member in members:
        needed = member.temporary_bytes
        if some and held + needed > TEMPORARY_BYTES:
            yield some
            some, held = [], 0
        some.append(member)
        held += needed
    yield some


def _batches(bundles: list[Bundle]) -> Iterator[list[Bundle]]:
    """Put bundles together that one exchange may serve."""
    batch: list[Bundle] = []
    held = 0
    for bundle in bundles:
        needed = sum([member.temporary_bytes for member in bundle.members])
        if batch and held + needed > TEMPORARY_BYTES:
            yield batch
            batch, held = [], 0
        batch.append(bundle)
        held += needed
    if batch:
        yield batch


def _work_part(param: Tensor) -> Tensor:
    """Return what the sweeps work on: the contiguous local part; an int8 weight's one element stays one."""
    return param.detach() if isinstance(param, VirtualWeight) else local_part(param).contiguous()


def _local_grad(member: Member) -> Tensor | None:
    grad = member.param.grad
    if grad is None:
        return None
    if grad.is_sparse:
        raise ValueError(
            f"the gradient of {member.name} is sparse; build the embedding with sparse=False, "
            f"or give this parameter to torch.optim.SparseAdam"
        )
    return local_part(laid_out(grad, member.shard)).contiguous()


def _like_parameter(shard: Shard, dtype: torch.dtype) -> StateSpec:
    return StateSpec(shape=shard.shape, dtype=dtype, dims={dim: dim for dim in range(len(shard.shape))})


def _is_trained(param: Tensor) -> bool:
    return param.requires_grad or param.grad is not None


def _check_parameter(param: Tensor, name: str) -> None:
    """Refuse what no rule can update."""
    if not isinstance(param, Tensor):
        raise TypeError(f"parameter {name} is a {type(param).__name__}, not a tensor")
    if param.is_complex():
        raise ValueError(f"parameter {name} is complex; view it as real numbers (torch.view_as_real)")
    if not param.is_floating_point():
        raise ValueError(f"parameter {name} is {param.dtype}; only floating-point parameters are trained")
    if type(param).__name__ == "FlatParameter":
        raise ValueError(
            f"parameter {name} was flattened by FSDP1, which hides its shape; use fully_shard (FSDP2)"
        )
    if hasattr(param, "ds_id"):
        raise ValueError(
            f"parameter {name} is partitioned by DeepSpeed ZeRO-3; use fully_shard (FSDP2) or ZeRO-1"
        )


def _signed(key: int) -> int:
    return key - 2**64 if key >= 2**63 else key


def _unsigned(key: int) -> int:
    return key % 2**64
