"""Settings of how documents are packed and spread over workers. Free of torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hardy.config import Config


@dataclass(frozen=True, kw_only=True)
class BalanceConfig(Config):
    """How documents of mixed length become packs."""

    section: ClassVar[str] = "balance"
    packing: Literal["stream", "whole"] = "stream"
    """stream cuts documents at pack borders and fills every pack; whole keeps a document in one pack where
    it fits and leaves packs partly empty."""
