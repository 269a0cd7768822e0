"""Settings of how workers train together. Free of torch."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hardy.config import Config, ConfigError, NonNegativeFloat, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Config):
    """How the workers are laid out: `replicas` x `shards`.

    One shard is plain data parallel (DDP), one replica is fully sharded (FSDP2), both above one is HSDP.
    """

    section: ClassVar[str] = "strategy.mesh"
    replicas: PositiveInt | None = None
    """Whole copies of the model; none means workers / shards."""
    shards: PositiveInt = 1
    """Workers over which one copy of parameters, gradients and optimizer state is split."""

    def sizes(self, num_workers: int) -> tuple[int, int]:
        """Return (replicas, shards) for a world of `num_workers`, or refuse.

        Example:
            >>> MeshConfig(shards=2).sizes(4)
            (2, 2)
        """
        replicas = self.replicas or max(num_workers // self.shards, 1)
        if replicas * self.shards != num_workers:
            raise ConfigError(
                f"strategy.mesh of {replicas} replicas x {self.shards} shards needs "
                f"{replicas * self.shards} workers, but {num_workers} run; set strategy.mesh.replicas and "
                f"strategy.mesh.shards so that their product is {num_workers}, or start other workers"
            )
        return replicas, self.shards


@dataclass(frozen=True, kw_only=True)
class SynchronousConfig(Config):
    """Every worker contributes to every step; gradients are averaged."""

    section: ClassVar[str] = "strategy"
    name: Literal["synchronous"] = "synchronous"
    """The strategy."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the workers are laid out."""


StrategyConfig = SynchronousConfig


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Config):
    """The machines and the network that `SimWorld` plays. The default costs no time at all."""

    section: ClassVar[str] = "cluster"
    bandwidth_bytes_per_s: PositiveFloat | None = None
    """Bytes a worker's link sends per second; none means infinitely many."""
    latency_s: NonNegativeFloat = 0.0
    """Seconds before a message arrives, whatever its size."""
    slow_factors: tuple[PositiveFloat, ...] = ()
    """Worker r takes slow_factors[r] times as long for its work as an ordinary worker; not listed is 1."""
    variation_sigma: NonNegativeFloat = 0.0
    """Spread of the natural logarithm of the time that equal work takes (lognormal around the same mean)."""
