"""Optimizers by name: the rule of matrices, that of embeddings, and the settings that make the method.

The one place where these constants stand; `make_optimizer` and `hardy plan` read them. Free of torch.

Papers: APOLLO (arXiv 2412.05270), table of settings: rank 256 by channel with scale 1, Mini rank 1 by tensor
with scale sqrt(128); Q-APOLLO: groups of 128. SMMF (arXiv 2412.08894): decay rate -0.8 for Transformers, from
the authors' advice.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hardy.config import ConfigError, unknown_name

KINDS = ("adamw", "apollo", "smmf", "sgd", "adafactor", "muon")
"""Rules that a group of parameters may follow."""
WHOLE_MODEL_KINDS = frozenset({"sgd", "adafactor"})
"""Rules that take every tensor of a model; beside the others, vectors and routers go to AdamW."""
MATRIX_ROLES = frozenset({"matrix", "experts", "conv"})
"""What the method's own rule is made for."""
QUANTIZED_GROUP = 128
"""Columns of a row that share one scale and one zero point where weights are stored as int8."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One named optimizer."""

    kind: str
    """Rule of the matrices."""
    embed_kind: str
    """Rule of embeddings and output head."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the matrices' groups that differ from the rule's defaults."""
    int8_weights: bool = False
    """Whether matrices are stored as int8 with a scale and a zero point per `QUANTIZED_GROUP` columns."""
    release: bool = False
    """Whether gradients are applied and let go one by one during the backward pass."""


_APOLLO: Mapping[str, Any] = {"lr": 1e-2, "rank": 256, "scale_type": "channel", "scale": 1.0}
_MINI: Mapping[str, Any] = {"lr": 1e-2, "rank": 1, "scale_type": "tensor", "scale": math.sqrt(128)}

PRESETS: dict[str, Preset] = {
    "adamw": Preset(kind="adamw", embed_kind="adamw"),
    "adaptive_adamw": Preset(kind="adamw", embed_kind="adamw"),
    "apollo": Preset(kind="apollo", embed_kind="adamw", settings=_APOLLO),
    "apollo_mini": Preset(kind="apollo", embed_kind="adamw", settings=_MINI),
    "apollo_svd": Preset(kind="apollo", embed_kind="adamw", settings={**_APOLLO, "proj": "svd"}),
    "qapollo": Preset(kind="apollo", embed_kind="adamw", settings=_MINI, int8_weights=True, release=True),
    "smmf": Preset(kind="smmf", embed_kind="adamw", settings={"decay_rate": -0.8}),
    "smmf_llm": Preset(kind="smmf", embed_kind="adamw", settings={"decay_rate": -0.8, "max_update": 10.0}),
    "sgd": Preset(kind="sgd", embed_kind="sgd", settings={"momentum": 0.9}),
    "adafactor": Preset(kind="adafactor", embed_kind="adafactor"),
    "muon": Preset(kind="muon", embed_kind="adamw"),
}
"""Presets by name; a name may be written with hyphens. Beside smmf_llm, the specification clips by history
(`optim.guard.history`), which is the run's matter, not the optimizer's."""


def preset(name: str) -> Preset:
    """Return the preset called `name`; hyphens and underscores are the same.

    Example:
        >>> preset("apollo-mini").settings["rank"]
        1

    Raises:
        ConfigError: there is none of that name; the text says which is nearest.
    """
    found = PRESETS.get(name.replace("-", "_"))
    if found is None:
        raise ConfigError(unknown_name(name, "optimizer", PRESETS))
    return found


def check_kind(kind: str) -> None:
    """Refuse a rule that does not exist.

    Raises:
        ConfigError: with the nearest name.
    """
    if kind not in KINDS:
        raise ConfigError(unknown_name(kind, "kind of parameter group", KINDS))


def kind_for(role: str, *, kind: str, embed_kind: str) -> str:
    """Return the rule that a parameter follows unless a routing rule says otherwise.

    Args:
        role: as `hardy.optim.roles` finds it.
        kind: rule of the matrices.
        embed_kind: rule of embeddings and head.

    Example:
        >>> [kind_for(role, kind="apollo", embed_kind="smmf") for role in ("conv", "embedding", "router")]
        ['apollo', 'smmf', 'adamw']
    """
    if role == "embedding":
        return embed_kind
    if kind in WHOLE_MODEL_KINDS:
        return kind
    # Torch's Muon takes tensors of two dimensions only.
    takes = role == "matrix" if kind == "muon" else role in MATRIX_ROLES
    return kind if takes else "adamw"
