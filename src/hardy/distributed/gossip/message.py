"""The record at the head of every message between neighbours: fixed size, parsed without trust.

Paper: "Adaptive Weighting Push-SUM" (arXiv 2412.07252).   Letters: w share, a mass of the sender before
the round.

Mass and parameters travel in the same message and are accepted or refused together: parameters that are lost
while their mass is kept would draw all replicas to zero.
"""

import hashlib
import struct
from dataclasses import dataclass
from enum import IntFlag

import torch
from torch import Tensor

_LAYOUT = struct.Struct("<4sBBHQIIQQdd")
_MAGIC = b"hpsm"
_VERSION = 1
SIZE = _LAYOUT.size
"""Bytes of a record."""


class Flag(IntFlag):
    """What a record says beside its numbers."""

    WITHHELD = 1
    """No parameters follow: the sender kept them."""
    MORE = 2
    """Another message of this sender follows at once."""
    LATE = 4
    """Nothing follows now, but the same message comes at a later round."""


class RefusedError(Exception):
    """A message must not be used, with the reason."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The head of a message."""

    run: int
    """Tells this run from others: `run_id`."""
    generation: int
    """How many times the group was made anew."""
    sender: int
    round: int
    weights_round: int
    """Round whose shares the message was weighted with."""
    share: float
    """w. Of running sums 1, as they are weighted."""
    mass: float
    """w a. Of running sums all that was ever sent."""
    flags: Flag = Flag(0)

    def pack(self) -> Tensor:
        """Return the record as bytes."""
        packed = _LAYOUT.pack(
            _MAGIC,
            _VERSION,
            int(self.flags),
            0,
            self.run,
            self.generation,
            self.sender,
            self.round,
            self.weights_round,
            self.share,
            self.mass,
        )
        return torch.frombuffer(bytearray(packed), dtype=torch.uint8)

    @staticmethod
    def parse(data: Tensor) -> "Record":
        """Return what the bytes say.

        Raises:
            RefusedError: they are no record of this version.
        """
        raw = data.cpu().numpy().tobytes()
        if len(raw) != SIZE:
            raise RefusedError(f"a record has {SIZE} bytes, got {len(raw)}")
        magic, version, flags, _, run, generation, sender, round_, weights_round, share, mass = (
            _LAYOUT.unpack(raw)
        )
        if (magic, version) != (_MAGIC, _VERSION):
            raise RefusedError(f"no record of version {_VERSION}")
        return Record(
            run=run,
            generation=generation,
            sender=sender,
            round=round_,
            weights_round=weights_round,
            share=share,
            mass=mass,
            flags=Flag(flags),
        )

    def check(self, *, run: int, generation: int, sender: int) -> None:
        """Refuse a record of another run, an older group or another sender, and numbers that cannot be.

        Raises:
            RefusedError: with the reason.
        """
        if self.run != run:
            raise RefusedError("it belongs to another run, or one with other settings")
        if (self.generation, self.sender) != (generation, sender):
            raise RefusedError(
                f"it is from replica {self.sender} of generation {self.generation}, expected was replica "
                f"{sender} of generation {generation}"
            )
        if not (0 <= self.share <= 1 and 0 <= self.mass < float("inf")):
            raise RefusedError(f"its share {self.share} or mass {self.mass} cannot be")


def run_id(settings: str) -> int:
    """Return 64 bits that tell runs with different settings apart.

    Example:
        >>> run_id("a") == run_id("a") != run_id("b")
        True
    """
    return int.from_bytes(hashlib.blake2b(settings.encode(), digest_size=8).digest(), "little")
