"""What a micro-batch costs: quadratic attention, a linear rest, a constant, for every scheme; caps of tokens.

Paper: Hydraulis (arXiv 2412.07894). Letters: a, b, c time of s^2, of s, of
a micro-batch on one pipeline stage; s tokens of a sequence. Context parallelism of degree d divides a and b
by d and adds a communication that is linear in s, so it is of the same form.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hardy.balance.plan import Scheme
from hardy.config import UserError, reason_of

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
FORMAT = 1
"""Version of the file of a cost model."""


@dataclass(frozen=True, kw_only=True)
class SchemeCost:
    """Cost of a micro-batch under one scheme: c + sum of (a s^2 + b s) over its sequences."""

    scheme: Scheme
    a: float
    b: float
    c: float
    cap_tokens: int
    """Most tokens of a micro-batch that fit into memory."""
    util_tokens: int = 1
    """Fewest tokens of a micro-batch that still use the hardware well; limits the number of micro-batches."""

    def __post_init__(self) -> None:
        """Refuse costs below zero and caps below one."""
        if not (self.a >= 0 and self.b >= 0 and self.c >= 0) or self.a + self.b == 0:
            raise UserError(f"cost of {self.scheme}: a, b, c must be at least 0 and a or b above it")
        if self.cap_tokens < 1:
            raise UserError(f"cost of {self.scheme}: cap_tokens must be at least 1, got {self.cap_tokens}")

    def times(self, lengths: Integers) -> Floats:
        """Return a s^2 + b s of each sequence, without the constant of a micro-batch."""
        s = lengths.astype(np.float64)
        return (self.a * s + self.b) * s

    def attention(self, lengths: Integers) -> Floats:
        """Return the quadratic part of each sequence."""
        return self.a * lengths.astype(np.float64) ** 2


@dataclass(frozen=True, kw_only=True)
class LengthCostModel:
    """Costs of all schemes that groups may have; unit and facts say where they come from.

    Example:
        >>> alone = SchemeCost(scheme=Scheme(), a=1.0, b=10.0, c=5.0, cap_tokens=100)
        >>> LengthCostModel(schemes=(alone,)).of(Scheme()).times(np.array([1, 2])).tolist()
        [11.0, 24.0]
    """

    schemes: tuple[SchemeCost, ...]
    unit: str = "ms"
    """What costs are counted in; plans need only their ratios."""
    facts: tuple[tuple[str, str], ...] = ()
    """Where they come from: model, its hash, GPU, release of torch, dtype, recomputation."""

    def __post_init__(self) -> None:
        """Refuse a model without schemes, or with one twice."""
        found = [cost.scheme for cost in self.schemes]
        if not found or len(set(found)) < len(found):
            raise UserError(
                f"a cost model needs schemes, each once; got {', '.join(map(str, found)) or 'none'}"
            )

    def of(self, scheme: Scheme) -> SchemeCost:
        """Return the cost of `scheme`, or raise UserError with those that are known."""
        for cost in self.schemes:
            if cost.scheme == scheme:
                return cost
        known = ", ".join(str(cost.scheme) for cost in self.schemes)
        raise UserError(f"the cost model knows no scheme {scheme}; it has {known}")

    def times(self, lengths: Sequence[int] | Integers) -> Floats:
        """Return the time of each sequence in the smallest group, to compare their work by."""
        smallest = min(self.schemes, key=lambda cost: (cost.scheme.ranks, cost.scheme))
        return smallest.times(np.asarray(lengths, dtype=np.int64))

    def only(self, schemes: Iterable[Scheme]) -> "LengthCostModel":
        """Return the model with these schemes alone."""
        return replace(self, schemes=tuple(self.of(scheme) for scheme in schemes))

    def context_schemes(self, world_size: int) -> tuple[SchemeCost, ...]:
        """Return the costs of pure context parallelism up to `world_size` ranks, few ranks first.

        Raises:
            UserError: there is none, so groups could not be formed.
        """
        found = [cost for cost in self.schemes if cost.scheme.ranks == cost.scheme.context <= world_size]
        if not found:
            raise UserError(f"the cost model has no context-parallel scheme for {world_size} ranks")
        return tuple(sorted(found, key=lambda cost: cost.scheme))

    def forms_groups(self, world_size: int) -> bool:
        """Return whether several of so many ranks may share a document, by context parallelism."""
        return any(own.scheme.ranks > 1 for own in self.context_schemes(world_size))

    def check_groups(self, world_size: int, *, source: str, way_out: str) -> None:
        """Refuse costs by which several ranks could never form a group; one rank alone needs none.

        Args:
            world_size: ranks.
            source: where the costs come from, for the error.
            way_out: what can be asked for instead of groups, for the error.

        Raises:
            UserError: names the degrees that have costs, and the ways out.
        """
        if world_size == 1 or self.forms_groups(world_size):
            return
        degrees = sorted(own.scheme.context for own in self.schemes if own.scheme.ranks == own.scheme.context)
        raise UserError(
            f"{source} has costs of context-parallel degree {', '.join(map(str, degrees))} only, and "
            f"{world_size} ranks need others to form groups that share a document; make it again with "
            f"`hardy balance profile --ranks {world_size} --out FILE` (--workers {world_size} times groups, "
            f"else they are derived), or {way_out}"
        )

    def with_cap(self, cap_tokens: int) -> "LengthCostModel":
        """Return the model with at most `cap_tokens` tokens for each rank of context parallelism."""
        return replace(
            self,
            schemes=tuple(
                replace(cost, cap_tokens=min(cost.cap_tokens, cap_tokens * cost.scheme.context))
                for cost in self.schemes
            ),
        )

    def save(self, path: Path) -> None:
        """Write the model as JSON."""
        path.write_text(json.dumps(self.plain(), indent=1) + "\n", encoding="utf-8")

    def plain(self) -> dict[str, Any]:
        """Return the model as plain values."""
        rows = [
            {
                "tensor": cost.scheme.tensor,
                "pipeline": cost.scheme.pipeline,
                "context": cost.scheme.context,
                **{key: getattr(cost, key) for key in ("a", "b", "c", "cap_tokens", "util_tokens")},
            }
            for cost in self.schemes
        ]
        return {"format": FORMAT, "unit": self.unit, "facts": dict(self.facts), "schemes": rows}


def load_cost(path: Path, *, model_hash: str | None = None) -> LengthCostModel:
    """Read a cost model that was saved.

    Args:
        path: the file.
        model_hash: of the model that will be trained (`shape_hash`); none accepts any.

    Raises:
        UserError: no such file, not a cost file, or one for another model.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a cost file: {reason_of(error)}") from None
    try:
        if told["format"] != FORMAT:
            raise UserError(f"{path} has format {told['format']}; this hardy reads {FORMAT}: profile again")
        model = LengthCostModel(
            schemes=tuple(_scheme_cost(row) for row in told["schemes"]),
            unit=str(told["unit"]),
            facts=tuple((str(key), str(value)) for key, value in told["facts"].items()),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no cost file ({type(error).__name__}: {error}); see `hardy balance profile`"
        ) from None
    found = dict(model.facts).get("model_hash")
    if model_hash is not None and found != model_hash:
        raise UserError(
            f"{path} was measured for another model (hash {found}, not {model_hash}); run "
            f"`hardy balance profile` for this one"
        )
    return model


def _scheme_cost(row: Mapping[str, Any]) -> SchemeCost:
    return SchemeCost(
        scheme=Scheme(tensor=int(row["tensor"]), pipeline=int(row["pipeline"]), context=int(row["context"])),
        a=float(row["a"]),
        b=float(row["b"]),
        c=float(row["c"]),
        cap_tokens=int(row["cap_tokens"]),
        util_tokens=int(row["util_tokens"]),
    )


class DecoderSizes(NamedTuple):
    """The sizes of a decoder that decide what a token costs."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    ffn_matrices: int = 3
    """3 where the feed-forward block is gated (SwiGLU), else 2."""


def shape_hash(sizes: DecoderSizes) -> str:
    """Return what a cost file remembers of its model.

    Example:
        >>> shape_hash(DecoderSizes(1, 8, 16, 2, 2, 4, 32)) == shape_hash(DecoderSizes(1, 8, 16, 2, 1, 4, 32))
        False
    """
    return hashlib.blake2b(repr(tuple(sizes)).encode(), digest_size=8).hexdigest()


class Flops(NamedTuple):
    """Floating-point operations of one sequence of s tokens: quadratic * s^2 + linear * s."""

    quadratic: float
    linear: float

    def of(self, tokens: int) -> float:
        """Return the operations of one sequence."""
        return (self.quadratic * tokens + self.linear) * tokens


def forward_flops(sizes: DecoderSizes) -> Flops:
    """Return what one layer's forward pass takes, causal attention, without the head.

    Example:
        >>> llama_7b = forward_flops(DecoderSizes(32, 4096, 11008, 32, 32, 128, 32000))
        >>> round(llama_7b.linear / 1e6, 1), round(llama_7b.quadratic * 32768 / 1e6)
        (404.8, 268)
    """
    L, H, F, Hq, Hkv, D, V, m = sizes
    del L, V
    quadratic = 2.0 * Hq * D
    return Flops(quadratic, 4.0 * H * Hq * D + 4.0 * H * Hkv * D + 2.0 * m * H * F + quadratic)


def training_flops(sizes: DecoderSizes, *, recompute: bool = False) -> Flops:
    """Return what all layers and the head take, forward and backward.

    The linear part counts three times (four where blocks are computed again), flash attention 3.5 times
    (4.5): its backward pass has five products against two.
    """
    per_layer = forward_flops(sizes)
    linear = per_layer.linear - per_layer.quadratic
    again = 1.0 if recompute else 0.0
    attention = (3.5 + again) * per_layer.quadratic
    head = 3.0 * 2.0 * sizes.hidden_size * sizes.vocab_size
    return Flops(
        sizes.num_layers * attention,
        sizes.num_layers * ((3.0 + again) * linear + attention) + head,
    )


def analytic_cost(
    sizes: DecoderSizes,
    *,
    cap_tokens: int,
    degrees: Sequence[int] = (1, 2, 4, 8),
    recompute: bool = False,
    communication: float = 0.05,
    constant_tokens: int = 0,
) -> LengthCostModel:
    """Return costs counted in GFLOP, where nothing was measured.

    Args:
        sizes: of the decoder.
        cap_tokens: most tokens that fit on one rank.
        degrees: of context parallelism.
        recompute: whether blocks are computed again in the backward pass.
        communication: share by which any context parallelism makes a sequence dearer (assumed).
        constant_tokens: what a micro-batch costs beside its tokens, in short tokens (assumed).
    """
    flops = training_flops(sizes, recompute=recompute)

    def one(degree: int) -> SchemeCost:
        scale = 1e-9 / degree * (1 + communication if degree > 1 else 1)
        return SchemeCost(
            scheme=Scheme(context=degree),
            a=flops.quadratic * scale,
            b=flops.linear * scale,
            c=flops.linear * 1e-9 * constant_tokens,
            cap_tokens=cap_tokens * degree,
        )

    facts = (("source", "analytic"), ("model_hash", shape_hash(sizes)), ("recompute", str(recompute)))
    return LengthCostModel(schemes=tuple(map(one, degrees)), unit="GFLOP", facts=facts)
