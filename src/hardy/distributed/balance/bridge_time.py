"""How long the bridge takes in a step, for the choice of replicas: its bytes over a bandwidth.

Paper: Hydraulis (arXiv 2412.07894), which asks that moving weights be part of what is minimised. The bytes
are those that `bridge` counts, of the weights that go out and the gradients that come back; each way takes as
long as the rank that sends most, and nothing is hidden behind computing. Follows from integers alone.

Executed here are tensor-parallel replicas. Pipelines and replicas that mix kinds are counted too, for plans:
the ranks of a pipeline's stage hold its layers, and ranks that share documents by context hold the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from hardy.balance.cost import DecoderSizes
from hardy.balance.plan import Group, Scheme
from hardy.balance.strategies import Strategy, strategy_text
from hardy.config import UserError
from hardy.distributed.balance.bridge import BridgeBytes, Cut, bridge_bytes

Parameters = tuple[tuple[Cut, int], ...]
"""The cut of each, and the bytes of one of its rows as they are sent."""


@dataclass(frozen=True, kw_only=True)
class BridgedModel:
    """The parameters of a model as the bridge cuts them."""

    num_layers: int
    layer: Parameters
    """Of one layer; all are alike."""
    before: Parameters
    """Of what stands before the layers, with a pipeline's first stage."""
    after: Parameters
    """Of what stands after them, with its last."""

    def stage(self, place: int, *, stages: int) -> Parameters:
        """Return what the ranks of one stage of a pipeline hold; equal cuts are one."""
        layers = (place + 1) * self.num_layers // stages - place * self.num_layers // stages
        held = [(cut, layers * row_bytes) for cut, row_bytes in self.layer if layers]
        held += self.before if place == 0 else ()
        held += self.after if place == stages - 1 else ()
        together: dict[Cut, int] = {}
        for cut, row_bytes in held:
            together[cut] = together.get(cut, 0) + row_bytes
        return tuple(together.items())


def bridged_decoder(
    sizes: DecoderSizes,
    *,
    element_bytes: int = 2,
    vocabulary: Literal["whole", "shared"] = "whole",
    head: Literal["own", "tied"] = "own",
) -> BridgedModel:
    """Return a decoder as `MasterWeights` cuts it by `decoder_splits`.

    Args:
        sizes: of the decoder.
        element_bytes: of a weight and of a gradient as they are sent; 2 for bf16.
        vocabulary: whether every rank of a replica has the whole embedding and head, as hardy's decoder has
            them, or they share them.
        head: whether it has weights of its own, or those of the embedding.

    Example:
        >>> model = bridged_decoder(DecoderSizes(2, 8, 16, 2, 2, 4, 32))
        >>> sum(cut.size * row_bytes for cut, row_bytes in model.stage(0, stages=1)) // 2  # parameters
        1832
    """
    hidden = sizes.hidden_size * element_bytes
    projections = (
        sizes.num_heads * sizes.head_size,  # queries
        *[sizes.num_kv_heads * sizes.head_size] * 2,
        sizes.num_heads * sizes.head_size,  # output, cut by its columns
        *[sizes.intermediate_size] * sizes.ffn_matrices,
    )
    norm = (Cut(size=sizes.hidden_size, shared=False), element_bytes)
    words = (Cut(size=sizes.vocab_size, shared=vocabulary == "shared"), hidden)
    return BridgedModel(
        num_layers=sizes.num_layers,
        layer=(*((Cut(size=size, shared=True), hidden) for size in projections), norm, norm),
        before=(words,),
        after=(norm, words) if head == "own" else (norm,),
    )


@dataclass(frozen=True, kw_only=True)
class BridgeTime:
    """What `plan_strategies` and `propose` add to a step of a strategy's replicas.

    Example:
        >>> model = bridged_decoder(DecoderSizes(2, 8, 16, 2, 2, 4, 32))
        >>> bridge = BridgeTime(model=model, world_size=2, bytes_per_unit=1000.0)
        >>> bridge((Scheme(),) * 2), bridge((Scheme(tensor=2),))
        (3.664, 0.552)
    """

    model: BridgedModel
    world_size: int
    bytes_per_unit: float
    """What a rank sends in one unit of the costs: 1e6 where they are in ms and it sends 1 GB a second."""

    def __call__(self, strategy: Strategy) -> float:
        """Return the time of a step's bridge, in the unit of the costs."""
        sent = self.bytes_of(strategy)
        return (max(sent.weights) + max(sent.gradients)) / self.bytes_per_unit

    def bytes_of(self, strategy: Strategy) -> BridgeBytes:
        """Return what each rank sends in a step; replicas stand side by side from rank 0, as in plans.

        Raises:
            UserError: the strategy has more ranks than there are.
        """
        used = sum(scheme.ranks for scheme in strategy)
        if used > self.world_size:
            raise UserError(
                f"strategy {strategy_text(strategy)} has {used} ranks, more than the {self.world_size} there "
                f"are; leave replicas out"
            )
        weights, gradients = [0] * self.world_size, [0] * self.world_size
        first_rank = 0
        for scheme in strategy:
            group = Group(first_rank=first_rank, scheme=scheme)
            part = _bytes_of_group(self.model, group, self.world_size)
            weights = [a + b for a, b in zip(weights, part.weights, strict=True)]
            gradients = [a + b for a, b in zip(gradients, part.gradients, strict=True)]
            first_rank += scheme.ranks
        return BridgeBytes(weights=tuple(weights), gradients=tuple(gradients))


@lru_cache(maxsize=4096)
def _bytes_of_group(model: BridgedModel, group: Group, world_size: int) -> BridgeBytes:
    """Return what each rank sends for one replica; those of a strategy add up."""
    parts = [
        bridge_bytes(model.stage(place, stages=group.scheme.pipeline), (shards,), world_size)
        for place, shards in _shards(group)
    ]
    return BridgeBytes(
        weights=tuple(map(sum, zip(*(part.weights for part in parts), strict=True))),
        gradients=tuple(map(sum, zip(*(part.gradients for part in parts), strict=True))),
    )


def _shards(group: Group) -> Iterator[tuple[int, Group]]:
    """Yield the ranks that share a stage's weights, and the place of that stage."""
    scheme, first_rank = group.scheme, group.first_rank
    for place in range(scheme.pipeline):
        for _ in range(scheme.context):
            yield place, Group(first_rank=first_rank, scheme=Scheme(tensor=scheme.tensor))
            first_rank += scheme.tensor
