"""What neighbours post to each other in one round, and what is done with messages that fail.

Paper: "Adaptive Weighting Push-SUM" (arXiv 2412.07252); the rules for failures are ours.   Letters: w share,
a mass, x half-step numerators.

An envelope is a record, a sketch where distances are needed, and the parameters. The receiver answers with a
receipt: whether it was accepted, its own mass, its own sketch. Parameters travel unweighted, the same to all;
the receiver multiplies by the share in the record.

What is lost must not vanish: a sender that is told so takes its share back; or each message holds the sum of
all that was ever sent, and the next one makes good for it (`running_sum`).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from hardy.distributed.comm import Communicator, MailCommunicator, PeerLostError
from hardy.distributed.gossip.message import SIZE, Flag, Record, RefusedError
from hardy.distributed.gossip.vectors import all_finite

logger = logging.getLogger(__name__)

_RECORD, _SKETCH, _PAYLOAD, _RECEIPT = 1, 2, 3, 4
"""Tags. What is posted with one tag to one neighbour is taken in its order, so they need no round."""

REFUSED, ACCEPTED, NOTHING = 0, 1, 2
"""What a receipt says; nothing where nothing was to be accepted."""

Fault = Literal["", "lost", "late", "twice", "nan"]
Faults = Callable[[int, int, int], Fault]
"""(round, sender, receiver) -> what happens to the message; for trying out failures."""


@dataclass(frozen=True, kw_only=True)
class Letter:
    """One message as it came."""

    record: Tensor
    sketch_m: Tensor | None
    payload: list[Tensor]
    """Empty where nothing followed."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What an accepted message adds: `factor` times its vectors, and its mass."""

    sender: int
    vectors: list[Tensor]
    factor: float
    mass: float
    sender_mass: float
    """The sender's whole mass before the round; NaN where sums hide it."""
    sketch_m: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What was posted in one round, until its receipts are in."""

    round: int
    shares: dict[int, float]
    mass: float
    vectors: list[Tensor]
    accepted: set[int] = field(default_factory=set)
    """Receivers whose receipt says so."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A receiver's answer."""

    code: int
    mass: float
    sketch_m: Tensor | None


@dataclass(kw_only=True)
class Counters:
    """Messages that met trouble so far."""

    lost: int = 0
    """Did not arrive, as far as this replica can tell."""
    reabsorbed: int = 0
    """Own ones, refused or lost, whose share was taken back."""
    refused: int = 0
    """Came, and could not be used."""
    duplicates: int = 0
    """Came twice, and were used once."""


@dataclass(kw_only=True)
class Sums:
    """All that was ever sent or received along one edge, fp64."""

    vectors: list[Tensor]
    mass: float = 0.0


@dataclass(kw_only=True)
class Ledger:
    """What a receiver has of one sender."""

    last_round: int = -1
    awaited: set[int] = field(default_factory=set)
    """Rounds whose message was announced as late."""

    def takes(self, round_: int) -> bool:
        """Note a message of this round; False if it came before."""
        if round_ in self.awaited:
            self.awaited.remove(round_)
            return True
        is_new = round_ > self.last_round
        self.last_round = max(self.last_round, round_)
        return is_new


class Exchange:
    """Posts, takes and judges messages for one replica.

    Args:
        comm: the replicas; members are named by their number, which stays theirs when others leave.
        inner: the workers of this replica, which decide alike.
        run: `run_id` of the run.
        like: vectors of a message, for shapes.
        comm_dtype: what travels.
        sums: whether messages hold running sums.
        sketch_size: numbers of a sketch; none where no distances are needed.
        faults: failures to try out.
    """

    def __init__(
        self,
        comm: MailCommunicator,
        inner: Communicator,
        *,
        run: int,
        like: Sequence[Tensor],
        comm_dtype: torch.dtype,
        sums: bool,
        sketch_size: int | None = None,
        faults: Faults | None = None,
    ) -> None:
        self.inner, self.run, self.sums = inner, run, sums
        self.like = [x.to(torch.float64 if sums else comm_dtype, copy=True).zero_() for x in like]
        self.sketch_size = sketch_size
        self.counters = Counters()
        self.num_posts = 0
        self.sent_sums: dict[int, Sums] = {}
        self.received_sums: dict[int, Sums] = {}
        self.ledgers: dict[int, Ledger] = {}
        self.drawn_letters: dict[int, list[Letter]] = {}
        """Taken before their time, so that a checkpoint holds them."""
        self.drawn_receipts: dict[int, Receipt] = {}
        self._faults = faults
        self._held: dict[int, list[tuple[Record, Tensor | None, list[Tensor]]]] = {}
        self.join(comm, range(comm.size), generation=0)

    def join(self, comm: MailCommunicator, members: Sequence[int], *, generation: int) -> None:
        """Go on with these members; `members[rank]` is the number of the replica with this rank."""
        self.comm, self.members, self.generation = comm, tuple(members), generation
        self.me = self.members[comm.rank]
        self.gone: set[int] = set()
        """Members that died meanwhile."""
        self._rank_of = {member: rank for rank, member in enumerate(self.members)}

    def send(
        self,
        round_: int,
        shares: Mapping[int, float],
        x: Sequence[Tensor],
        mass: float,
        sketch_m: Tensor | None,
    ) -> Sent:
        """Post this round's envelope to each receiver; return what is under way.

        Args:
            round_: t.
            shares: w by receiver.
            x: numerators, finite.
            mass: a.
            sketch_m: of the numerators.
        """
        payload = (
            None if self.sums else [part.to(like.dtype) for part, like in zip(x, self.like, strict=True)]
        )
        posted: dict[int, float] = {}
        for receiver, share in shares.items():
            record = self._record(round_, share, share * mass)
            done = 0.0 if receiver in self.gone else 1.0
            try:
                if done:
                    if self.sums:
                        total = self._summed(receiver, share, x, mass)
                        record = replace(record, mass=total.mass)
                        self._post(receiver, record, sketch_m, total.vectors)
                    else:
                        assert payload is not None, "it was just made"
                        self._post(receiver, record, sketch_m, payload)
            except PeerLostError as error:
                self._lose(receiver, error)
                done = 0.0
            if self._all(done):
                posted[receiver] = share
            else:
                self.gone.add(receiver)
                self.counters.reabsorbed += 1
        return Sent(round=round_, shares=posted, mass=mass, vectors=list(x))

    def withhold(self, round_: int, receivers: Sequence[int], mass: float, sketch_m: Tensor | None) -> None:
        """Tell receivers that this round brings them nothing."""
        for receiver in receivers:
            record = replace(self._record(round_, 0.0, 0.0), flags=Flag.WITHHELD)
            try:
                if receiver not in self.gone:
                    self._post(receiver, record, sketch_m, [])
            except PeerLostError as error:
                self._lose(receiver, error)

    def receive(self, sender: int, *, mass: float, sketch_m: Tensor | None) -> list[Gain]:
        """Take a sender's envelope, judge it, answer, and return what it brings.

        Args:
            sender: who.
            mass: this replica's, for the receipt.
            sketch_m: this replica's, for the receipt.
        """
        letters: list[Letter] | None = None
        if sender not in self.gone:
            try:
                letters = self.drawn_letters.pop(sender, None) or self.fetch(sender)
            except PeerLostError as error:
                self._lose(sender, error)
        if not self._all(0.0 if letters is None else 1.0) or letters is None:
            self.gone.add(sender)
            return []
        gains: list[Gain] = []
        code = NOTHING
        for letter in letters:
            gain, code = self._judge(sender, letter)
            gains += [gain] if gain is not None else []
        answer = torch.tensor([float(code), mass], dtype=torch.float64)
        try:
            self._put(sender, answer, _RECEIPT)
            if self.sketch_size is not None:
                assert sketch_m is not None, "distances need sketches"
                self._put(sender, sketch_m, _RECEIPT)
        except PeerLostError as error:
            self._lose(sender, error)
        return gains

    def receipt(self, receiver: int) -> Receipt | None:
        """Take a receiver's answer; None if it has died."""
        if receiver in self.gone:
            return None
        try:
            return self.drawn_receipts.pop(receiver, None) or self.fetch_receipt(receiver)
        except PeerLostError as error:
            self._lose(receiver, error)
            return None

    def fetch(self, sender: int) -> list[Letter]:
        """Take all messages of one envelope."""
        rank, letters = self._rank_of[sender], []
        while True:
            data = self.comm.take(torch.empty(SIZE, dtype=torch.uint8), source=rank, tag=_RECORD)
            sketch_m, payload = None, []
            record = _parsed(data)
            if self.sketch_size is not None:
                sketch_m = self.comm.take(self._like_sketch(), source=rank, tag=_SKETCH)
            if record is not None and not record.flags & (Flag.WITHHELD | Flag.LATE):
                payload = [self.comm.take(like, source=rank, tag=_PAYLOAD) for like in self.like]
            letters.append(Letter(record=data, sketch_m=sketch_m, payload=payload))
            if record is None or not record.flags & Flag.MORE:
                return letters

    def fetch_receipt(self, receiver: int) -> Receipt:
        """Take one receipt."""
        rank = self._rank_of[receiver]
        answer = self.comm.take(torch.empty(2, dtype=torch.float64), source=rank, tag=_RECEIPT)
        sketch_m = None
        if self.sketch_size is not None:
            sketch_m = self.comm.take(self._like_sketch(), source=rank, tag=_RECEIPT)
        return Receipt(code=int(answer[0]), mass=float(answer[1]), sketch_m=sketch_m)

    def forget(self, members: Sequence[int]) -> None:
        """Drop all that is known of members that left."""
        for member in members:
            self.sent_sums.pop(member, None)
            self.received_sums.pop(member, None)
            self.ledgers.pop(member, None)
            self._held.pop(member, None)

    def _record(self, round_: int, share: float, mass: float) -> Record:
        return Record(
            run=self.run,
            generation=self.generation,
            sender=self.me,
            round=round_,
            weights_round=round_,
            share=share,
            mass=mass,
        )

    def _summed(self, receiver: int, share: float, x: Sequence[Tensor], mass: float) -> Sums:
        """Add this round's share to all that was ever sent to a receiver."""
        total = self.sent_sums.setdefault(
            receiver, Sums(vectors=[torch.zeros_like(part) for part in self.like])
        )
        for kept, part in zip(total.vectors, x, strict=True):
            kept.add_(part.double(), alpha=share)
        total.mass += share * mass
        return total

    def _post(
        self, receiver: int, record: Record, sketch_m: Tensor | None, payload: Sequence[Tensor]
    ) -> None:
        """Post one envelope, or what a fault makes of it."""
        fault = self._faults(record.round, self.me, receiver) if self._faults and payload else ""
        letters = [*self._held.pop(receiver, []), (record, sketch_m, list(payload))]
        if fault == "late":
            self._held[receiver] = [(record, sketch_m, [part.clone() for part in payload])]
            letters[-1] = (replace(record, flags=Flag.LATE), sketch_m, [])
        elif fault == "lost":
            letters[-1] = (replace(record, flags=Flag.WITHHELD), sketch_m, [])
        elif fault == "nan":
            letters[-1] = (record, sketch_m, [part * torch.nan for part in payload])
        elif fault == "twice":
            letters.append(letters[-1])
        for place, (head, sketch, parts) in enumerate(letters):
            more = Flag.MORE if place < len(letters) - 1 else Flag(0)
            self._put(receiver, replace(head, flags=head.flags | more).pack(), _RECORD)
            if self.sketch_size is not None:
                assert sketch is not None, "distances need sketches"
                self._put(receiver, sketch, _SKETCH)
            for part in parts:
                self._put(receiver, part, _PAYLOAD)

    def _put(self, member: int, x: Tensor, tag: int) -> None:
        self.comm.post(x, to=self._rank_of[member], tag=tag)
        self.num_posts += 1

    def _judge(self, sender: int, letter: Letter) -> tuple[Gain | None, int]:
        """Return what a message brings, and the code of its receipt; all workers of the replica alike."""
        record, is_good = _parsed(letter.record), 1.0
        if record is None:
            is_good = 0.0
        else:
            try:
                record.check(run=self.run, generation=self.generation, sender=sender)
            except RefusedError as reason:
                logger.warning("a message of replica %d was refused: %s", sender, reason)
                record = None
                is_good = 0.0
        if record is not None and letter.payload:
            is_good = float(all_finite(letter.payload))
        if not self._all(is_good) or record is None:
            self.counters.refused += 1
            return None, REFUSED
        ledger = self.ledgers.setdefault(sender, Ledger())
        if record.flags & Flag.LATE:
            ledger.awaited.add(record.round)
            ledger.last_round = max(ledger.last_round, record.round)
            return None, NOTHING
        if record.flags & Flag.WITHHELD:
            self.counters.lost += 1
            return None, REFUSED
        if not ledger.takes(record.round):
            self.counters.duplicates += 1
            return None, ACCEPTED
        if self.sums:
            return self._difference(sender, record, letter), ACCEPTED
        whole = record.mass / record.share if record.share else 0.0
        gain = Gain(
            sender=sender,
            vectors=letter.payload,
            factor=record.share,
            mass=record.mass,
            sender_mass=whole,
            sketch_m=letter.sketch_m,
        )
        return gain, ACCEPTED

    def _difference(self, sender: int, record: Record, letter: Letter) -> Gain:
        """Return what is new in a running sum."""
        before = self.received_sums.get(sender)
        now = Sums(vectors=letter.payload, mass=record.mass)
        self.received_sums[sender] = now
        vectors = [part.clone() for part in now.vectors]
        for part, old in zip(vectors, before.vectors if before else [], strict=before is not None):
            part.sub_(old)
        return Gain(
            sender=sender,
            vectors=vectors,
            factor=1.0,
            mass=now.mass - (before.mass if before else 0.0),
            sender_mass=float("nan"),
            sketch_m=letter.sketch_m,
        )

    def _like_sketch(self) -> Tensor:
        return torch.empty(self.sketch_size or 0, dtype=torch.float32, device=self.like[0].device)

    def _lose(self, member: int, error: PeerLostError) -> None:
        """Note that a member has died."""
        if member not in self.gone:
            logger.warning("replica %d is gone: %s", member, error)
        self.gone.add(member)
        self.counters.lost += 1

    def _all(self, done: float) -> bool:
        """Whether all workers of this replica say so."""
        if self.inner.size == 1:
            return bool(done)
        return bool(self.inner.sum(torch.tensor(done)) == self.inner.size)


def _parsed(data: Tensor) -> Record | None:
    try:
        return Record.parse(data)
    except RefusedError as reason:
        logger.warning("a message was refused: %s", reason)
        return None
