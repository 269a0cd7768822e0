"""Settings of how documents are packed and spread over workers. Free of torch."""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from hardy.config import Config, ConfigError, NonNegativeInt, PositiveInt


@dataclass(frozen=True, kw_only=True)
class BalanceConfig(Config):
    """How documents of mixed length become packs."""

    section: ClassVar[str] = "balance"
    packing: Literal["stream", "whole"] = "stream"
    """stream cuts documents at pack borders and fills every pack; whole keeps a document in one pack where
    it fits and leaves packs partly empty."""
    mode: Literal["none", "pack", "dispatch", "dynamic_cp"] = "none"
    """How each global batch is spread over the workers. none: as packs, so many to each. pack: pieces of
    documents as tokens fit, dealt in order. dispatch: by what they cost. dynamic_cp: besides, workers form
    groups that share long ones."""
    cap_tokens: PositiveInt | None = None
    """Most tokens that one worker computes at once; none takes those of its micro-batch of packs."""
    cost: str | None = None
    """File with measured costs, of `hardy balance profile`; none counts operations."""
    scheme: Literal["auto", "gather", "ulysses"] = "auto"
    """How a group shares attention: gather shows all keys to all, ulysses gives each worker some heads."""
    split_tokens: NonNegativeInt = 128
    """Of gather: documents shorter than 2 G times this stay whole in a group of G."""
    delay_steps: NonNegativeInt = 0
    """Most steps by which a piece of a document may come later or sooner than drawn, so that steps take about
    as long. 0 leaves batches as drawn; more changes which documents meet in a batch, and drops none."""
    long_documents: Literal["error", "split", "truncate"] = "error"
    """What becomes of a piece of a document that no group of workers holds. error: the run ends. split: parts
    that do not see each other. truncate: its end is left out of the batch. Metrics count both."""
    isolation: Literal["check", "skip"] = "check"
    """Whether a few forward passes before the first step prove that no document sees another."""
    model_error: Literal["warn", "refit"] = "warn"
    """What becomes of costs whose predictions are off by over 15 % (median). warn: a line in the log. refit:
    they are fitted to the run's own steps; then plans, and the last bits of losses, depend on timings."""

    def __post_init__(self) -> None:
        """Refuse settings that nothing looks at."""
        super().__post_init__()
        unseen = [
            f"balance.{each.name}={getattr(self, each.name)}"
            for each in fields(self)
            if each.name in OF_THE_PLANNER and getattr(self, each.name) != each.default
        ]
        if self.mode == "none" and unseen:
            raise ConfigError(
                f"only planners look at {' and '.join(unseen)}; set balance.mode to pack, dispatch or "
                f"dynamic_cp, or leave {'it' if len(unseen) == 1 else 'them'} out"
            )


OF_THE_PLANNER = frozenset(
    {"cap_tokens", "cost", "delay_steps", "long_documents", "isolation", "model_error"}
)
"""Settings that mean nothing where nothing is planned."""
