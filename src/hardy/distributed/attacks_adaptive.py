"""Attacks that know more than the honest gradients: the trusted gradient, the rule itself, or the past.

Paper: mimic, Karimireddy et al., "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", 2022.
Edge and cosine are ours, against dSTAR.
Letters: H honest rows x_i, mu their mean, g_v trusted gradient, u unit part of mu orthogonal to g_v, z
direction in which honest rows differ most.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hardy.config import ConfigError, NonNegativeInt, PositiveFloat, PositiveInt
from hardy.distributed.attacks_informed import Alie, Ipm
from hardy.distributed.attacks_stage import (
    Attack,
    Chunk,
    Finite,
    Stage,
    dot,
    exact,
    lower_median,
    normal_from,
    safe_ratio,
    uniform_at,
)
from hardy.rng import seed_for

LEAST_GAIN = 1e-5
"""What counts as farther in a search: more than rounding, so that parts of a stack go as the whole."""


@dataclass(kw_only=True)
class _AgainstTrusted(Attack):
    """What edge and cosine share: along * g_v - across * u, from totals over all columns."""

    needs = "reference"

    def play(self, stage: Stage) -> None:
        """Write the vector."""

        def numbers(chunk: Chunk) -> Tensor:
            rows_Hc, gv_c = stage.honest_rows(chunk), trusted(chunk)
            mu_c, away_Hc = rows_Hc.mean(0).double(), rows_Hc - gv_c
            own = [dot(rows_Hc, gv_c), dot(rows_Hc, rows_Hc), dot(away_Hc, away_Hc)]
            wide = gv_c.double()
            shared = torch.stack([dot(wide, wide), dot(mu_c, wide)])
            return torch.cat([torch.stack(own).double().flatten(), shared])

        found = stage.sum(numbers)
        dots_H, squares_H, away2_H = found[:-2].view(3, -1)
        gv2, mu_gv = found[-2:]
        share = safe_ratio(mu_gv, gv2)  # of g_v that mu - u holds

        def orthogonal(chunk: Chunk) -> Tensor:
            return stage.honest_rows(chunk).mean(0).double() - share * trusted(chunk).double()

        u2 = stage.sum(lambda chunk: (lambda u_c: dot(u_c, u_c)[None])(orthogonal(chunk)))
        along, across = self._lengths(dots_H, squares_H, away2_H, gv2)
        per_u = safe_ratio(across, u2.sqrt())
        stage.write(lambda chunk: along * trusted(chunk) - per_u * orthogonal(chunk))

    def _lengths(
        self, dots_H: Tensor, squares_H: Tensor, away2_H: Tensor, gv2: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return how many g_v along and how long across.

        Args:
            dots_H: <x_i, g_v>.
            squares_H: ||x_i||^2.
            away2_H: ||x_i - g_v||^2.
            gv2: ||g_v||^2.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class Edge(_AgainstTrusted):
    """Just inside the middle distance to the trusted gradient, with a hair of agreement: t g_v - L u."""

    reach: Finite = 0.95
    """Of the lower median of the honest distances to g_v."""
    along: Finite = 1e-3
    """t: how many g_v; above 0, so that the dot product is."""

    def _lengths(
        self, dots_H: Tensor, squares_H: Tensor, away2_H: Tensor, gv2: Tensor
    ) -> tuple[Tensor, Tensor]:
        squared = self.reach**2 * lower_median(away2_H) - (1 - self.along) ** 2 * gv2
        return torch.full_like(gv2, self.along), squared.clamp(min=0).sqrt()


@dataclass(kw_only=True)
class Cosine(_AgainstTrusted):
    """As long as the trusted gradient, and turned away from it as far as honest ones are."""

    q: PositiveFloat = 1.05
    """From 0.5: in median honest cosines with g_v (kept from 0.02 to 0.99); below 0.5: the cosine itself."""

    def _lengths(
        self, dots_H: Tensor, squares_H: Tensor, away2_H: Tensor, gv2: Tensor
    ) -> tuple[Tensor, Tensor]:
        cosines_H = safe_ratio(dots_H, (squares_H * gv2).sqrt())
        middle = (self.q * lower_median(cosines_H)).clamp(0.02, 0.99)
        cosine = middle if self.q >= 0.5 else torch.full_like(middle, self.q)
        return cosine, (1 - cosine**2).sqrt() * gv2.sqrt()


def trusted(chunk: Chunk) -> Tensor:
    """Return g_v [c], at least fp32."""
    assert chunk.reference is not None  # `needs` was checked
    return chunk.reference


@dataclass(kw_only=True)
class Optimal(Attack):
    """The strength of ipm or alie that moves the actual rule's result farthest from mu, found by trying."""

    needs = "honest"
    base: Literal["ipm", "alie"] = "ipm"
    """Which family of vectors."""
    evaluations: PositiveInt = 20
    """How often the rule is tried."""

    def play(self, stage: Stage) -> None:
        """Search from 0 by steps of 10, doubled while it gets worse for the rule, then shrunk by 0.8."""
        if stage.rule is None:
            raise ConfigError(
                "attack 'optimal' tries out the actual rule: pass rule=, a function from blocks to vectors"
            )
        best, worst = 0.0, self._distance(stage, 0.0)
        step, growing, side = 10.0, True, 1
        for _ in range(self.evaluations - 1):
            tried = max(best + side * step, 0.0)
            distance = self._distance(stage, tried)
            if distance > worst * (1 + LEAST_GAIN):
                best, worst = tried, distance
                step *= 2 if growing else 1
            elif growing or side < 0 or best == 0:
                growing, side, step = False, 1, step * 0.8
            else:
                side = -1  # the other way, as far
        self._family(best).play(stage)

    def _family(self, strength: float) -> Attack:
        return Ipm(strength=strength) if self.base == "ipm" else Alie(z=strength)

    def _distance(self, stage: Stage, strength: float) -> float:
        """Return ||F - mu||^2 where the attackers use `strength`; a skipped step moves nothing, F = 0."""
        assert stage.rule is not None
        self._family(strength).play(stage)
        vectors = stage.rule(stage.blocks)

        def squared(chunk: Chunk) -> Tensor:
            mu_c = stage.honest_rows(chunk).mean(0)
            if vectors is None:
                return dot(mu_c, mu_c)[None]
            away_c = exact(vectors[chunk.block][chunk.columns]) - mu_c
            return dot(away_c, away_c)[None]

        return stage.sum(squared).item()


@dataclass(kw_only=True)
class Mimic(Attack):
    """All copy one honest worker, whose data then counts too much.

    With a warm-up the worker is the one that stands out most along the direction in which honest rows differ
    most, which Oja's rule learns from the steps of the warm-up (one vector, in columns as the stack is).
    """

    needs = "honest"
    worker: NonNegativeInt = 0
    """Which honest row is copied without a warm-up; after the last comes the first again."""
    warmup_steps: NonNegativeInt = 0
    """Steps for which the direction is learned; 0 copies `worker`."""
    _direction: list[Tensor] = field(init=False, repr=False, default_factory=list)
    """z, by block, fp32."""
    _seen: int = field(init=False, repr=False, default=0)
    """Steps learned from."""
    _target: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._target = self.worker

    @property
    def remembers_columns(self) -> bool:
        """Whether it learns a direction."""
        return self.warmup_steps > 0

    def play(self, stage: Stage) -> None:
        """Write the row of the worker that is copied."""
        if self._seen < self.warmup_steps:
            self._learn(stage)
        copied = stage.honest[self._target % len(stage.honest)]
        stage.write(lambda chunk: chunk.rows[copied].clone())

    def _learn(self, stage: Stage) -> None:
        """Turn z by one step of Oja's rule and take the honest row that lies farthest along it."""
        if not self._direction:
            self._direction = [torch.empty_like(block[0], dtype=torch.float32) for block in stage.blocks]
            key, other = (seed_for(self.seed, "mimic", part) for part in (0, 1))
            for chunk in stage.chunks():
                noise = normal_from(uniform_at(chunk, key), uniform_at(chunk, other))
                self._part(chunk).copy_(noise)

        def centred(chunk: Chunk) -> Tensor:
            rows_Hc = stage.honest_rows(chunk)
            return rows_Hc - rows_Hc.mean(0)

        def along(chunk: Chunk) -> Tensor:
            return dot(centred(chunk), self._part(chunk).to(exact(chunk.rows).dtype))

        dots_H = stage.sum(along)
        share = self._seen / (1 + self._seen)
        turn_H = safe_ratio(dots_H, torch.linalg.vector_norm(dots_H))
        size = stage.sum(lambda chunk: dot(self._part(chunk), self._part(chunk))[None]).sqrt()
        for chunk in stage.chunks():
            z_c, towards_c = self._part(chunk), turn_H.to(chunk.rows.device) @ centred(chunk).double()
            z_c.copy_(share * safe_ratio(z_c, size) + (1 - share) * towards_c)
        self._seen += 1
        self._target = int(stage.sum(along).abs().argmax())

    def _part(self, chunk: Chunk) -> Tensor:
        return self._direction[chunk.block][chunk.columns]

    def state_dict(self) -> dict[str, Any]:
        """Return the direction as `direction/BLOCK`, the steps learned from and the row that is copied."""
        direction = {f"direction/{block}": z.clone() for block, z in enumerate(self._direction)}
        return {"seen": self._seen, "target": self._target, **direction}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take it back."""
        self._seen, self._target = int(state_dict["seen"]), int(state_dict["target"])
        count = sum(key.startswith("direction/") for key in state_dict)
        self._direction = [state_dict[f"direction/{block}"].clone() for block in range(count)]
