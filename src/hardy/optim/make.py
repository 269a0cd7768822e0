"""One line from a model to an optimizer: who is updated by which rule, with which settings, under which name.

    optimizer = make_optimizer(model, "apollo-mini", lr=1e-2)

Names are tried in this order: presets (`presets.py`), dotted paths of classes ("torch.optim.RMSprop"), names
that other packages registered (`foreign.py`).
"""

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hardy.config import ConfigError, class_at
from hardy.ops.philox import canonical_name
from hardy.optim._rule import SHARED_DEFAULTS
from hardy.optim._sharded import is_sharded
from hardy.optim.foreign import Build, refuse_unknown, registered_factory, settings_of
from hardy.optim.optimizers import (
    APOLLO,
    QAPOLLO,
    RULES,
    SMMF,
    AdaptiveAdamW,
    APOLLOMini,
    apollo_scale_from_released,
)
from hardy.optim.presets import PRESETS, WHOLE_MODEL_KINDS, Preset
from hardy.optim.presets import preset as preset_called
from hardy.optim.routing import Group, Rule, describe, route_params
from hardy.optim.together import Together

log = logging.getLogger(__name__)

OWN_CLASSES: Mapping[str, Build] = {"adamw": AdaptiveAdamW, "apollo": APOLLO, "smmf": SMMF}
"""Ours by kind; any of them takes groups of all three kinds."""
TORCH_CLASSES: Mapping[str, Build] = {
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
    "muon": torch.optim.Muon,
}
"""Torch's by kind; each takes groups of its kind alone."""
_ABOUT_GROUP = frozenset({"params", "param_names", "kind", "role"})
_OTHER_MEANING = frozenset({"eps"})
"""Settings that mean something else for torch's Muon and Adafactor than for our own rules."""


def make_optimizer(
    model: nn.Module,
    preset: str,
    *,
    lr: float | Tensor | None = None,
    weight_decay: float = 0.0,
    embed_kind: str | None = None,
    rules: Sequence[Rule] | None = None,
    decayed: Collection[str] | None = None,
    vocab_size: int | None = None,
    **settings: Any,
) -> Optimizer:
    """Return an optimizer over the trained parameters of a model.

    The model may be plain, wrapped by DDP, compiled, or sharded. Call this after `fully_shard`, which
    replaces the parameters, unless a trainer swaps them in the groups afterwards, as accelerate does; and for
    "qapollo" after `quantize_model`. Gradient release is switched on by `optimizer.enable_release(model)`.
    The table of `describe_optimizer` is logged, as a warning where embeddings hold most of the state.

    Args:
        model: whose parameters are trained.
        preset: a name of `hardy.optim.presets.PRESETS`, hyphens or underscores; a dotted path to a class,
            which then takes all parameters; or a name that another package registered.
        lr: learning rate of all groups; None means the preset's, or else the class's.
        weight_decay: of matrices under the preset's own rule, or of the parameters in `decayed`.
        embed_kind: rule of embeddings and head; None means the preset's.
        rules: (pattern, kind, settings) for parameters that are to go elsewhere; see `route_params`.
        decayed: names of the parameters that decay, whatever their rule; None means as said above.
        vocab_size: rows of the head; None means those of the largest nn.Embedding.
        settings: each goes to all groups whose rule has it; a rule's own settings come first. `eps` is that
            of AdamW, APOLLO and SMMF; what Muon and Adafactor call so is set by `rules`.

    Raises:
        ConfigError: an unknown name or setting, or one that the chosen optimizer does not have.

    Example:
        >>> optimizer = make_optimizer(nn.Linear(8, 4), "smmf", lr=1e-3, weight_decay=0.1)
        >>> [(group["kind"], group["param_names"], group["weight_decay"]) for group in optimizer.param_groups]
        [('smmf', ['weight'], 0.1), ('adamw', ['bias'], 0.0)]
    """
    routing = {"embed_kind": embed_kind, "rules": rules, "decayed": decayed, "vocab_size": vocab_size}
    if lr is not None:
        settings["lr"] = lr
    if preset.replace("-", "_") in PRESETS:
        return _from_preset(model, preset, routing, weight_decay=weight_decay, settings=settings)
    if "." in preset:
        return _from_class(model, preset, routing, weight_decay=weight_decay, settings=settings)
    factory = registered_factory(preset, beside=PRESETS)
    asked = {key: value for key, value in routing.items() if value is not None}
    return factory(model, **asked, **settings, weight_decay=weight_decay)


def describe_optimizer(optimizer: Optimizer) -> str:
    """Return a table of an optimizer's groups: role, kind, tensors, elements, bytes of state.

    Args:
        optimizer: as `make_optimizer` returns it for a preset; others have no formula for their state.
    """
    groups = optimizer.param_groups
    if not all("kind" in group for group in groups):
        raise ConfigError(
            f"{type(optimizer).__name__} has groups without a kind, so the size of their state is not known; "
            f"only optimizers made from a preset ({', '.join(PRESETS)}) can be described"
        )
    named = [
        {**group, "params": list(zip(group["param_names"], group["params"], strict=True))} for group in groups
    ]
    return describe(named)


def _from_preset(
    model: nn.Module,
    name: str,
    routing: Mapping[str, Any],
    *,
    weight_decay: float,
    settings: Mapping[str, Any],
) -> Optimizer:
    """Route the parameters and build an optimizer for each set that one class can take."""
    found = preset_called(name)
    rules, decayed = routing["rules"] or (), routing["decayed"]
    embed_kind = routing["embed_kind"] or found.embed_kind
    groups = route_params(
        model,
        rules,
        kind=found.kind,
        embed_kind=embed_kind,
        weight_decay=weight_decay,
        vocab_size=routing["vocab_size"],
    )
    if decayed is not None:
        groups = _decaying(groups, rules, decayed=decayed, weight_decay=weight_decay)
    settings = _with_alpha(settings)
    # Also rules that this model has no parameter for: whether a setting exists is the preset's matter.
    rest = found.kind if found.kind in WHOLE_MODEL_KINDS else "adamw"
    kinds = {found.kind, embed_kind, rest, *(group["kind"] for group in groups)}
    known = frozenset[str]().union(*(_for_all(kind) for kind in kinds))
    refuse_unknown(settings, f"setting of {name!r}", known)
    parts: dict[str, list[Group]] = {}
    for group in groups:
        parts.setdefault(_owner(group["kind"], found), []).append(group)
    built = [_part(members, owner, found, settings) for owner, members in parts.items()]
    optimizer = built[0] if len(built) == 1 else Together(built)
    table = describe_optimizer(optimizer)
    log.log(logging.WARNING if "\nwarning: " in table else logging.INFO, "%s:\n%s", name, table)
    return optimizer


def _owner(kind: str, found: Preset) -> str:
    """Return the kind whose class takes groups of `kind`: ours take all of ours, torch's only their own."""
    if kind in TORCH_CLASSES:
        return kind
    return found.kind if found.kind in OWN_CLASSES else "adamw"


def _part(groups: list[Group], owner: str, found: Preset, settings: Mapping[str, Any]) -> Optimizer:
    """Return the optimizer of class `owner` over groups that it can take."""
    # The learning rate is the preset's for all of a model; its other settings are made for its own rule.
    preferred = {k: v for k, v in found.settings.items() if owner == found.kind or k == "lr"}
    chosen = preferred | {k: v for k, v in settings.items() if k in _for_all(owner)}
    for group in groups:
        kind = group["kind"]
        if owner in TORCH_CLASSES:  # which would take an unknown key in silence
            refuse_unknown(group.keys() - _ABOUT_GROUP, f"setting of a {kind!r} group", _known(kind))
        elif kind != owner:
            group.update({k: v for k, v in settings.items() if k in _for_all(kind) and k not in group})
    if owner == "adafactor" and any(is_sharded(x) for g in groups for _, x in g["params"]):
        # Tried with torch 2.13: the first step ends in an error about placements.
        raise ConfigError("torch's Adafactor cannot update sharded parameters; use 'smmf', which is as lean")
    if owner in TORCH_CLASSES:
        return TORCH_CLASSES[owner](groups, **chosen)
    if owner == "apollo" and found.int8_weights:
        return QAPOLLO(groups, **chosen)
    is_mini = owner == "apollo" and chosen.get("scale_type") == "tensor" and chosen.get("rank") == 1
    return APOLLOMini(groups, **chosen) if is_mini else OWN_CLASSES[owner](groups, **chosen)


def _from_class(
    model: nn.Module,
    path: str,
    routing: Mapping[str, Any],
    *,
    weight_decay: float,
    settings: Mapping[str, Any],
) -> Optimizer:
    """Build the class at a path over all parameters, in one group that decays and one that does not."""
    cls = class_at(path, Optimizer, kind="optimizer")
    for name in ("rules", "embed_kind"):
        if routing[name] is not None:
            raise ConfigError(
                f"{path} takes every parameter, so {name} has no meaning; leave it out or use a preset"
            )
    if cls is torch.optim.Muon:
        raise ConfigError(f"{path} takes matrices only; use 'muon', which gives the rest to AdamW")
    known, is_open = settings_of(cls)
    if not is_open:
        refuse_unknown(settings, f"setting of {path}", known)
    decays = is_open or "weight_decay" in known
    if weight_decay and not decays:
        raise ConfigError(f"weight_decay={weight_decay:g} has no meaning for {path}; set it to 0")
    groups = route_params(
        model, kind="sgd", embed_kind="sgd", weight_decay=weight_decay, vocab_size=routing["vocab_size"]
    )
    if routing["decayed"] is not None:
        groups = _decaying(groups, (), decayed=routing["decayed"], weight_decay=weight_decay)
    members: dict[float, list[tuple[str, Tensor]]] = {}
    for group in groups:
        members.setdefault(group["weight_decay"], []).extend(group["params"])
    split = [
        {"params": some, **({"weight_decay": decay} if decays else {})} for decay, some in members.items()
    ]
    build: Build = cls
    try:
        return build(split, **settings)
    except (TypeError, ValueError) as error:  # what torch's classes say of a value they cannot take
        raise ConfigError(f"{path}: {error}; change its arguments") from error


def _decaying(
    groups: Sequence[Group], rules: Sequence[Rule], *, decayed: Collection[str], weight_decay: float
) -> list[Group]:
    """Return the groups, each cut into those that decay and those that do not; a rule's own word stands."""
    names = {canonical_name(name) for name in decayed}
    trained = {name for group in groups for name, _ in group["params"]}
    if names and not names & trained:
        raise ConfigError(
            f"decayed names no parameter that is trained: it has {min(names)!r}, the model {min(trained)!r}"
        )
    result: list[Group] = []
    for group in groups:
        first = group["params"][0][0]
        said = next((settings for pattern, _, settings in rules if re.search(pattern, first)), {})
        if "weight_decay" in said:
            result.append(group)
            continue
        for decay, wanted in ((weight_decay, True), (0.0, False)):
            members = [(name, param) for name, param in group["params"] if (name in names) == wanted]
            if members:
                result.append({**group, "params": members, "weight_decay": decay})
    return result


def _with_alpha(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with APOLLO's `scale` for its alias `scale_squared`, for groups of any class."""
    rest = dict(settings)
    squared = rest.pop("scale_squared", None)
    if squared is None:
        return rest
    if "scale" in rest:
        raise ConfigError(
            f"give scale={rest['scale']} or scale_squared={squared}, not both; scale is the root of the other"
        )
    return {**rest, "scale": apollo_scale_from_released(squared)}


def _known(kind: str) -> frozenset[str]:
    """Return the settings that a group of a kind may have."""
    if kind in OWN_CLASSES:
        return frozenset({*SHARED_DEFAULTS, *RULES[kind].defaults})
    return settings_of(TORCH_CLASSES[kind])[0]


def _for_all(kind: str) -> frozenset[str]:
    """Return the settings of a kind that it shares by name and meaning with others."""
    return _known(kind) if kind in OWN_CLASSES else _known(kind) - _OTHER_MEANING
