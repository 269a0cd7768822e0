"""The state of a model and its optimizer as named tensors and plain values, and back.

Names are canonical (no trace of DDP, torch.compile or activation checkpointing), so every way of running
reads what every other wrote. Keys are `model/<name>` and `optim/<name of parameter>/<key of state>`.

Torch's own get/set_optimizer_state_dict are left aside (tried with torch 2.13): getting takes a step on an
optimizer that took none, so an AdamW saved before its first step comes back with `step` at 1; setting fails
when a parameter never had a gradient.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (  # noqa: TID251  names of parameters, no communication
    get_model_state_dict,
    set_model_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hardy.config import UserError
from hardy.train.storage import MODEL

OPTIM = "optim/"
"""What the keys of an optimizer's tensors begin with."""
_HOW_NOT_WHAT = frozenset({"params", "param_names", "foreach", "fused", "capturable", "differentiable"})
"""Settings of a group that say how the machine computes; the optimizer at hand keeps its own."""


@dataclass(frozen=True, kw_only=True)
class State:
    """What a checkpoint keeps of a model and an optimizer."""

    tensors: dict[str, Tensor]
    """By key; the live tensors, not copies."""
    plain: dict[str, Any]
    """Class, group settings and plain numbers of the optimizer."""


def state_of(model: nn.Module, optimizer: Optimizer) -> State:
    """Return the state; an optimizer that took no step yet has none, and nothing changes here.

    Raises:
        UserError: something in it is neither a tensor nor a plain value.
    """
    tensors = _model_tensors(model)
    packed = optimizer.state_dict()
    names = _names_by_id(model, optimizer, packed)
    numbers: dict[str, dict[str, Any]] = {}
    for name, key, value in _items(packed, names):
        if isinstance(value, Tensor):
            tensors[f"{OPTIM}{name}/{key}"] = value
        elif value is None or isinstance(value, bool | int | float | str):
            numbers.setdefault(name, {})[key] = value
        else:
            raise UserError(
                f"{type(optimizer).__name__} cannot be saved: its state {key!r} of {name} is a "
                f"{type(value).__name__}; state must be tensors and plain numbers"
            )
    groups = [
        {"params": [names[i] for i in group["params"]]} | _settings(group) for group in packed["param_groups"]
    ]
    return State(
        tensors=tensors, plain={"class": type(optimizer).__name__, "groups": groups, "numbers": numbers}
    )


def load_state(
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    saved: Iterable[str],
    plain: Mapping[str, Any],
    fill: Callable[[dict[str, Tensor]], None],
) -> None:
    """Bring model and optimizer to a saved state, in place; pending gradients are dropped.

    Args:
        model: laid out in any way; all its tensors are replaced.
        optimizer: of the saved class; None loads the model alone.
        saved: keys of the tensors in the checkpoint.
        plain: `State.plain` of the checkpoint.
        fill: copies saved values into the given tensors, or refuses when shape or dtype differ.

    Raises:
        UserError: names, groups or the optimizer's class differ from the checkpoint's.
    """
    model.zero_grad(set_to_none=True)
    wanted = {key for key in saved if key.startswith(OPTIM)} if optimizer is not None else set()
    present: dict[str, Tensor] = {}
    if optimizer is not None:
        _check_class(optimizer, plain)
        held = {name for group in plain["groups"] for name in group["params"]}
        _check_names("optimizer's parameters", held, _parameter_names(model, optimizer))
        present = _optimizer_tensors(model, optimizer)
        if wanted - present.keys():
            _create_state(optimizer)
            present = _optimizer_tensors(model, optimizer)
        _check_names("optimizer state", wanted, wanted & present.keys())
    # After the step that creates state: whatever it did to the parameters is overwritten now.
    targets = _model_tensors(model)
    _check_names("model", {key for key in saved if key.startswith(MODEL)}, targets.keys())
    targets |= {key: present[key] for key in wanted}
    fill(targets)
    values: dict[str, Any] = {
        key.removeprefix(MODEL): value for key, value in targets.items() if key.startswith(MODEL)
    }
    set_model_state_dict(model, values)
    if optimizer is not None:
        _give_back(model, optimizer, {key: targets[key] for key in wanted}, plain)


def canonical_name(model: nn.Module, name: str) -> str:
    """Return a parameter's name as the model without wrappers would give it."""
    module: Any = model
    kept = []
    for part in name.split("."):
        wrapped = isinstance(module, DistributedDataParallel) and part == "module"
        if not wrapped and part not in ("_orig_mod", "_checkpoint_wrapped_module"):
            kept.append(part)
        module = getattr(module, part, None)
    return ".".join(kept)


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by key."""
    values = get_model_state_dict(model)
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise UserError(f"the model cannot be saved: {name} is a {type(value).__name__}, not a tensor")
    return {f"{MODEL}{name}": value for name, value in values.items() if isinstance(value, Tensor)}


def _names_by_id(model: nn.Module, optimizer: Optimizer, packed: Mapping[str, Any]) -> dict[int, str]:
    """Return the canonical name for each number by which `Optimizer.state_dict` calls a parameter."""
    names = {id(param): canonical_name(model, name) for name, param in model.named_parameters()}
    result: dict[int, str] = {}
    for group, packed_group in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        for param, number in zip(group["params"], packed_group["params"], strict=True):
            if id(param) not in names:
                raise UserError(
                    f"{type(optimizer).__name__} cannot be saved: its parameter {number} of shape "
                    f"{tuple(param.shape)} does not belong to the model; build it from model.parameters()"
                )
            result[number] = names[id(param)]
    return result


def _parameter_names(model: nn.Module, optimizer: Optimizer) -> set[str]:
    return set(_names_by_id(model, optimizer, optimizer.state_dict()).values())


def _items(packed: Mapping[str, Any], names: Mapping[int, str]) -> Iterator[tuple[str, str, Any]]:
    """Yield (name of the parameter, key, value) of an optimizer's state."""
    for number, entries in packed["state"].items():
        if number not in names:
            raise UserError(
                f"the optimizer cannot be saved: it keeps the state {number!r} beside its parameters' state"
            )
        for key, value in entries.items():
            yield names[number], key, value


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's live state tensors by key."""
    packed = optimizer.state_dict()
    items = _items(packed, _names_by_id(model, optimizer, packed))
    return {f"{OPTIM}{name}/{key}": value for name, key, value in items if isinstance(value, Tensor)}


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain settings of a parameter group; a learning rate kept in a tensor becomes a number."""
    return {
        key: value.item() if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key not in _HOW_NOT_WHAT
    }


def _create_state(optimizer: Optimizer) -> None:
    """Take one step with zero gradients and learning rate 0, which makes every optimizer create its state."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for param in group["params"]:
            if param.requires_grad:
                param.grad = torch.zeros_like(param)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if "lr" in group:
            group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


def _give_back(
    model: nn.Module, optimizer: Optimizer, loaded: Mapping[str, Tensor], plain: Mapping[str, Any]
) -> None:
    """Hand the loaded state to the optimizer and check that it took it as it was."""
    packed = optimizer.state_dict()
    names = _names_by_id(model, optimizer, packed)
    number_of = {name: number for number, name in names.items()}
    state: dict[int, dict[str, Any]] = {}
    for name, numbers in plain["numbers"].items():
        state.setdefault(number_of[name], {}).update(numbers)
    for path, value in loaded.items():
        name, _, key = path.removeprefix(OPTIM).rpartition("/")
        state.setdefault(number_of[name], {})[key] = value
    groups = [_restored_group(group, names, plain["groups"]) for group in packed["param_groups"]]
    dtypes = {key: value.dtype for key, value in loaded.items()}
    optimizer.load_state_dict({**packed, "state": state, "param_groups": groups})
    now = {key: value.dtype for key, value in _optimizer_tensors(model, optimizer).items()}
    if now != dtypes:
        key = next(iter(sorted(key for key in dtypes.keys() | now.keys() if dtypes.get(key) != now.get(key))))
        raise UserError(
            f"{type(optimizer).__name__} did not take its state back: {key} was {dtypes.get(key)} in the "
            f"checkpoint and is {now.get(key)} now; its load_state_dict must keep the dtype of state"
        )


def _restored_group(
    group: dict[str, Any], names: Mapping[int, str], saved_groups: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return a packed parameter group with the settings it was saved with."""
    members = {names[number] for number in group["params"]}
    saved = next((other for other in saved_groups if members <= set(other["params"])), None)
    if saved is None:
        raise UserError(
            f"the parameter groups of the optimizer are not those of the checkpoint: {sorted(members)[:3]} "
            f"... were not in one group; build the optimizer as for the saved run"
        )
    restored = dict(group)
    for key, value in saved.items():
        if key not in _HOW_NOT_WHAT:
            old = group.get(key)
            restored[key] = torch.full_like(old, value) if isinstance(old, Tensor) else value
    return restored


def _check_class(optimizer: Optimizer, plain: Mapping[str, Any]) -> None:
    if plain["class"] != type(optimizer).__name__:
        raise UserError(
            f"the checkpoint holds the state of {plain['class']}, the run uses {type(optimizer).__name__}; "
            f"set optim.name back, or start a new run"
        )


def _check_names(what: str, saved: Iterable[str], present: Iterable[str]) -> None:
    """Refuse a checkpoint that holds other tensors than the run."""
    absent, extra = sorted(set(saved) - set(present)), sorted(set(present) - set(saved))
    if absent or extra:
        lists = [
            f"{len(keys)} {where} ({', '.join(keys[:3])}{' ...' if keys[3:] else ''})"
            for keys, where in ((absent, "only in the checkpoint"), (extra, "only in the run"))
            if keys
        ]
        raise UserError(
            f"the checkpoint does not fit the {what}: {' and '.join(lists)}; use the config it was saved with"
        )
