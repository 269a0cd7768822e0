"""What a collective sends and how long it takes when the workers form a ring; how long their work takes.

Paper: R. Rabenseifner, "Optimization of collective reduction operations", 2004: a reduce-scatter, then an
all-gather. One function per collective; real worlds count `bytes_sent` with them, the simulation also takes
its time from them.   Letters: n = workers, B = bytes of one worker's tensor.
"""

import math
from dataclasses import dataclass

from hardy.distributed.config import ClusterConfig
from hardy.rng import numpy_generator_for


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What the busiest worker of one collective does."""

    bytes_sent: int
    """Bytes it sends."""
    hops: int
    """Messages that must follow one another."""

    def seconds(self, *, bandwidth_bytes_per_s: float, latency_s: float) -> float:
        """Return how long it takes on links of this bandwidth and latency.

        Example:
            >>> all_reduce(1_000_000, 4).seconds(bandwidth_bytes_per_s=1e6, latency_s=0.5)
            4.5
        """
        return self.bytes_sent / bandwidth_bytes_per_s + self.hops * latency_s


@dataclass(frozen=True, kw_only=True)
class Link:
    """The wire between two workers. The default costs no time at all."""

    bandwidth_bytes_per_s: float | None = None
    """Bytes it carries per second; none means infinitely many."""
    latency_s: float = 0.0
    """Seconds before a message arrives, whatever its size."""

    def __post_init__(self) -> None:
        if self.bandwidth_bytes_per_s is not None and not self.bandwidth_bytes_per_s > 0:
            raise ValueError(f"a link's bandwidth_bytes_per_s is above 0, got {self.bandwidth_bytes_per_s}")
        if not self.latency_s >= 0:
            raise ValueError(f"a link's latency_s is at least 0, got {self.latency_s}")

    def seconds(self, traffic: Traffic) -> float:
        """Return how long this traffic takes here.

        Example:
            >>> Link(bandwidth_bytes_per_s=1e6, latency_s=0.5).seconds(all_reduce(1_000_000, 4))
            4.5
        """
        return traffic.seconds(
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s or math.inf, latency_s=self.latency_s
        )


def all_reduce(num_bytes: int, num_workers: int) -> Traffic:
    """Return 2(n-1)/n * B in 2(n-1) hops: a reduce-scatter, then an all-gather of the n parts.

    Example:
        >>> all_reduce(4000, 4)
        Traffic(bytes_sent=6000, hops=6)
    """
    hops = 2 * (num_workers - 1)
    return Traffic(bytes_sent=math.ceil(hops * num_bytes / num_workers), hops=hops)


def all_gather(num_bytes: int, num_workers: int) -> Traffic:
    """Return (n-1) * B in n-1 hops: everyone's tensor goes once around.

    Example:
        >>> all_gather(4000, 4)
        Traffic(bytes_sent=12000, hops=3)
    """
    return Traffic(bytes_sent=(num_workers - 1) * num_bytes, hops=num_workers - 1)


def all_to_all(num_bytes: int, num_workers: int) -> Traffic:
    """Return (n-1)/n * B in n-1 hops: each of the n parts but one's own goes straight to its worker.

    Example:
        >>> all_to_all(4000, 4)
        Traffic(bytes_sent=3000, hops=3)
    """
    hops = num_workers - 1
    return Traffic(bytes_sent=math.ceil(hops * num_bytes / num_workers), hops=hops)


def broadcast(num_bytes: int, num_workers: int) -> Traffic:
    """Return B in n-1 hops: passed on in small pieces. The last of the ring, who sends none, counts alike.

    Example:
        >>> broadcast(4000, 4)
        Traffic(bytes_sent=4000, hops=3)
    """
    return Traffic(bytes_sent=num_bytes if num_workers > 1 else 0, hops=num_workers - 1)


def message(num_bytes: int) -> Traffic:
    """Return B in one hop: from one worker to another.

    Example:
        >>> message(4000)
        Traffic(bytes_sent=4000, hops=1)
    """
    return Traffic(bytes_sent=num_bytes, hops=1)


def barrier(num_workers: int) -> Traffic:
    """Return an all-reduce of nothing: 2(n-1) hops.

    Example:
        >>> barrier(4)
        Traffic(bytes_sent=0, hops=6)
    """
    return all_reduce(0, num_workers)


def compute_seconds(work_s: float, cluster: ClusterConfig, *, rank: int, index: int, seed: int) -> float:
    """Return how long worker `rank` takes for its `index`-th piece of work.

    Args:
        work_s: what an ordinary worker takes on average, in seconds.
        cluster: how much slower this worker is, and how much equal work varies.
        rank: the worker.
        index: how many pieces it did before.
        seed: of the variation.

    Example:
        >>> compute_seconds(2.0, ClusterConfig(slow_factors=(1.0, 3.0)), rank=1, index=0, seed=0)
        6.0
    """
    if not work_s >= 0:
        raise ValueError(f"work takes at least 0 s, got {work_s}")
    factor = cluster.slow_factors[rank] if rank < len(cluster.slow_factors) else 1.0
    sigma = cluster.variation_sigma
    if sigma > 0:
        normal = numpy_generator_for(seed, "compute", rank, index).standard_normal()
        factor *= math.exp(sigma * normal - sigma**2 / 2)  # the second term keeps the mean at 1
    return work_s * factor
