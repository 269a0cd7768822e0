"""Saved state of an optimizer: whose it is, and whether it is what parameters and settings ask for."""

import logging
from collections.abc import Mapping
from typing import Any

from hardy.ops.philox import canonical_name
from hardy.optim._rule import Group, Member

log = logging.getLogger(__name__)


def in_our_order(groups: list[Group], state_dict: Mapping[str, Any]) -> list[Group]:
    """Return the groups of saved state, they and their parameters in the order of the optimizer's.

    Torch numbers parameters by their place, so a model that lists them in another order would take over
    state of others. Groups that share a name and, within a group, equal names belong together; what is left
    on both sides was renamed and is matched by order. Torch's distributed checkpoint numbers by name and in
    our order already.

    Args:
        groups: those of the optimizer.
        state_dict: as `Optimizer.state_dict` returns it; is not changed.

    Raises:
        ValueError: other kinds or numbers of parameters, or a name that is in another group now.
    """
    saved: list[Group] = state_dict["param_groups"]
    now, then = _group_of_names(groups), _group_of_names(saved)
    places = [next((then[name] for name in _names(group) if name in then), -1) for group in groups]
    if sorted(places) == list(range(len(saved))):
        saved = [saved[place] for place in places]
        then = _group_of_names(saved)
    ours, theirs = ([(g.get("kind"), len(g["params"])) for g in some] for some in (groups, saved))
    if ours != theirs:
        raise ValueError(
            f"the saved state has groups of (kind, number of parameters) {theirs}, the optimizer has {ours}; "
            f"build it as for the saved run"
        )
    for name in now.keys() & then.keys():
        if now[name] != then[name]:
            raise ValueError(
                f"parameter {name} is in group {now[name]} and was saved in group {then[name]}; "
                f"build the groups as for the saved run"
            )
    return [_matched(group, other) for group, other in zip(groups, saved, strict=True)]


def check_state(member: Member, values: Mapping[str, Any]) -> None:
    """Refuse saved state that is not what the parameter and its settings ask for."""
    for key in values:
        if key not in member.specs:
            raise ValueError(
                f"the saved state of {member.name} has {key!r}, which a {member.group['kind']!r} group with "
                f"these settings does not keep; load it with the settings it was saved with"
            )
    for key, spec in member.specs.items():
        if key not in values:
            raise ValueError(
                f"the saved state of {member.name} lacks {key!r}; it was saved with other settings"
            )
        shape = tuple(values[key].shape)
        if shape != spec.shape:
            raise ValueError(
                f"state {key!r} of {member.name} was saved with shape {shape} and is {spec.shape} with the "
                f"present settings; rank, side and shape settings cannot change at a resume"
            )


def _group_of_names(groups: list[Group]) -> dict[str, int]:
    return {name: index for index, group in enumerate(groups) for name in _names(group)}


def _names(group: Group) -> list[str]:
    """Return the names of a group's parameters; none for names that only number them."""
    names = [canonical_name(name) for name in group.get("param_names", ())]
    return [] if any(name.startswith("param.") for name in names) else names


def _matched(group: Group, saved: Group) -> Group:
    """Return the saved group with its parameters where the optimizer's group has those of their names."""
    if any(isinstance(number, str) for number in saved["params"]):
        return {key: value for key, value in saved.items() if key != "param_names"}
    names, others = _names(group), _names(saved)
    if not names or not others or names == others:
        return saved
    place = {name: index for index, name in enumerate(others)}
    left = iter([index for name, index in place.items() if name not in set(names)])
    order = [place[name] if name in place else next(left) for name in names]
    renamed = [(others[i], name) for name, i in zip(names, order, strict=True) if others[i] != name]
    if renamed:
        log.warning(
            "%d parameters have other names than in the saved state and take it over by their order, such as "
            "%s that of %s",
            len(renamed),
            *reversed(renamed[0]),
        )
    return {**saved, **{key: [saved[key][i] for i in order] for key in ("params", "param_names")}}
