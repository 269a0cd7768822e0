"""Which rule updates which parameter: the method's own the matrices, a chosen one embeddings, AdamW the rest.

A model is rarely trained by one rule: the method is made for matrices, vectors are too small to matter, and
embeddings hold most of the state once the matrices hold little (APOLLO, arXiv 2412.05270; SMMF, arXiv
2412.08894).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hardy.config import ConfigError
from hardy.optim.presets import MATRIX_ROLES, check_kind, kind_for
from hardy.optim.roles import Role, Tenant, tenants_of
from hardy.optim.state_bytes import state_bytes
from hardy.optim.table_text import aligned, bytes_text

Rule = tuple[str, str, Mapping[str, Any]]
"""(pattern searched for in a parameter's name, kind, settings of its group)."""
Group = dict[str, Any]

RESERVED = frozenset({"params", "param_names", "kind", "role"})
"""Keys of a group that routing fills in itself."""


def route_params(
    model: nn.Module,
    rules: Sequence[Rule] | None = None,
    *,
    kind: str = "apollo",
    embed_kind: str = "adamw",
    weight_decay: float = 0.0,
    vocab_size: int | None = None,
) -> list[Group]:
    """Return parameter groups: who is updated by which rule.

    A group is `{"params": [(name, parameter), ...], "kind", "role", "weight_decay"}` and the settings of the
    rule that chose it. Roles, in the order in which they are asked for:

        vector     one dimension or none, biases, norms                    adamw
        embedding  of an nn.Embedding, also where a head shares it, and    embed_kind
                   the head: an nn.Linear with as many rows as the vocabulary
        router     what sends tokens to experts                            adamw
        experts    [experts, rows, columns]                                kind
        conv       convolutions, one matrix of all but the first dimension kind
        matrix     of linear modules                                       kind
        other      all else                                                adamw

    Among all else are the weights of recurrent modules, parametrized ones and adapters; `rules` give them to
    another kind. `sgd` and `adafactor` take every role but the embedding, which takes `embed_kind`; `muon`
    takes plain matrices only. Tied weights appear once, under their first name; frozen ones are left out.
    Works on meta tensors, under DDP, FSDP2 (by whole shapes), torch.compile and activation checkpointing.

    Args:
        model: whose parameters are routed.
        rules: (pattern, kind, settings), searched for in names in this order; the first that matches decides.
        kind: rule of matrices.
        embed_kind: rule of embeddings and head.
        weight_decay: of matrices under `kind`; all others have none unless a rule's settings say so.
        vocab_size: rows of the head; None means those of the largest nn.Embedding.

    Raises:
        ConfigError: an unknown kind, a rule that matches nothing or cannot take a parameter, or nothing to
            train.

    Example:
        >>> from torch import nn
        >>> groups = route_params(nn.Linear(3, 2), kind="smmf")
        >>> [(group["kind"], group["role"], [name for name, _ in group["params"]]) for group in groups]
        [('smmf', 'matrix', ['weight']), ('adamw', 'vector', ['bias'])]
    """
    for name in (kind, embed_kind):
        check_kind(name)
    patterns = _compiled(rules or ())
    tenants = list(tenants_of(model, vocab_size=vocab_size))
    if not tenants:
        raise ConfigError("the model has no parameter that is trained; all are frozen or it has none")
    groups: dict[tuple[int | None, str, Role], Group] = {}
    for tenant in tenants:
        index = next((i for i, (pattern, _, _) in enumerate(patterns) if pattern.search(tenant.name)), None)
        if index is None:
            chosen, settings = kind_for(tenant.role, kind=kind, embed_kind=embed_kind), {}
        else:
            _, chosen, settings = patterns[index]
        _check_shape(tenant, chosen, rule=None if index is None else patterns[index][0].pattern)
        decayed = tenant.role in MATRIX_ROLES and chosen == kind
        group = groups.setdefault(
            (index, chosen, tenant.role),
            {
                "params": [],
                "kind": chosen,
                "role": tenant.role,
                "weight_decay": weight_decay if decayed else 0.0,
                **({"stacked": False} if chosen == "apollo" and tenant.role == "conv" else {}),
                **settings,
            },
        )
        group["params"].append((tenant.name, tenant.parameter))
    _check_used(patterns, tenants, used={index for index, _, _ in groups})
    return list(groups.values())


def describe(groups: Sequence[Group], *, settings: Mapping[str, Any] | None = None) -> str:
    """Return a table of the groups with their state, and a warning where embeddings hold most of it.

    Bytes are those of the whole model, before any sharding.

    Args:
        groups: as `route_params` returns them.
        settings: those of the optimizer, such as its rank, which a group's own override.
    """
    rows = [("group", "kind", "tensors", "elements", "state")]
    sizes: list[int] = []
    for group in groups:
        sizes.append(group_state_bytes(group, settings=settings))
        elements = sum(parameter.numel() for _, parameter in group["params"])
        rows.append(
            (
                group["role"],
                group["kind"],
                f"{len(group['params']):,}",
                f"{elements:,}",
                bytes_text(sizes[-1]),
            )
        )
    return "\n".join([aligned(rows, words=2), *_embedding_warning(groups, sizes)])


def group_state_bytes(group: Group, *, settings: Mapping[str, Any] | None = None) -> int:
    """Return the bytes of state of a whole group; its own settings override `settings`."""
    known = {**(settings or {}), **group}
    return sum(
        state_bytes(
            group["kind"], tuple(parameter.shape), settings=known, weight_bytes=parameter.element_size()
        )
        for _, parameter in group["params"]
    )


_LEAN_KINDS = frozenset({"apollo", "smmf"})
"""Rules that are chosen for their small state; `optim.embed_kind` is a setting of theirs, not of muon's."""


def _embedding_warning(groups: Sequence[Group], sizes: Sequence[int]) -> list[str]:
    """Return a line if embeddings under AdamW hold more state than all others, who have a leaner rule."""
    at = [i for i, group in enumerate(groups) if (group["role"], group["kind"]) == ("embedding", "adamw")]
    lean = any(group["role"] in MATRIX_ROLES and group["kind"] in _LEAN_KINDS for group in groups)
    held, total = sum(sizes[i] for i in at), sum(sizes)
    if not lean or 2 * held <= total:
        return []
    less = sum(group_state_bytes({**groups[i], "kind": "smmf"}) for i in at)
    return [
        f"warning: embeddings under adamw hold {bytes_text(held)} of {bytes_text(total)} of state; with "
        f"embed_kind='smmf' they would hold {bytes_text(less)}"
    ]


def _compiled(rules: Sequence[Rule]) -> list[tuple[re.Pattern[str], str, Mapping[str, Any]]]:
    """Return the rules with their patterns compiled, or refuse one."""
    result: list[tuple[re.Pattern[str], str, Mapping[str, Any]]] = []
    for pattern, kind, settings in rules:
        try:
            check_kind(kind)
            result.append((re.compile(pattern), kind, settings))
        except re.error as error:
            raise ConfigError(f"routing rule {pattern!r} is no regular expression: {error}") from None
        except ConfigError as error:
            raise ConfigError(f"routing rule {pattern!r}: {error}") from None
        if RESERVED & settings.keys():
            names = ", ".join(sorted(RESERVED & settings.keys()))
            raise ConfigError(f"routing rule {pattern!r} sets {names}, which routing fills in; leave it out")
    return result


def _check_shape(tenant: Tenant, kind: str, *, rule: str | None) -> None:
    """Refuse a parameter that its kind cannot take."""
    shape = tuple(tenant.parameter.shape)
    allowed = {"apollo": len(shape) >= 2, "muon": len(shape) == 2}.get(kind, True)
    if not allowed:
        by = f"routing rule {rule!r}" if rule is not None else "routing"
        raise ConfigError(
            f"{by} gives {tenant.name} of shape {shape} to kind {kind!r}, which takes matrices; narrow the "
            f"pattern or use kind 'adamw'"
        )


def _check_used(
    patterns: Sequence[tuple[re.Pattern[str], str, Mapping[str, Any]]],
    tenants: Sequence[Tenant],
    *,
    used: set[int | None],
) -> None:
    """Refuse a rule that decides nothing: it is a misspelling, or stands behind one that takes all."""
    for index, (pattern, _, _) in enumerate(patterns):
        if index in used:
            continue
        if any(pattern.search(tenant.name) for tenant in tenants):
            raise ConfigError(
                f"routing rule {pattern.pattern!r} decides nothing: rules before it take all it matches; "
                f"move it up"
            )
        raise ConfigError(
            f"routing rule {pattern.pattern!r} matches no trained parameter; names are such as "
            f"{tenants[0].name!r}"
        )
