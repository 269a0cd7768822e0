"""Replicas that die at any message, two of them, and come back: no share is lost or counted twice."""

import random
import threading
from collections import defaultdict, deque

import pytest
import torch
from torch import nn

from hardy.distributed.comm import Alone, PeerLostError, WorkerLostError
from hardy.distributed.gossip.build import build_push_sum
from hardy.distributed.gossip.config import PushSumConfig, TopologyConfig, WeightsConfig
from hardy.distributed.groups import ExcludedError, Regrouping
from hardy.distributed.simulation import SimWorld

NAMES = ["full", "ring", "star", "one_peer_exponential", "base_k"]


class DiedError(BaseException):
    """The end of a thread that plays a replica."""


class Hub:
    """Mail between threads, in generations: whoever leaves one is noticed by those who wait for it there."""

    def __init__(self, founders):
        self.lists = {0: tuple(range(founders))}
        self.moved, self.boxes = threading.Condition(), defaultdict(deque)
        self.left, self.dead, self.asking, self.ready = set(), set(), set(), defaultdict(set)

    def wait(self, condition):
        assert self.moved.wait_for(condition, timeout=20.0), "a replica waits for ever"

    def leave(self, generation, member):
        with self.moved:
            self.left.add((generation, member))
            self.moved.notify_all()

    def bury(self, generation, member):
        with self.moved:
            self.dead.add(member)
            self.left.add((generation, member))
            self.moved.notify_all()

    def form(self, generation, me, members):
        """Return the members of a generation, once all that live want it."""
        with self.moved:
            self.ready[generation].add(me)
            self.moved.notify_all()
            self.wait(lambda: generation in self.lists or {*members} - self.dead <= self.ready[generation])
            if generation not in self.lists:
                self.lists[generation] = tuple(sorted(({*members} - self.dead) | self.asking))
                self.dead -= self.asking
                self.asking.clear()
            self.moved.notify_all()
            return self.lists[generation]


class HubComm:
    """One generation, seen from one member."""

    def __init__(self, hub, generation, me, before_mail):
        self.hub, self.generation, self.members, self.me = hub, generation, hub.lists[generation], me
        self.rank, self.size = self.members.index(me), len(self.members)
        self.clock, self.bytes_sent, self.before_mail = Alone().clock, 0, before_mail

    def post(self, x, *, to, tag):
        self.before_mail(self)
        with self.hub.moved:
            if (self.generation, self.members[to]) in self.hub.left:
                raise PeerLostError("gone", peer=to)
            self.hub.boxes[self.generation, self.me, self.members[to], tag].append(x.clone())
            self.hub.moved.notify_all()

    def take(self, like, *, source, tag):
        self.before_mail(self)
        box = self.hub.boxes[self.generation, self.members[source], self.me, tag]
        with self.hub.moved:
            self.hub.wait(lambda: box or (self.generation, self.members[source]) in self.hub.left)
            if not box:
                raise PeerLostError("gone", peer=source)
            x = box.popleft()
        assert (x.shape, x.dtype) == (like.shape, like.dtype)
        return x

    def finish_posts(self, *, keep_last=0):
        """Nothing is kept."""

    def all_gather(self, x):
        others = [rank for rank in range(self.size) if rank != self.rank]
        for rank in others:
            self.post(x, to=rank, tag=-1)
        rows = [x if rank == self.rank else self.take(x, source=rank, tag=-1) for rank in range(self.size)]
        return torch.stack(rows)

    def sum(self, x):
        return self.all_gather(x).sum(0)

    def barrier(self):
        self.sum(torch.ones(1))


class HubGroup(Regrouping):
    """The elastic group of one thread."""

    is_elastic, runs_beside = True, False

    def __init__(self, hub, me, before_mail=lambda comm: None, *, generation=0):
        self.hub, self.me, self.before_mail = hub, me, before_mail
        super().__init__(
            HubComm(hub, generation, me, before_mail), hub.lists[generation], generation=generation
        )

    def reform(self):
        self.hub.leave(self.generation, self.me)
        generation = self.generation + 1
        members = self.hub.form(generation, self.me, self.members)
        if self.me not in members:
            raise ExcludedError("left out")
        self.renew(HubComm(self.hub, generation, self.me, self.before_mail), members, generation=generation)

    def wants_members(self):
        return bool(self.hub.asking)

    def close(self):
        self.hub.leave(self.generation, self.me)


class Player:
    """A replica that begins with a weight of one at its own place, so that weights say whose they are."""

    def __init__(self, group, config, *, founders):
        self.model = nn.Linear(founders, 1, bias=False).double()
        with torch.no_grad():
            self.model.weight.copy_(torch.eye(founders)[group.me][None])
        self.strategy = build_push_sum(config, self.model, unit_names=[], inner=Alone(), outer=group)
        self.lines, self.ops, self.marks = [], 0, []
        self.given = defaultdict(float)
        """By (round, sender, receiver): mass that was accepted, as this replica knows."""
        receive, receipt = self.strategy.exchange.receive, self.strategy.exchange.receipt

        def note_gains(sender, **said):
            gains = receive(sender, **said)
            self.given[self.strategy.round, sender, group.me] += sum(gain.mass for gain in gains)
            return gains

        def note_receipt(receiver):
            answer = receipt(receiver)
            if answer is not None and answer.code == 1:
                at = self.strategy.topology.at(self.strategy.round)
                share = at.shares[self.strategy.outer.rank][group.members.index(receiver)]
                self.given[self.strategy.round, group.me, receiver] = share * self.strategy.mass
            return answer

        self.strategy.exchange.receive, self.strategy.exchange.receipt = note_gains, note_receipt

    @property
    def weights(self):
        return self.model.weight.detach()[0]

    def steps(self, until):
        while self.strategy.step < until:
            self.marks.append(self.ops)
            self.strategy.before_forward()
            self.strategy.after_step()
            assert not self.strategy.agreed_stop(0)
            self.lines.append((self.strategy.step, self.strategy.take_report()))
        self.marks.append(self.ops)
        self.strategy.finish()


def play(config, *, founders=4, deaths=None, until=6, comes_back=()):
    """Play a run in threads; `deaths` says at which of its messages a replica dies. Return all players."""
    hub, players, faults = Hub(founders), {}, []
    torch.set_num_threads(1)

    def live(number, group, key, join=False):
        try:
            players[key] = player = Player(group, config, founders=founders)
            assert player.strategy.join() == join
            player.steps(until)
            hub.bury(group.generation, number)
        except DiedError:
            hub.bury(group.generation, number)
            if number in comes_back:
                with hub.moved:
                    hub.asking.add(number)
                    hub.wait(lambda: any(number in hub.lists[g] for g in hub.lists if g > group.generation))
                    generation = max(hub.lists)
                live(number, HubGroup(hub, number, generation=generation), f"{number} again", join=True)
        except BaseException as error:
            faults.append(error)
            hub.bury(group.generation, number)

    def start(number):
        def before_mail(comm):
            player = players[number]
            player.ops += 1
            if player.ops == (deaths or {}).get(number):
                raise DiedError

        return threading.Thread(target=live, args=(number, HubGroup(hub, number, before_mail), number))

    threads = [start(number) for number in range(founders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not faults, faults
    return players


def check_survivors(players, survivors, *, until=6):
    """Check what must hold whoever died when; return what is gone, by whose it was."""
    left = [players[number] for number in survivors]
    assert {player.strategy.step for player in left} == {until}
    assert {player.strategy.exchange.members for player in left} == {tuple(survivors)}
    assert sum(player.strategy.mass for player in left) == pytest.approx(len(survivors), rel=1e-12)
    for player in left:  # weights and masses came and went together
        assert player.weights.sum().item() == pytest.approx(1.0, rel=1e-12)
        at = player.strategy.topology.at(player.strategy.round)
        assert player.strategy.topology.num_nodes == len(survivors)
        assert all(0 <= sum(shares.values()) <= 1 for shares in at.shares)
        known = [player.strategy.exchange.ledgers, *(d.of for d in [player.strategy.distances] if d)]
        assert all({*of} <= {*survivors} for of in known)  # the dead are forgotten
    assert len({player.strategy.membership.scale for player in left}) == 1
    unscaled = sum(p.strategy.mass / p.strategy.membership.scale * p.weights for p in left)
    gone = 1.0 - unscaled
    assert (gone >= -1e-12).all()  # nothing was counted twice
    return gone


@pytest.mark.parametrize("name", NAMES)
def test_a_death_at_any_message_costs_what_the_dead_had_and_nothing_else(name):
    topology = TopologyConfig(name=name)
    config = PushSumConfig(
        topology=topology, elastic=True, store="numerator" if name == "ring" else "debiased"
    )
    whole = play(config)
    for victim in (0, 2):
        begins, ends = whole[victim].marks[2:4]
        for op in range(begins + 1, ends + 1):
            players = play(config, deaths={victim: op})
            survivors = [number for number in range(4) if number != victim]
            gone, dead = check_survivors(players, survivors), players[victim].strategy
            told = [players[number].given for number in survivors]
            took = sum(
                given[dead.round, number, victim] for number, given in zip(survivors, told, strict=True)
            )
            gave = sum(
                given[dead.round, victim, number] for number, given in zip(survivors, told, strict=True)
            )
            assert gone.sum().item() == pytest.approx(dead.mass - gave + took, abs=1e-12)
            lines = [line for number in survivors for line in players[number].lines if line[1].get("left")]
            assert len(lines) == 3 and all(line["left"] == [victim] for _, line in lines)
            assert {round(line["lost_mass"], 9) for _, line in lines} == {round(gone.sum().item(), 9)}
            assert all(3 <= step < 6 and line["members"] == survivors for step, line in lines)


@pytest.mark.parametrize("seed", range(20))
def test_a_second_death_while_the_first_is_settled_changes_no_law(seed):
    draw = random.Random(seed)
    weights = WeightsConfig(name=draw.choice(["uniform", "adaptive"]), sketch_size=8)
    config = PushSumConfig(topology=TopologyConfig(name=draw.choice(NAMES)), weights=weights, elastic=True)
    whole = play(config, founders=5)
    marks = whole[1].marks
    first = draw.randint(marks[1] + 1, marks[4])
    second = {3: draw.randint(whole[3].marks[1] + 1, whole[3].marks[4])}
    if seed % 2:  # it dies in what the survivors say to each other after the first death
        reached = play(config, founders=5, deaths={1: first})[3]
        second = {3: reached.marks[draw.randint(2, 4)] + draw.randint(1, 12)}
    players = play(config, founders=5, deaths={1: first} | second, until=14)
    gone = check_survivors(players, [0, 2, 4], until=14)
    told = [line for number in (0, 2, 4) for _, line in players[number].lines]
    for line in told:
        assert set(line.get("left", [])) <= {1, 3}
    assert 0 < gone.sum().item() < 5


def test_one_that_comes_back_takes_a_neighbours_weights_and_mass_one():
    config = PushSumConfig(topology=TopologyConfig(name="full"), elastic=True, agree_every_steps=2)
    players = play(config, founders=3, deaths={1: 40}, until=400, comes_back={1})
    again = players["1 again"]
    first_line = next(line for _, line in again.lines if line)
    assert first_line["joined"] == [1] and first_line["members"] == [0, 1, 2]
    for number in (0, 2):
        joined = [(step, line) for step, line in players[number].lines if line.get("joined")]
        left = [(step, line) for step, line in players[number].lines if line.get("left")]
        assert [line["joined"] for _, line in joined] == [[1]] and [line["left"] for _, line in left] == [[1]]
        assert left[0][0] <= joined[0][0]
    ended = [players[0], again, players[2]]
    assert {player.strategy.step for player in ended} == {400}
    assert sum(player.strategy.mass for player in ended) == pytest.approx(3.0, rel=1e-12)
    assert again.weights.sum().item() == pytest.approx(1.0) and len(again.lines) < 400
    torch.testing.assert_close(again.weights, players[0].weights)


def test_the_last_one_goes_on_alone():
    config = PushSumConfig(topology=TopologyConfig(name="ring"), elastic=True)
    players = play(config, founders=2, deaths={1: 9}, until=20)
    assert players[0].strategy.step == 20 and players[0].strategy.mass == pytest.approx(1.0)
    assert players[0].strategy.exchange.members == (0,) and players[0].lines[-1][0] == 20


def test_newcomers_alone_have_nothing_to_take_over():
    hub = Hub(1)
    hub.lists[1] = (0,)
    group = HubGroup(hub, 0, generation=1)
    with pytest.raises(WorkerLostError, match="all replicas that trained are gone.*`hardy resume`"):
        Player(group, PushSumConfig(elastic=True), founders=1).strategy.join()


def test_masses_that_some_have_scaled_already_are_weighed_alike():
    """Replica 0 had halved its mass, as all were to, when another loss kept replica 1 from doing so."""

    def body(comm):
        model = nn.Linear(2, 1).double()
        strategy = build_push_sum(PushSumConfig(), model, unit_names=[], inner=Alone(), outer=comm)
        strategy.mass = 0.6 if comm.rank == 0 else 1.2
        if comm.rank == 0:
            strategy.membership.scaled_at, strategy.membership.scale = 3, 0.5
        strategy.renew(comm, [0, 1], generation=4)
        return strategy.mass, strategy.membership.scale

    for mass, scale in SimWorld(2).run(body):
        assert (mass, scale) == pytest.approx((1.0, 0.5 / 0.6))
