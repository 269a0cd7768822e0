"""What a parameter is in a model: a matrix, an embedding, a router, by its module, name and whole shape."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from hardy.ops.philox import canonical_name

Role = Literal["matrix", "experts", "conv", "embedding", "vector", "router", "other"]
CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Tenant:
    """A trained parameter and what the modules that hold it say about it."""

    name: str
    """Its first name, without what wrappers add."""
    parameter: nn.Parameter
    role: Role


def tenants_of(model: nn.Module, *, vocab_size: int | None = None) -> Iterator[Tenant]:
    """Yield the trained parameters in the order of the model, tied ones once, under their first name.

    Args:
        model: on any device, also meta; wrapped or not.
        vocab_size: rows of an output head; None means those of the largest nn.Embedding.
    """
    modules = {_plain(path): module for path, module in model.named_modules()}
    names: dict[nn.Parameter, list[str]] = {}
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            names.setdefault(parameter, []).append(canonical_name(f"{path}.{leaf}" if path else leaf))
            owners.setdefault(parameter, []).append(module)
    heads = _heads(names, owners, vocab_size=vocab_size or _vocabulary(model))
    for parameter, (name, *_) in names.items():
        if parameter.requires_grad:
            role = "embedding" if parameter in heads else _role(name, parameter, owners[parameter], modules)
            yield Tenant(name=name, parameter=parameter, role=role)


def _plain(path: str) -> str:
    return canonical_name(f"{path}.").rstrip(".")


def _vocabulary(model: nn.Module) -> int | None:
    """Return the rows of the largest embedding."""
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return max(tables, default=None)


def _heads(
    names: Mapping[nn.Parameter, Sequence[str]],
    owners: Mapping[nn.Parameter, Sequence[nn.Module]],
    *,
    vocab_size: int | None,
) -> set[nn.Parameter]:
    """Return the weights of linear modules with as many rows as the vocabulary.

    In a small model a block may be as wide as the vocabulary is large, so what lies within a numbered block
    is no head, nor is a numbered module if there is one without a number.
    """
    found = [
        parameter
        for parameter, modules in owners.items()
        if parameter.ndim == 2
        and parameter.shape[0] == vocab_size
        and any(isinstance(module, nn.Linear) for module in modules)
    ]
    numbers = {p: [word.isdecimal() for word in names[p][0].split(".")[:-1]] for p in found}
    return {p for p in found if not any(numbers[p])} or {p for p in found if not any(numbers[p][:-1])}


def _role(
    name: str, parameter: nn.Parameter, owners: Sequence[nn.Module], modules: Mapping[str, nn.Module]
) -> Role:
    """Return what a parameter is, from its name, whole shape and the modules that hold it."""
    leaf = name.rpartition(".")[2]
    few = parameter.ndim < 2 or parameter.numel() == 0  # no rule of matrices takes one without elements
    if few or leaf.endswith("bias") or _any(owners, (nn.LayerNorm, nn.RMSNorm)):
        return "vector"
    if _any(owners, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if _is_router(name, modules):
        return "router"
    if _any(owners, CONVOLUTIONS):
        return "conv"
    kinds = " ".join(type(owner).__name__.lower() for owner in owners)
    if parameter.ndim == 3 and re.search("expert|moe", f"{name.lower()} {kinds}"):
        return "experts"
    # Conv1D is what transformers calls the linear modules of GPT-2.
    linear = _any(owners, (nn.Linear, nn.MultiheadAttention)) or re.search(r"linear|\bconv1d\b", kinds)
    return "matrix" if parameter.ndim == 2 and linear else "other"


def _any(owners: Sequence[nn.Module], kinds: tuple[type[nn.Module], ...]) -> bool:
    return any(isinstance(owner, kinds) for owner in owners)


def _is_router(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a parameter sends tokens to experts: a router, or a gate that stands beside experts.

    A gate alone proves nothing: gated feed-forward blocks have one too.
    """
    words = name.split(".")
    for count, word in enumerate(words, start=1):
        if re.search(r"(^|_)router(_weight)?$", word):
            return True
        parent = modules.get(".".join(words[: count - 1]))
        if parent is not None and re.search(r"(^|_)gate(_weight)?$", word):
            members = [child for child, _ in parent.named_children()]
            members += [leaf for leaf, _ in parent.named_parameters(recurse=False)]
            if any("expert" in member and member != word for member in members):
                return True
    return False
