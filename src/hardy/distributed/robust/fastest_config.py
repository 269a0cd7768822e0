"""Settings of the fastest k of n: each step goes on with the first k replicas. Free of torch.

Paper: J. Yan et al., "dSTAR", arXiv 2412.07151.   Letters: N = replicas, k, f = num_faulty.
Ours: the deadline, the patience and what happens to late gradients; the paper takes the first k.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hardy.config import Config, ConfigError, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class FastestConfig(Config):
    """Each step takes the gradients of the first k replicas and leaves the others behind."""

    section: ClassVar[str] = "strategy.fastest"
    k: PositiveInt
    """Replicas whose gradients make a step."""
    deadline: Literal["none", "mad"] = "none"
    """none takes the first k; mad also those who come within the usual time of the last 50 steps."""
    deadline_factor: NonNegativeFloat = 4.0
    """Of mad: the usual time is the median of the arrivals and this many median absolute deviations."""
    patience_s: PositiveFloat | None = None
    """Until a step with fewer than k arrivals does as on_shortfall says; none waits for ever."""
    on_shortfall: Literal["wait", "shrink", "error"] = "wait"
    """After patience_s: shrink goes on with those who came, if they are 2f + 1 and over half of all."""
    late: Literal["discard", "dampen"] = "discard"
    """A late gradient is dropped, or enters the next step with weight 1 / (1 + steps it is late)."""
    starve_limit: PositiveInt = 50
    """Steps in a row without a replica after which it is reported: its data is missing from training."""
    include_starved: bool = False
    """Whether a replica that starves is waited for once, as soon as it is at the current step."""
    silence_s: PositiveFloat = 10.0
    """How long a replica that another one could not reach may stay silent before it counts as lost."""
    timeout_s: PositiveFloat = 60.0
    """How long a replica waits for another one that was elected with it."""
    secret_file: str | None = None
    """File with a secret that all share; without it whoever reaches the port may take part."""
    replay: str | None = None
    """A log of elections, elections.jsonl of a run folder: who is elected is read there."""
    max_restarts: NonNegativeInt = 3
    """How often `hardy train --workers` starts a replica again that was lost."""

    def __post_init__(self) -> None:
        """Check what the settings say together."""
        super().__post_init__()
        if self.on_shortfall != "wait" and self.patience_s is None:
            raise ConfigError(
                f"strategy.fastest.on_shortfall={self.on_shortfall!r} acts after strategy.fastest."
                f"patience_s, which is none; set it to some seconds, or on_shortfall to 'wait'"
            )
        if self.include_starved and self.patience_s is None:
            raise ConfigError(
                "strategy.fastest.include_starved=true waits for a slow replica, so it needs an end to the "
                "waiting: set strategy.fastest.patience_s to some seconds"
            )

    def check(self, *, replicas: int, num_faulty: int) -> None:
        """Refuse a k that cannot outvote the faulty, who may always be the fastest, or is not there.

        Example:
            >>> FastestConfig(k=6).check(replicas=8, num_faulty=3)
            Traceback (most recent call last):
            ...
            hardy.config.ConfigError: strategy.fastest.k=6 of N=8 replicas with strategy.f=3 faulty: k must \
be at least 2f + 1 = 7, for the faulty may be the fastest
        """
        least = 2 * num_faulty + 1
        head = f"strategy.fastest.k={self.k} of N={replicas} replicas with strategy.f={num_faulty} faulty"
        if least > replicas:
            raise ConfigError(
                f"{head}: k must be at least 2f + 1 = {least}, but only {replicas} replicas run; start more, "
                f"or lower strategy.f to at most {(replicas - 1) // 2}"
            )
        if self.k < least:
            raise ConfigError(
                f"{head}: k must be at least 2f + 1 = {least}, for the faulty may be the fastest"
            )
        if self.k > replicas:
            raise ConfigError(f"{head}: k is at most {replicas}, and at least 2f + 1 = {least}")
