"""How far a replica's parameters are from those of its neighbours, by sketches or by whole copies.

Paper: "Adaptive Weighting Push-SUM" (arXiv 2412.07252).   Letters: b_i[j] the last half-step numerators
that i has of j, D = ||b_i[i] - b_i[j]||^2, 0 for a neighbour never heard of.

Distances lag one round behind: they are of the half-steps of the last exchange. Sketches travel both ways
along an edge; copies only with the parameters, so whoever never hears from a receiver gives it the least for
ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hardy.distributed.comm import Communicator
from hardy.distributed.gossip.config import WeightsConfig
from hardy.distributed.gossip.sketch import Sketcher
from hardy.distributed.gossip.vectors import Vectors
from hardy.distributed.gossip.weights import moreau_shares, scaled_distance


@dataclass(kw_only=True)
class Known:
    """What a replica knows of one: a sketch, or copies."""

    vectors: list[Tensor] = field(default_factory=list)

    def square_to(self, other: "Known") -> Tensor:
        """Return the squared distance, fp64, of what is held here."""
        squares = [
            torch.linalg.vector_norm(a.double() - b.double()).square()
            for a, b in zip(self.vectors, other.vectors, strict=True)
        ]
        return torch.stack(squares).sum()

    def square(self) -> Tensor:
        """Return the squared norm, fp64."""
        return torch.stack([torch.linalg.vector_norm(a.double()).square() for a in self.vectors]).sum()


class Distances:
    """What a replica knows of itself and its neighbours, and the shares that follow.

    Args:
        config: of the adaptive rule.
        vectors: the model.
        inner: the workers of this replica.
        seed: of sketches, the same on all replicas.
    """

    def __init__(self, config: WeightsConfig, vectors: Vectors, inner: Communicator, *, seed: int) -> None:
        self.config, self._vectors, self._inner = config, vectors, inner
        self.uses_sketches = config.distance_mode == "sketch"
        self._sketcher = Sketcher(config.sketch_size, seed=seed, device=vectors.device)
        self.own: Known | None = None
        self.of: dict[int, Known] = {}
        """By neighbour."""
        self.last: dict[int, float] = {}
        """Distances of the last shares, as the rule counted them."""

    def shares(self, receivers: Sequence[int]) -> dict[int, float]:
        """Return w by receiver."""
        known = [receiver for receiver in receivers if receiver in self.of and self.own is not None]
        self.last = dict.fromkeys(receivers, 0.0)
        if known and self.own is not None:
            numbers = [self.own.square(), *(self.own.square_to(self.of[receiver]) for receiver in known)]
            total = torch.stack(numbers)
            if not self.uses_sketches and self._inner.size > 1:  # a sketch is of the whole replica already
                total = self._inner.sum(total)
            own_square, *squares = total.tolist()
            for receiver, square in zip(known, squares, strict=True):
                self.last[receiver] = scaled_distance(
                    square, self.config, own_square=own_square, num_parameters=self._vectors.num_parameters
                )
        return moreau_shares(self.last, num_receivers=len(receivers) + 1, v=self.config.v, k=self.config.rate)

    def sketch(self, x: Sequence[Tensor], mass: float) -> Tensor | None:
        """Return the sketch of this replica's half-steps, the same on all its workers; None for copies."""
        if not self.uses_sketches:
            return None
        parts = self._vectors.located(x, with_buffers=self._inner.rank == 0)
        sketch_m = self._sketcher.sketch(parts)
        if self._inner.size > 1:
            sketch_m = self._inner.sum(sketch_m)
        return sketch_m / mass if self.config.distance_of == "debiased" else sketch_m

    def note_own(self, x: Sequence[Tensor], sketch_m: Tensor | None, mass: float) -> None:
        """Keep this replica's half-steps for the next round."""
        self.own = self._known(x, sketch_m, mass)

    def note(self, member: int, x: Sequence[Tensor], sketch_m: Tensor | None, mass: float) -> None:
        """Keep a neighbour's half-steps."""
        if sketch_m is not None:
            self.note_sketch(member, sketch_m)
        else:
            self.of[member] = self._known(x, None, mass)

    def note_sketch(self, member: int, sketch_m: Tensor | None) -> None:
        """Keep a neighbour's sketch, unless it is broken."""
        if sketch_m is not None and bool(sketch_m.isfinite().all()):
            self.of[member] = Known(vectors=[sketch_m])

    def _known(self, x: Sequence[Tensor], sketch_m: Tensor | None, mass: float) -> Known:
        if sketch_m is not None:
            return Known(vectors=[sketch_m])
        factor = 1 / mass if self.config.distance_of == "debiased" else 1.0
        return Known(vectors=[part.to(self._vectors.dtype) * factor for part in x])
