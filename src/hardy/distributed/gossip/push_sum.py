"""Push-sum: replicas train alone and send shares of their weights to a few neighbours, also one-way.

Paper: "Adaptive Weighting Push-SUM" (arXiv 2412.07252): SGP, SGAP, their momentum variants, SADDOPT as
baseline. Letters: i, j replicas, t round, z de-biased parameters (those of the model), a mass, x = a z
numerators, x^h those after the local update, w_{j<-i} share that i gives to j, g gradient, y tracked
gradient.

    x^h = x + Delta,   x <- sum_j w x_j^h,   a <- sum_j w a_j,   z = x / a

The sums of all x and all a are kept by mixing, whatever the graph. z alone is stored between steps: with
Delta the change that the optimizer makes to z, x^h = z_new + (a - 1) z_old. Mixing then makes any local
optimizer's update count by 1 / a, which the paper has for SGD with and without momentum.

Differs from the paper: messages carry x^h with its share beside it, not their product; distances may be
sketched.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hardy.config import UserError
from hardy.distributed.comm import Communicator, MailCommunicator, PeerLostError
from hardy.distributed.gossip import members as group_members
from hardy.distributed.gossip import state
from hardy.distributed.gossip.config import PushSumConfig
from hardy.distributed.gossip.distances import Distances
from hardy.distributed.gossip.exchange import ACCEPTED, REFUSED, Exchange, Faults, Gain, Sent
from hardy.distributed.gossip.members import CutOff, Membership
from hardy.distributed.gossip.message import run_id
from hardy.distributed.gossip.spread import distance_to_mean, squares_to
from hardy.distributed.gossip.topology import Topology
from hardy.distributed.gossip.vectors import Vectors, all_finite
from hardy.distributed.gossip.weights import self_share
from hardy.distributed.groups import OuterGroup
from hardy.distributed.strategy import Strategy

LEAST_MASS = 1e-6
"""A replica with less has given nearly all away; its steps would count a million times."""


class MassError(UserError):
    """A replica's mass is too small to go on."""


class PushSum(Strategy):
    """One replica of a gossiping group.

    Args:
        config: the settings.
        vectors: the model.
        inner: the workers of this replica.
        group: the replicas; where it is elastic, some may die and come while the others go on.
        faults: failures to try out.
    """

    def __init__(
        self,
        config: PushSumConfig,
        vectors: Vectors,
        *,
        inner: Communicator,
        group: OuterGroup,
        faults: Faults | None = None,
    ) -> None:
        self.config, self.vectors, self.inner, self.group = config, vectors, inner, group
        self.topology = Topology(config.topology, num_nodes=group.size)
        self.tracks = config.method == "gradient_tracking"
        self.distances: Distances | None = None
        if config.weights.name == "adaptive":
            self.distances = Distances(config.weights, vectors, inner, seed=config.topology.seed)
        sums = config.on_send_failure == "running_sum"
        like = vectors.zeros() + (vectors.zeros(count=vectors.parameter_sets) if self.tracks else [])
        self.exchange = Exchange(
            group.mail,
            inner,
            run=run_id(repr(config)),
            like=like,
            comm_dtype=torch.bfloat16 if config.comm_dtype == "bf16" else vectors.dtype,
            sums=sums,
            sketch_size=config.weights.sketch_size
            if self.distances and self.distances.uses_sketches
            else None,
            faults=faults,
        )
        self.exchange.join(group.mail, group.members, generation=group.generation)
        self.step, self.round, self.mass = 0, 0, 1.0
        self.membership = Membership()
        self.sent: list[Sent] = []
        """Rounds whose receipts are not in."""
        self.tracked = vectors.zeros(count=vectors.parameter_sets) if self.tracks else []
        """y."""
        self.gradients = vectors.zeros(count=vectors.parameter_sets) if self.tracks else []
        """g of the step before."""
        self.numerators = vectors.read_all() if config.store == "numerator" else None
        self.settled = 0
        """Rounds before this one have nothing under way."""
        self._posts = (0, 0)
        """Posts at the end of the last round but one, and of the last."""
        self._before: list[Tensor] | None = None
        self._report: dict[str, Any] = {}
        self._wants_stop = False
        self._room: dict[str, Any] | None = None

    @property
    def outer(self) -> MailCommunicator:
        """The replicas."""
        return self.exchange.comm

    def before_forward(self) -> None:
        """Keep z where the local update must be told from it; elastic, agree with the others at first."""
        group_members.begin(self)
        if self.mass != 1.0 and self.numerators is None and not self.tracks:
            self._before = self.vectors.read_all()

    def reduce_gradients(self) -> None:
        """With gradient tracking: mix x and y, and let the optimizer step along y instead of g."""
        if not self.tracks:
            return
        now = self.vectors.read_gradients()
        if not self._all_finite(now):
            now = self.gradients  # as if this replica's had not changed: y must never hold a NaN
        half = self._numerators_of(self.vectors.read_all())
        mixed = self._mix(half + self.tracked) if self._mixes() else half + self.tracked
        assert mixed is not None, "replicas that may be lost do not track gradients"
        x, self.tracked = mixed[: len(half)], mixed[len(half) :]
        for y, new, old in zip(self.tracked, now, self.gradients, strict=True):
            y.add_(new).sub_(old)
        self.gradients = now
        self._show(x)
        self.vectors.write_gradients([y / self.mass for y in self.tracked])

    def after_step(self) -> None:
        """Mix, or count the local update by 1 / a."""
        if self.tracks:
            if self.numerators is not None:
                self.numerators = [self.mass * z for z in self.vectors.read_all()]
        elif self._mixes():
            x = self._mix(self._half_steps())
            if x is not None:
                self._show(x)
        elif self.mass != 1.0 or self.numerators is not None:
            self._show(self._half_steps())
        self._before = None
        self.step += 1
        if self.has_lost:
            group_members.regroup(self)

    def finish(self) -> None:
        """Take what is still under way, so that nothing of the replicas' sum is left in the network."""
        if self.group.is_elastic:
            self._finish_posts(keep_last=0)
            group_members.end(self)
            return
        if self.config.overlap and self.round > 0 and self.outer.size > 1:
            x = self._numerators_of(self.vectors.read_all())
            gains = self._arrivals(self.round - 1, None)
            apart = self._distance_to_mean(self.round - 1, gains)
            for round_ in (self.round - 2, self.round - 1):
                gains += self._settle(round_)
            self._show(self._combined(x, {}, gains))
            self._report |= apart
        self.settled = self.round
        self._finish_posts(keep_last=0)

    def agreed_stop(self, votes: int) -> bool:
        """Return whether someone asked to stop, at the steps at which all replicas look."""
        self._wants_stop |= votes > 0
        if self.outer.size == 1 and (self._wants_stop or not self.group.is_elastic):
            return self._wants_stop
        if self.membership.has_ended or self.step % self.config.agree_every_steps:
            return False
        if self.group.is_elastic:
            return group_members.look_around(self, wants_stop=self._wants_stop)
        return bool(self.outer.sum(torch.tensor(self._wants_stop, dtype=torch.int64)) > 0)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Show the average of all replicas, the sum of x over the sum of a; all call it: it is an all-reduce.

        Ordinary evaluation asks nobody and shows each replica's own z, so its loss is the mean over replicas.
        """
        if self.outer.size == 1:
            yield
            return
        own = self.vectors.read_all()
        total = float(self.outer.sum(torch.tensor(self.mass, dtype=torch.float64)))
        for index, z in enumerate(own):
            self.vectors.write(index, self.outer.sum(z * self.mass) / total)
        try:
            yield
        finally:
            for index, z in enumerate(own):
                self.vectors.write(index, z)

    def take_report(self) -> dict[str, Any]:
        """Return the numbers of this step's round, if it had one."""
        report, self._report = self._report, {}
        if not self.group.is_elastic:
            return report
        return report | self.membership.take_report(self.exchange, is_round=bool(report))

    def own_steps(self, step: int) -> int:
        """Return the steps done; elastic, a replica that a loss left behind goes on where the others are."""
        return self.step if self.group.is_elastic else step

    def standing(self, step: int) -> int:
        """Return the steps done, as `own_steps` does."""
        return self.own_steps(step)

    def join(self) -> bool:
        """Take over the place of those who train already; return whether there are any."""
        if self.group.generation == 0:
            return False
        self.membership.is_new = True
        group_members.begin(self)
        return True

    def renew(
        self, comm: MailCommunicator, members: Sequence[int], *, generation: int, is_new: bool = False
    ) -> None:
        """Go on with other replicas; all of them call it between two steps, with overlap after `finish`.

        The mass of those who left is gone with their weights; all masses are scaled so that they add up to
        the number of replicas again, which leaves every z as it is. Who has just come calls `adopt` after
        this. An elastic group does both by itself.

        Args:
            comm: those who go on.
            members: their numbers, by rank; a replica keeps its own.
            generation: higher than before.
            is_new: whether this replica has just come.
        """
        self.membership.is_new = is_new
        group_members.renew(self, comm, members, generation=generation)

    def adopt(self, *, source: int | None, newcomer: int) -> None:
        """Give a replica that has just come the weights of a neighbour; both call it.

        Args:
            source: rank of the neighbour, where this is the newcomer; None where this is the neighbour.
            newcomer: rank of the newcomer.
        """
        if source is None:
            for z in self.vectors.read_all():
                self.outer.post(z, to=newcomer, tag=0)
            self.outer.finish_posts()
            return
        for index, like in enumerate(self.vectors.zeros()):
            self.vectors.write(index, self.outer.take(like, source=source, tag=0))
        if self.numerators is not None:
            self.numerators = [self.mass * z for z in self.vectors.read_all()]

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resume needs; takes messages that are under way before their time."""
        return self._room if self._room is not None else state.remember(self)

    def expect(self, saved: Mapping[str, Any]) -> None:
        """Make room for what a checkpoint holds."""
        self._room = state.room_for(self, saved["about"]) if saved else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state back; with another number of replicas each begins anew at its weights, with mass 1."""
        self._room = None
        state.recall(self, state_dict)

    @property
    def has_lost(self) -> bool:
        """Whether this replica noticed a loss that ends its round."""
        return self.group.is_elastic and bool(self.exchange.gone)

    def _mixes(self) -> bool:
        return self.outer.size > 1 and (self.step + 1) % self.config.mix_every_steps == 0

    def _numerators_of(self, z: list[Tensor]) -> list[Tensor]:
        """Return x, in the memory of z or as it is kept."""
        if self.numerators is not None:
            return self.numerators
        return [part.mul_(self.mass) for part in z] if self.mass != 1.0 else z

    def _half_steps(self) -> list[Tensor]:
        """Return x^h, as vectors of their own."""
        read = self.vectors.read
        if self.numerators is not None and self.mass != 1.0:
            return [x + (read(index) - x / self.mass) for index, x in enumerate(self.numerators)]
        if self._before is None:  # the mass is 1
            return self.vectors.read_all()
        return [old.mul_(self.mass - 1.0).add_(read(index)) for index, old in enumerate(self._before)]

    def _show(self, x: list[Tensor]) -> None:
        """Write z = x / a into the model."""
        if self.numerators is not None:
            self.numerators = x
        for index in range(len(self.vectors)):
            self.vectors.write(index, x[index], over=self.mass)

    def _mix(self, half: list[Tensor]) -> list[Tensor] | None:
        """Hold a round: send shares of x^h, take the others', set the mass; return the numerators.

        None where a loss cut it off: `renew` ends it, once it is known what became of the shares.
        """
        receivers = [self.exchange.members[rank] for rank in self.peers(self.round)[0]]
        shares = self._shares(receivers)
        own = half[: len(self.vectors)]
        sketch_m = self.distances.sketch(own, self.mass) if self.distances else None
        is_finite = self._all_finite(half)
        if is_finite:
            sent = self.exchange.send(self.round, shares, half, self.mass, sketch_m)
        else:
            self.exchange.withhold(self.round, receivers, self.mass, sketch_m)
            sent = Sent(round=self.round, shares={}, mass=self.mass, vectors=half)
        if self.distances and is_finite:
            self.distances.note_own(own, sketch_m, self.mass)
        if self.config.overlap:  # the receipts come two rounds later
            sent = Sent(
                round=sent.round,
                shares=sent.shares,
                mass=sent.mass,
                vectors=[] if self.exchange.sums else [part.clone() for part in sent.vectors],
            )
        self.sent.append(sent)
        delay = int(self.config.overlap)
        gains = self._arrivals(self.round - delay, sketch_m)
        apart = self._distance_to_mean(self.round - delay, gains)
        back = [] if self.has_lost else self._settle(self.round - 2 * delay)
        if self.has_lost:
            self.membership.cut_off = CutOff(sent=sent, half=half, gains=gains)
            return None
        gains += back
        # Without overlap all but the receipts were taken, as the receivers have answered. With it, receivers
        # may not have come to what was posted in this round and the one before.
        now, receipts = self.exchange.num_posts, 2 * len(self.peers(self.round)[1])
        self._finish_posts(keep_last=now - self._posts[0] if delay else receipts)
        self._posts = (self._posts[1], now)
        x = self._combined(half, sent.shares, gains)
        self._report |= apart
        self.round += 1
        return x

    def _distance_to_mean(self, round_: int, gains: Sequence[Gain]) -> dict[str, float]:
        """Return for the report how far this replica was from the mean of all in the round of these gains.

        Empty where it heard from nobody or has no copy of what it was then.
        """
        then = next((entry for entry in self.sent if entry.round == round_), None)
        own = then.vectors[: self.vectors.parameter_sets] if then is not None else []
        heard = [gain for gain in gains if gain.mass > 0]
        if then is None or not own or not heard:
            return {}
        squares = squares_to(own, then.mass, heard)
        if self.inner.size > 1:
            squares = self.inner.sum(squares)
        if not bool(squares.isfinite().all()):
            return {}
        return {"distance_to_mean": distance_to_mean(squares.tolist(), num_replicas=self.outer.size)}

    def _finish_posts(self, *, keep_last: int) -> None:
        """Free what posts need; those to replicas that died are forgotten."""
        while True:
            try:
                self.outer.finish_posts(keep_last=keep_last)
                return
            except PeerLostError as error:
                self.exchange.gone.add(self.exchange.members[error.peer])

    def peers(self, round_: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return ranks of (receivers, senders) of a round."""
        at = self.topology.at(round_)
        return at.receivers(self.outer.rank), at.senders(self.outer.rank)

    def _shares(self, receivers: Sequence[int]) -> dict[int, float]:
        """Return w by receiver."""
        if self.distances:
            return self.distances.shares(receivers)
        by_rank = self.topology.at(self.round).shares[self.outer.rank]
        return {self.exchange.members[rank]: by_rank[rank] for rank in sorted(by_rank)}

    def _arrivals(self, round_: int, sketch_m: Tensor | None) -> list[Gain]:
        """Take the envelopes of a round."""
        if round_ < self.settled:
            return []
        if sketch_m is None and self.distances and self.distances.own and self.distances.uses_sketches:
            sketch_m = self.distances.own.vectors[0]
        gains: list[Gain] = []
        for rank in self.peers(round_)[1]:
            sender = self.exchange.members[rank]
            if self.has_lost:
                break
            for gain in self.exchange.receive(sender, mass=self.mass, sketch_m=sketch_m):
                gains.append(gain)
                if self.distances:
                    own = gain.vectors[: len(self.vectors)]
                    self.distances.note(sender, own, gain.sketch_m, gain.sender_mass)
        return gains

    def _settle(self, round_: int) -> list[Gain]:
        """Take the receipts of a round; return what comes back to this replica."""
        back: list[Gain] = []
        sent = next((entry for entry in self.sent if entry.round == round_), None)
        if sent is None:
            return back
        self.sent.remove(sent)
        for rank in self.peers(round_)[0]:
            receiver = self.exchange.members[rank]
            receipt = None if self.has_lost else self.exchange.receipt(receiver)
            if receipt is None:
                continue
            if receipt.code == ACCEPTED:
                sent.accepted.add(receiver)
            if self.distances:
                self.distances.note_sketch(receiver, receipt.sketch_m)
            if receipt.code == REFUSED and receiver in sent.shares and not self.exchange.sums:
                share = sent.shares[receiver]
                self.exchange.counters.reabsorbed += 1
                back.append(
                    Gain(
                        sender=self.exchange.me,
                        vectors=sent.vectors,
                        factor=share,
                        mass=share * sent.mass,
                        sender_mass=sent.mass,
                        sketch_m=None,
                    )
                )
        return back

    def end_round(self, half: list[Tensor], shares: Mapping[int, float], gains: Sequence[Gain]) -> None:
        """End a round of which these shares of x^h arrived and these gains came."""
        self._show(self._combined(half, shares, gains))

    def _combined(
        self, half: list[Tensor], shares: Mapping[int, float], gains: Sequence[Gain]
    ) -> list[Tensor]:
        """Return what was kept and what came, in the memory of what came first; set the new mass."""
        kept = self_share(shares)
        mine = self.exchange.me
        first = next((gain for gain in gains if gain.sender != mine), None)
        if first is None:
            x = [part * kept if shares else part.clone() for part in half]
        else:
            x = [
                came.to(part.dtype).mul_(first.factor).add_(part, alpha=kept)
                for part, came in zip(half, first.vectors, strict=True)
            ]
        for gain in gains:
            for part, came in zip(x, gain.vectors if gain is not first else [], strict=gain is not first):
                part.add_(came.to(part.dtype), alpha=gain.factor)
        before = self.mass
        self.mass = math.fsum([kept * before, *(gain.mass for gain in gains)])
        self._check_mass()
        self._describe(half, x, before, shares, gains)
        return x

    def _check_mass(self) -> None:
        if not self.mass >= LEAST_MASS or not math.isfinite(self.mass):
            raise MassError(
                f"replica {self.exchange.me} has mass {self.mass:g} at round {self.round} of strategy."
                f"topology={self.config.topology.name} ({self.exchange.counters}); below {LEAST_MASS:g} its "
                f"steps would count without bound; take a topology in which every replica hears as often "
                f"as it gives"
            )

    def _describe(
        self,
        half: list[Tensor],
        x: list[Tensor],
        before: float,
        shares: Mapping[int, float],
        gains: Sequence[Gain],
    ) -> None:
        """Write down the numbers of this round; `half` is not needed any more and changed."""
        moved = half[0].new_zeros((), dtype=torch.float64)
        for old, new in zip(half[: len(self.vectors)], x, strict=False):
            apart = old.mul_(self.mass / before).sub_(new)
            moved += torch.linalg.vector_norm(apart).double().square() / self.mass**2
        if self.inner.size > 1:
            moved = self.inner.sum(moved)
        masses = [gain.sender_mass for gain in gains if not math.isnan(gain.sender_mass)]
        self._report = {
            "mixed": self.round,
            "mass": self.mass,
            "mass_least": min([before, *masses]),
            "mass_most": max([before, *masses]),
            "shares": {str(receiver): share for receiver, share in shares.items()},
            "distances": {str(j): d for j, d in self.distances.last.items()} if self.distances else {},
            "neighbourhood_distance": float(moved.sqrt()),
            "bytes_sent": self.group.bytes_sent if self.group.is_elastic else self.outer.bytes_sent,
            **vars(self.exchange.counters),
        }

    def _all_finite(self, parts: Sequence[Tensor]) -> bool:
        """Whether all workers of this replica hold only finite numbers."""
        faults = (~all_finite(parts)).to(torch.int64)
        return not bool(self.inner.sum(faults) if self.inner.size > 1 else faults)
