"""The fastest k of n, as a strategy uses it: announce, exchange among the elected, commit, catch up.

Paper: J. Yan et al., "dSTAR", arXiv 2412.07151 (the first k of N gradients make a step).
Differs from the paper: no server. Replicas exchange among themselves; a coordinator, which sees no tensor,
only says who takes part (`coordinator`). Ours: catching up by the state of one who took part; late
gradients may enter the next step with weight 1 / (1 + steps late).

A worker is a replica: one process, or several that share one copy of the model. Its first worker talks to the
coordinator and tells the others; each exchanges with those in its place in the other replicas.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hardy.clock import Clock
from hardy.distributed.comm import Alone, Communicator, WorkerLostError
from hardy.distributed.groups import ExcludedError
from hardy.distributed.robust.admission import NO_STATE
from hardy.distributed.robust.election import Announcement
from hardy.distributed.robust.inside import Inside, whom_lost
from hardy.distributed.robust.messages import announcement_of, report_of
from hardy.distributed.robust.records import REASONS, TOKEN_BYTES, Kind, Reason, Record, Seal

R = TypeVar("R")

_MAY_COME_BACK = (Reason.SILENT, Reason.UNREACHABLE)
_INSIDE = Seal(bytes(TOKEN_BYTES))
"""Packs what the first worker of a replica hears for the others."""

logger = logging.getLogger(__name__)


class Wire(Protocol):
    """What ties a replica to the coordinator and to the others: `StoreWire`, `SimWire`."""

    @property
    def rank(self) -> int:
        """Number of this replica."""
        ...

    @property
    def clock(self) -> Clock:
        """This worker's time."""
        ...

    def join(self, step: int) -> Record:
        """Ask to be let in with the parameters of a step, or -1 for none; return the ADMIT."""
        ...

    def send(self, record: Record) -> None:
        """Tell the coordinator something; the wire adds who says it."""
        ...

    def hear(self) -> list[Record]:
        """Wait for the coordinator's next message."""
        ...

    def comm(self, members: Mapping[int, int], *, meeting: int) -> Communicator:
        """Connect with some replicas, who do the same: generation by rank, and number of the meeting."""
        ...

    def drop(self, *ranks: int) -> None:
        """Close the connections to some replicas, so that they notice at once."""
        ...

    def close(self) -> None:
        """Close all connections."""
        ...


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the coordinator says to an announcement."""

    step: int
    elected: tuple[int, ...] = ()
    """By number."""
    is_elected: bool = False
    """Whether this replica is; else it takes the state of a later step."""
    records: Mapping[int, Announcement] = field(default_factory=dict)
    """What each of the elected announced."""
    comm: Communicator | None = None
    """The elected, ranks in the order of `elected`."""
    inner: Communicator = field(default_factory=Alone)
    """The workers of this replica; where one of them loses one of the elected, the others are told here."""
    must_serve: bool = False
    """Whether somebody waits for this replica's present state; call `serve`, then announce again."""


class FastestGroup:
    """One replica among those that make each step with the first k of them.

    Args:
        wire: to the coordinator and to the others.
        replicas: how many there are.
        step: steps that the parameters have done; all founders begin at the same.
        inner: the workers of this replica; none means this one alone.
    """

    def __init__(
        self, wire: Wire, *, replicas: int, step: int = 0, inner: Communicator | None = None
    ) -> None:
        self.replica, self.replicas, self.step = wire.rank, replicas, step
        self._wire, self._inner = wire, inner or Alone()
        self._announced: tuple[int, int] | None = None
        self._elected: Mapping[int, int] = {}
        self._meeting = 0
        self._gives: list[Record] = []
        self._take: Record | None = None
        self._report: dict[str, Any] = {}
        self._join(step)

    @property
    def is_behind(self) -> bool:
        """Whether this replica holds no parameters that the others need, and must call `late_state` first."""
        return self._at == NO_STATE

    def announce_and_elect(
        self,
        step: int,
        *,
        finite: bool = True,
        loss: float = math.nan,
        square: float = math.nan,
        dot: float = math.nan,
        made_at: int | None = None,
    ) -> Decision:
        """Say that the gradient of a step is ready; wait until this replica takes part, or is too late.

        After a `commit` that failed, or `must_serve`, call it again with the same gradient.

        Args:
            step: steps that the parameters have done.
            finite: whether the gradient is.
            loss: of this replica's batch.
            square: squared norm of the gradient, for rules that believe it.
            dot: its product with the trusted gradient, for rules that believe it.
            made_at: steps that the parameters had done from which the gradient was computed, if earlier.

        Raises:
            ExcludedError: the others go on without this replica, for good.
            WorkerLostError: the run cannot go on.
        """
        made_at = step if made_at is None else made_at
        if self._announced != (step, made_at):
            self._announced = (step, made_at)
            record = Record(
                kind=Kind.ANNOUNCE,
                step=step,
                made_at=made_at,
                finite=finite,
                loss=loss,
                square=square,
                dot=dot,
            )
            self._say(record)
        while self._take is None:
            head, *rest = self._hear()
            if head.kind is Kind.GIVE:
                self._gives += [head, *rest]
                return Decision(step=step, must_serve=True)
            if head.kind is Kind.GO:
                decision = self._go(step, head, rest)
                if decision is not None:
                    return decision
        return Decision(step=step)

    def commit(self, error: WorkerLostError | None = None) -> bool:
        """Say whether this replica has the result; return whether all elected have, so that it is applied.

        Where it returns False, call `announce_and_elect` again: somebody was lost.

        Args:
            error: what `Decision.comm` raised; none when the result is there.
        """
        lost = whom_lost(self._inner, error)
        if lost is not None:
            self._wire.drop(*self._elected)
        self._answer(lost)
        while self._take is None and not self.is_behind:
            head, *rest = self._hear()
            if head.kind is Kind.COMMIT:
                self._report = {"elected": list(self._elected)} | report_of(rest[0])
                self._gives += rest[1:]
                self.step = self._at = head.step
                self._announced = None
                return True
            if head.kind is Kind.RETRY:
                return False
        return False

    def take_part(
        self,
        step: int,
        work: Callable[[Decision], R],
        *,
        state: Callable[[], Sequence[Tensor]],
        **numbers: Any,
    ) -> R | None:
        """Announce, do `work` among the elected until all of them have it; None for one that is too late.

        Args:
            step: as for `announce_and_elect`.
            work: makes the result from a decision; changes nothing that a second try needs.
            state: this replica's present state, for one that waits for it.
            numbers: as for `announce_and_elect`.
        """
        while True:
            decision = self.announce_and_elect(step, **numbers)
            if decision.must_serve:
                self.serve(state())
            elif not decision.is_elected:
                return None
            else:
                try:
                    result = work(decision)
                except WorkerLostError as error:
                    self.commit(error)
                    continue
                if self.commit():
                    return result

    def serve(self, tensors: Sequence[Tensor]) -> None:
        """Hand the present state to those who were told to take it; without any, return at once.

        Call it after each step, when its result is applied. Copies are sent; nobody is waited for.
        """
        gives, self._gives = self._gives, []
        for give in gives:
            try:
                comm = self._meet(give)
                for tensor in tensors:
                    comm.broadcast(tensor, source=sorted((self.replica, give.peer)).index(self.replica))
            except WorkerLostError as error:  # it asks again, if it lives
                logger.warning("could not hand the state to replica %d: %s", give.peer, error)
                self._wire.drop(give.peer)

    def late_state(self, like: Sequence[Tensor]) -> tuple[int, list[Tensor]]:
        """Wait for the next boundary of a step; return its number and the state of one who was there.

        Args:
            like: shape, dtype and device of what all hand to `serve`.
        """
        while True:
            while self._take is None:
                self._hear()
            take, self._take = self._take, None
            came: list[Tensor] = []
            error = None
            try:
                comm = self._meet(take)
                for tensor in like:
                    came.append(
                        comm.broadcast(tensor, source=sorted((self.replica, take.peer)).index(take.peer))
                    )
            except WorkerLostError as lost:
                logger.warning("could not take the state of replica %d: %s", take.peer, lost)
                error = lost
            if whom_lost(self._inner, error) is None:
                self.step = self._at = take.step
                self._announced = None
                return take.step, came
            self._wire.drop(take.peer)
            self._at = NO_STATE
            self._say(Record(kind=Kind.ASK, peer=take.peer))

    def finish(self, tensors: Sequence[Tensor]) -> None:
        """Wait until all have the state of the last step, and hand it to those who need it."""
        self.serve(tensors)
        self._say(Record(kind=Kind.FINISH, step=self.step))
        while True:
            head, *rest = self._hear(may_end=True)
            if head.kind is Kind.END:
                return
            if head.kind is Kind.GIVE:
                self._gives += [head, *rest]
                self.serve(tensors)

    def take_report(self) -> dict[str, Any]:
        """Return what is known of the last step that this replica took part in, once.

        elected, kth and last arrival in seconds, and as numbers so far: late, duplicates, refused, starved,
        lost, reelections.
        """
        report, self._report = self._report, {}
        return report

    def close(self) -> None:
        """Leave."""
        self._say(Record(kind=Kind.LEAVE))
        self._wire.close()

    def _go(self, step: int, head: Record, announced: Sequence[Record]) -> Decision | None:
        """Return the decision once connected with all who are elected; None where that failed."""
        records = {record.rank: announcement_of(record) for record in announced}
        self._elected = {rank: record.generation for rank, record in records.items()}
        self._meeting = head.attempt
        comm, error = None, None
        try:
            comm = self._wire.comm(self._elected, meeting=head.attempt)
        except WorkerLostError as lost:
            error = lost
        lost_peer = whom_lost(self._inner, error)
        if lost_peer is not None:
            self._wire.drop(*self._elected)
            self._answer(lost_peer)
            return None
        return Decision(
            step=step,
            elected=tuple(records),
            is_elected=True,
            records=records,
            comm=comm,
            inner=self._inner if self._inner.size == 1 else Inside(self._inner),
        )

    def _answer(self, lost: int | None) -> None:
        kind = Kind.DONE if lost is None else Kind.FAILED
        self._say(Record(kind=kind, attempt=self._meeting, peer=-1 if lost is None else lost))

    def _meet(self, about: Record) -> Communicator:
        """Connect with the one that hands or takes a state."""
        members = {self.replica: about.generation, about.peer: about.peer_generation}
        return self._wire.comm(members, meeting=about.attempt)

    def _say(self, record: Record) -> None:
        if self._inner.rank == 0:
            self._wire.send(record)

    def _join(self, step: int) -> None:
        admitted = self._share([self._wire.join(step)] if self._inner.rank == 0 else [])
        self._at = admitted[0].step
        self._announced, self._take, self._gives = None, None, []

    def _hear(self, *, may_end: bool = False) -> list[Record]:
        """Return the coordinator's next message; what concerns every moment is dealt with here."""
        records = self._share(self._wire.hear() if self._inner.rank == 0 else [])
        head = records[0]
        if head.kind is Kind.TAKE:
            self._take = head
        elif head.kind is Kind.RETRY:
            self._wire.drop(*self._elected)
        elif head.kind is Kind.OUT:
            why = f"the others went on without replica {self.replica}: {REASONS[head.reason]}"
            if head.reason not in _MAY_COME_BACK:
                raise ExcludedError(why)
            logger.warning("%s; it comes back", why)
            self._wire.drop(*range(self.replicas))
            self._join(NO_STATE)
        elif head.kind is Kind.END and not (may_end and head.reason is Reason.NONE):
            raise WorkerLostError(f"the run ends: {REASONS[head.reason]}")
        return records

    def _share(self, records: list[Record]) -> list[Record]:
        """Return what the first worker of this replica heard."""
        inner = self._inner
        if inner.size == 1:
            return records
        data = _INSIDE.pack(records) if inner.rank == 0 else b""
        length = int(inner.broadcast(torch.tensor(len(data)), source=0))
        packed = torch.zeros(length, dtype=torch.uint8)
        if inner.rank == 0:
            packed = torch.tensor(list(data), dtype=torch.uint8)
        return _INSIDE.unpack(bytes(inner.broadcast(packed, source=0).tolist()))
