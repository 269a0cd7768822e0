"""What gossiping replicas agree on when some of them died or come: whose shares arrived, step, masses.

Paper: "Adaptive Weighting Push-SUM" (arXiv 2412.07252), which keeps its nodes; the rules here are ours.
Letters: w share, a mass, x numerators, x^h those after the local update, N replicas.

A loss ends the round in which a replica notices it. Each then asks what became of the shares that it gave
away in that round: a survivor that accepted one has it; all others come back, weights and mass together. So
the sums of x and of a over the survivors change by what the dead had, and by nothing else. Then all masses
are scaled by one number, so that they add up to N again, which leaves every x / a as it is.

Another loss may cut this off half way, with some replicas through and others not. What became of a share
does not change, so it is asked again; and each knows by how much its masses were scaled so far.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hardy.distributed.comm import MailCommunicator, WorkerLostError
from hardy.distributed.gossip.exchange import Exchange, Gain, Sent
from hardy.distributed.gossip.topology import Topology
from hardy.distributed.groups import ExcludedError

if TYPE_CHECKING:
    from hardy.distributed.gossip.push_sum import PushSum

logger = logging.getLogger(__name__)

_STEP, _ROUND, _IS_NEW, _SCALED_AT, _SCALE, _COUNT, _ACCEPTED = range(7)
"""Columns of what each replica tells the others; from the last on, by rank, the rounds it has of them."""
_ROUNDING = 1e-9
"""Masses whose sum is off by less are not scaled, so that a resume changes no bit."""


@dataclass(frozen=True, kw_only=True)
class CutOff:
    """A round that a loss ended before its time."""

    sent: Sent
    half: list[torch.Tensor]
    """x^h."""
    gains: list[Gain]
    """Accepted until then."""


@dataclass(kw_only=True)
class Membership:
    """A replica among those that come and go."""

    has_begun: bool = False
    """Whether it has agreed with the others on where they stand."""
    has_ended: bool = False
    """Whether all are done, so that nobody is waited for any more."""
    is_new: bool = False
    """Whether it has come to others that train, and has none of their weights yet."""
    cut_off: CutOff | None = None
    scaled_at: int = -1
    """Generation in which masses were scaled last."""
    scale: float = 1.0
    """By how much so far."""
    left: list[int] = field(default_factory=list)
    """Since the last report: who is gone."""
    joined: list[int] = field(default_factory=list)
    """Since the last report: who came."""
    lost_mass: float = 0.0
    """Since the last report: what is gone with those who left, as masses were scaled before."""

    def take_report(self, exchange: Exchange, *, is_round: bool) -> dict[str, Any]:
        """Return who is there after a round, and who left and came since the last call, if anyone did."""
        if not (is_round or self.left or self.joined):
            return {}
        told = {"generation": exchange.generation, "members": list(exchange.members)}
        told |= {"left": self.left, "joined": self.joined, "lost_mass": self.lost_mass}
        self.left, self.joined, self.lost_mass = [], [], 0.0
        return told


def begin(strategy: "PushSum") -> None:
    """Agree with the others on where they stand, before the first step; elastic groups only, and once."""
    membership = strategy.membership
    if strategy.group.is_elastic and not membership.has_begun:
        membership.has_begun = True
        if not _can(lambda: _align(strategy)):
            regroup(strategy)


def end(strategy: "PushSum") -> None:
    """Wait for the others after the last step, for nobody may leave while another waits for a message."""
    while not _can(strategy.group.barrier):
        regroup(strategy)
    strategy.membership.has_ended = True


def regroup(strategy: "PushSum") -> None:
    """Go on with the replicas that live and those that came."""
    strategy.group.reform()
    while not _can(lambda: _align(strategy)):
        strategy.group.reform()


def look_around(strategy: "PushSum", *, wants_stop: bool) -> bool:
    """Return whether someone asked to stop; where not, let in those that ask to join. All look at once."""
    mine = torch.tensor([wants_stop, strategy.group.wants_members()], dtype=torch.int64)
    try:
        num_stops, num_waiting = strategy.group.sum(mine).tolist()
    except WorkerLostError:
        num_stops, num_waiting = 0, 1
    if num_waiting and not num_stops:
        regroup(strategy)
    return num_stops > 0


def _can(act: Callable[[], None]) -> bool:
    """Do what needs all replicas; False if one was lost."""
    try:
        act()
    except ExcludedError:
        raise
    except WorkerLostError as error:
        logger.info("a replica was lost: %s", error)
        return False
    return True


def _align(strategy: "PushSum") -> None:
    """Agree with the members of the group on where they stand, and give newcomers weights."""
    members = strategy.group.members
    newcomers = renew(strategy, strategy.group.mail, members, generation=strategy.group.generation)
    _take_over(strategy, newcomers)


def renew(
    strategy: "PushSum", comm: MailCommunicator, members: Sequence[int], *, generation: int
) -> list[int]:
    """Go on with these replicas; all of them call it alike, between two steps or after a round cut off.

    Args:
        strategy: changed in place.
        comm: those who go on.
        members: their numbers, by rank; a replica keeps its own.
        generation: higher than before, or the same where nobody left or came.

    Returns:
        The ranks of those that have come and have no weights yet.

    Raises:
        WorkerLostError: another has died; call it again in the next generation.
        ExcludedError: none of those who trained is left.
    """
    exchange, membership = strategy.exchange, strategy.membership
    rows = comm.all_gather(_row(strategy, members)).tolist()
    kept = {member: row for member, row in zip(members, rows, strict=True) if not row[_IS_NEW]}
    if not kept:
        raise ExcludedError(
            "all replicas that trained are gone, and those that came have no weights yet; go on from the "
            "last checkpoint with `hardy resume`"
        )
    newest = max(kept.values(), key=lambda row: row[_SCALED_AT])
    _settle(strategy, kept, place=_ACCEPTED + members.index(exchange.me))
    _scale(strategy, 1.0 if membership.is_new else newest[_SCALE] / membership.scale)
    membership.scaled_at, membership.scale = int(newest[_SCALED_AT]), newest[_SCALE]
    mine = [strategy.mass, 0.0 if membership.is_new else strategy.mass]
    total, total_kept = comm.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
    factor = len(members) / total if abs(total - len(members)) > _ROUNDING else 1.0
    _scale(strategy, factor)
    membership.scaled_at, membership.scale = generation, newest[_SCALE] * factor
    if not membership.is_new:
        left = sorted({*exchange.members} - {*kept})
        lost_mass = max(newest[_COUNT] - total_kept, 0.0) if left else 0.0
        membership.left, membership.lost_mass = membership.left + left, membership.lost_mass + lost_mass
    strategy.step, strategy.round = (int(max(row[i] for row in kept.values())) for i in (_STEP, _ROUND))
    strategy.settled, strategy.sent = strategy.round, []
    newcomers = [rank for rank, row in enumerate(rows) if row[_IS_NEW]]
    membership.joined += [members[rank] for rank in newcomers]
    if comm.rank == 0 and ({*members} != {*exchange.members} or newcomers):
        _tell(strategy, members, generation=generation)
    _forget(strategy, {*exchange.members} - {*kept})
    exchange.join(comm, members, generation=generation)
    strategy.topology = Topology(strategy.config.topology, num_nodes=comm.size)
    return newcomers


def _tell(strategy: "PushSum", members: Sequence[int], *, generation: int) -> None:
    """Log who left and came."""
    membership = strategy.membership
    logger.warning(
        "step %d: replicas that left: %s, and mass %.4g with them; that came: %s; %s go on, as generation %d",
        strategy.step,
        ", ".join(map(str, membership.left)) or "none",
        membership.lost_mass,
        ", ".join(map(str, membership.joined)) or "none",
        ", ".join(map(str, members)),
        generation,
    )


def _take_over(strategy: "PushSum", newcomers: Sequence[int]) -> None:
    """Give those who have just come the weights of the lowest replica that trained; all call it."""
    source = min(set(range(strategy.outer.size)) - set(newcomers))
    if strategy.membership.is_new:
        strategy.adopt(source=source, newcomer=strategy.outer.rank)
        strategy.membership.is_new = False
    elif strategy.outer.rank == source:
        for rank in newcomers:
            strategy.adopt(source=None, newcomer=rank)


def _row(strategy: "PushSum", members: Sequence[int]) -> torch.Tensor:
    """Return what this replica tells the others."""
    membership, ledgers = strategy.membership, strategy.exchange.ledgers
    accepted = [ledgers[member].last_round if member in ledgers else -1 for member in members]
    columns = [
        strategy.step,
        strategy.round + (membership.cut_off is not None),
        membership.is_new,
        membership.scaled_at,
        membership.scale,
        len(strategy.exchange.members),
        *accepted,
    ]
    return torch.tensor(columns, dtype=torch.float64)


def _settle(strategy: "PushSum", kept: dict[int, list[float]], *, place: int) -> None:
    """End a round that was cut off with the shares that arrived; those that did not come back."""
    cut_off, strategy.membership.cut_off = strategy.membership.cut_off, None
    if cut_off is None:
        return
    sent = cut_off.sent
    arrived = {
        receiver: share
        for receiver, share in sent.shares.items()
        if (kept[receiver][place] == sent.round if receiver in kept else receiver in sent.accepted)
    }
    strategy.exchange.counters.reabsorbed += len(sent.shares) - len(arrived)
    strategy.end_round(cut_off.half, arrived, cut_off.gains)
    strategy.round += 1  # now: another loss may follow, and a receiver takes each round of a sender once


def _scale(strategy: "PushSum", factor: float) -> None:
    """Scale mass and numerators; their quotient stays."""
    if factor == 1.0:
        return
    strategy.mass *= factor
    if strategy.numerators is not None:
        strategy.numerators = [x * factor for x in strategy.numerators]


def _forget(strategy: "PushSum", gone: set[int]) -> None:
    """Drop all that is known of replicas that left, and of those that began anew."""
    strategy.exchange.forget(sorted(gone))
    if strategy.distances:
        known = strategy.distances.of
        strategy.distances.of = {member: value for member, value in known.items() if member not in gone}
