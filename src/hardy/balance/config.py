"""Settings of how documents are packed and spread over workers. Free of torch."""

from dataclasses import dataclass
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

    def __post_init__(self) -> None:
        """Refuse settings that nothing looks at."""
        super().__post_init__()
        if self.mode == "none" and (self.cap_tokens is not None or self.cost is not None):
            raise ConfigError(
                f"balance.cap_tokens={self.cap_tokens} and balance.cost={self.cost} are looked at by a "
                f"planner only; set balance.mode to pack, dispatch or dynamic_cp, or leave them out"
            )
