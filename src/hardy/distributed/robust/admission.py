"""Who is let in, and under which generation. Pure.

Paper: none. A replayed JOIN is known by its nonce. A replica that did not keep the protocol stays out.
"""

from dataclasses import dataclass, field

from hardy.distributed.robust.records import Reason, Record

NO_STATE = -1
"""The step of one that holds no parameters."""


@dataclass(eq=False, kw_only=True)
class Seat:
    """A member as the coordinator sees it."""

    rank: int
    generation: int
    at: int
    """The step whose parameters it holds; `NO_STATE` while it waits for some."""
    number: int = 0
    """Of its last record."""
    can_give: bool = False
    """Whether it waits for an answer, so that it can hand out its state."""
    has_finished: bool = False

    @property
    def address(self) -> tuple[int, int]:
        """Where its answers go."""
        return (self.rank, self.generation)


@dataclass(eq=False, kw_only=True)
class Admission:
    """Decides who is let in.

    Example:
        >>> door = Admission(replicas=2, digest=bytes(16))
        >>> door.next_generation(1), door.next_generation(1)
        (1, 2)
    """

    replicas: int
    """Ranks go from 0 to one below."""
    digest: bytes
    """Of run id, settings and versions."""
    _generations: dict[int, int] = field(default_factory=dict)
    _barred: set[int] = field(default_factory=set)
    _nonces: set[bytes] = field(default_factory=set)

    def is_replayed(self, record: Record) -> bool:
        """Return whether this JOIN has come before; remember it. Ask for those alone that are let in else, or
        strangers could fill the memory."""
        if record.nonce in self._nonces:
            return True
        self._nonces.add(record.nonce)
        return False

    def objection(self, record: Record) -> Reason:
        """Return why this JOIN is refused; `Reason.NONE` where it is not."""
        if record.digest != self.digest:
            return Reason.SETTINGS
        if not 0 <= record.rank < self.replicas:
            return Reason.NUMBER
        return Reason.FLOOD if record.rank in self._barred else Reason.NONE

    def next_generation(self, rank: int) -> int:
        """Return the generation of one that is let in now."""
        self._generations[rank] = self._generations.get(rank, 0) + 1
        return self._generations[rank]

    def bar(self, rank: int) -> None:
        """Let this one in no more."""
        self._barred.add(rank)
