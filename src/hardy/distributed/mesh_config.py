"""Settings of how workers are laid out. Free of torch."""

from dataclasses import dataclass
from typing import ClassVar

from hardy.config import Config, ConfigError, PositiveInt


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
