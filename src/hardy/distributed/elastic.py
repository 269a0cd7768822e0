"""Replicas as processes that meet although some die and others come: `StoreGroup`.

They find each other through a store held by their launcher (`StoreHost`). A killed peer fails the collective
it was expected in at once, a silent one after the time-out; the others form the next generation and go on.

Paper: none; a round of EDiT (arXiv 2412.07210) that a loss interrupts depends only on what its members still
hold, so it is done again in the new group.
"""

import json
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

# Documented, but torch does not mark them as exported.
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from hardy.config import UserError
from hardy.distributed.comm import Alone, Communicator, WorkerLostError
from hardy.distributed.gloo import GlooComm
from hardy.distributed.groups import ExcludedError, Regrouping
from hardy.distributed.groups import FixedGroup as FixedGroup
from hardy.distributed.groups import OuterGroup as OuterGroup
from hardy.distributed.groups import SimGroup as SimGroup
from hardy.distributed.store import connect_store, open_store

_POLL_S = 0.02
"""Between two looks into the store."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long processes of an elastic group wait for each other."""

    heartbeat_s: float = 2.0
    """Between two signs of life."""
    limit_s: float = 10.0
    """Without a sign of life before a replica counts as dead; a launcher that reports its end is faster."""
    timeout_s: float = 60.0
    """In a collective, before it fails for those who came; and while a group connects."""
    busy_s: float = 1800.0
    """When a group is formed anew, for members that give signs of life but have not come: they may be far
    from the place where they meet, or hang."""
    start_s: float = 300.0
    """Until the store answers and the founders have come; a slow name server alone may take seconds."""

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat_s < self.limit_s:
            raise ValueError(
                f"heartbeat_s must be above 0 and below limit_s, got {self.heartbeat_s} and {self.limit_s}"
            )
        for name in ("timeout_s", "busy_s", "start_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


class StoreHost:
    """The store of an elastic run, held by the launcher: it must outlive all replicas.

    Args:
        host: name or address under which the replicas reach this machine.
        port: 0 takes a free one.
    """

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._store = open_store(host, port=port)
        self.address = f"{host}:{self._store.port}"

    def report_loss(self, replica: int) -> None:
        """Tell the members that this replica has ended, so that nobody waits for its signs of life.

        Call it before the replica is started again.
        """
        self._store.set(f"lost/{replica}.{self._store.add(f'starts/{replica}', 0)}", "")


class StoreGroup(Regrouping):
    """Replicas that are worlds of processes of their own, and find each other through a store.

    All workers of a replica make one each; those with the same place in it form a gloo group. The
    member list of each generation is written once, by the lowest replica that lives, when all others came to
    `reform`, gave no sign of life for `limit_s`, were reported by the launcher, or `busy_s` has passed.

    A replica that begins anew under its old number takes the place of what it was. The store is the one thing
    that must not fail: without it the group goes on, but cannot change.

    Args:
        store_address: "host:port" of the launcher's `StoreHost`.
        replica: number of this replica.
        founders: replicas that must have come before the first group is formed; those after ask to join.
        fingerprint: of settings and version; replicas that differ are refused.
        inner: the workers of this replica; none means this one alone. All make their groups together.
        patience: how long others are waited for.

    Raises:
        UserError: the fingerprint is another one than that of the replicas which are there.
        WorkerLostError: the store or the other replicas did not answer.
    """

    is_elastic = True
    runs_beside = True

    def __init__(
        self,
        store_address: str,
        replica: int,
        *,
        founders: int,
        fingerprint: str,
        inner: Communicator | None = None,
        patience: Patience | None = None,
    ) -> None:
        inner = inner or Alone()
        super().__init__(Alone(clock=inner.clock), (replica,), generation=-1)
        self._inner, self._patience = inner, patience or Patience()
        self._roster = _Roster(store_address, replica, inner=inner, patience=self._patience)
        try:
            self._roster.compare_fingerprints(fingerprint)
            self._roster.ask()
            self._enter(*self._wait_to_be_admitted(founders))
        except BaseException:
            self._roster.close()
            raise

    def reform(self) -> None:
        """Agree with all members that live on the next generation, and connect."""
        self._disconnect()
        self._enter(*self._wait_for_list(self.generation + 1))

    def wants_members(self) -> bool:
        """Return whether a replica that lives asks to join; False when the store does not answer.

        All workers of a replica call it together. The first looks for all: others might look a moment later,
        see another, and wait to reform for those who go on.
        """
        is_asked = False
        if self._inner.rank == 0:
            try:
                is_asked = bool(self._roster.asking(self._names))
            except WorkerLostError as error:
                logger.warning("cannot see whether a replica asks to join: %s", error)
        return bool(self._inner.broadcast(torch.tensor(is_asked), source=0))

    def close(self) -> None:
        """Leave, and say so."""
        self._disconnect()
        self._roster.close()

    def _wait_to_be_admitted(self, founders: int) -> tuple[int, list[str]]:
        """Return the first generation that this replica is in, and its list."""
        roster, since_s, generation = self._roster, self.clock.now(), 0
        previous: list[str] = []
        while True:
            names = roster.read_list(generation)
            if names is None and generation == 0:
                came = roster.asking([])
                if len(came) >= founders and came[0] == roster.name and roster.shard == 0:
                    roster.write_list(0, came)
                elif self.clock.now() - since_s > self._patience.start_s:
                    raise WorkerLostError(
                        f"replica {roster.replica} waited {self._patience.start_s:g} s for {founders} "
                        f"replicas to begin with; {len(came)} came: {', '.join(came) or 'none'} "
                        f"(number.start). Start the others within that time"
                    )
            elif names is None:
                if not roster.living(previous):
                    raise WorkerLostError(
                        f"replica {roster.replica} asked to join, but no member is left: "
                        f"{', '.join(previous)} (number.start) gave no sign of life; begin again with "
                        f"`hardy resume`"
                    )
            elif roster.name in names:
                return generation, names
            else:
                generation, previous = generation + 1, names
                continue
            self.clock.sleep(_POLL_S)

    def _wait_for_list(self, generation: int) -> tuple[int, list[str]]:
        """Return the newest generation from this one on, and its list; write it when it is on us."""
        roster, patience = self._roster, self._patience
        roster.say_ready(generation)
        since_s = self.clock.now()
        while True:
            newest = None
            while (names := roster.read_list(generation)) is not None:
                newest, generation = (generation, names), generation + 1
            if newest is not None:
                return newest
            living = roster.living(self._names)
            ready = [name for name in living if roster.is_ready(name, generation)]
            waited_s = self.clock.now() - since_s
            if ready[:1] == [roster.name] and roster.shard == 0:
                if ready == living or waited_s > patience.busy_s:
                    roster.write_list(generation, [*ready, *roster.asking(self._names)])
                    continue
            elif waited_s > 2 * patience.busy_s + patience.limit_s:
                raise WorkerLostError(
                    f"replica {roster.replica} waited {waited_s:.0f} s for the list of generation "
                    f"{generation}; a worker of it or of replica {(ready or living or ['?'])[0]} hangs. Go "
                    f"on from the last checkpoint with `hardy resume`"
                )
            self.clock.sleep(_POLL_S)

    def _enter(self, generation: int, names: list[str]) -> None:
        """Connect with the others of a list; where that fails, with those of the next."""
        while True:
            self._names = names
            if self._roster.name not in names:
                raise ExcludedError(
                    f"replica {self._roster.replica} was left out of generation {generation}, whose "
                    f"members are {', '.join(names)} (number.start): it gave no sign of life, or did "
                    f"not come. Start it again and it joins anew"
                )
            self.renew(Alone(clock=self.clock), (self._roster.replica,), generation=generation)
            comm = self._connect(generation, names)
            if comm is not None:
                members = [int(name.split(".")[0]) for name in names]
                self.renew(comm, members, generation=generation)
                return
            generation, names = self._wait_for_list(generation + 1)

    def _connect(self, generation: int, names: list[str]) -> Communicator | None:
        """Return the group of a list once all workers of all its replicas have one; None if one fails."""
        roster = self._roster
        comm: Communicator = Alone(clock=self.clock)
        if len(names) > 1:
            timeout = timedelta(seconds=self._patience.timeout_s)
            store = PrefixStore(f"outer/{generation}/{roster.shard}", roster.store)
            try:
                group = dist.ProcessGroupGloo(store, names.index(roster.name), len(names), timeout)
            except RuntimeError as error:
                logger.warning("generation %d could not connect: %s", generation, error)
                return None
            whose = f"replicas {', '.join(names)} (number.start) of generation {generation}"
            comm = GlooComm(group, clock=self.clock, whose=whose)
        if roster.all_connected(generation, names):
            return comm
        if isinstance(comm, GlooComm):
            comm.close()
        return None

    def _disconnect(self) -> None:
        if isinstance(self._comm, GlooComm):
            self._comm.close()


class _Roster:
    """What one worker reads and writes in the store; names are "number.start" of replicas.

    A thread of its own gives signs of life, by a connection of its own, and watches those of the others: it
    counts how long a counter stood still by this worker's clock alone, so clocks need not agree.
    """

    def __init__(self, address: str, replica: int, *, inner: Communicator, patience: Patience) -> None:
        self._address, self._patience, self._clock = address, patience, inner.clock
        self.replica, self.shard, self._shards = replica, inner.rank, inner.size
        self.store = self._open()
        self._asks: dict[int, str] = {}
        self._gone: set[str] = set()
        self._seen: dict[str, tuple[int, float]] = {}
        self._looked_s = self._clock.now()
        self._lock, self._ended = threading.Lock(), threading.Event()
        with self._asking():
            start = self.store.add(f"starts/{replica}", 1) if self.shard == 0 else 0
        self.name = f"{replica}.{int(inner.broadcast(torch.tensor(start), source=0))}"
        with self._asking():
            self._beat(self.store)
        self._thread = threading.Thread(
            target=self._live, args=(self._open(),), daemon=True, name="heartbeat"
        )
        self._thread.start()

    def close(self) -> None:
        """End the signs of life, and say that this replica is gone."""
        self._ended.set()
        try:
            self.store.set(f"lost/{self.name}", "")
        except RuntimeError as error:
            logger.warning("could not say goodbye: %s", error)
        self._thread.join(self._patience.heartbeat_s)

    def compare_fingerprints(self, mine: str) -> None:
        """Refuse to run beside replicas of another kind."""
        with self._asking():
            theirs = self.store.compare_set("fingerprint", "", mine).decode()
        if theirs != mine:
            raise UserError(
                f"replica {self.replica} runs with other settings or another version than the replicas "
                f"that are there: theirs is {theirs}, ours is {mine}; start all replicas with the same "
                f"settings and the same version of hardy"
            )

    def ask(self) -> None:
        """Ask to join, once all workers of this replica give signs of life."""
        if self.shard != 0:
            return
        beats, since_s = [self._counter(self.name, shard) for shard in range(self._shards)], self._clock.now()
        with self._asking():
            while not self.store.check(beats):
                if self._clock.now() - since_s > self._patience.start_s:
                    raise WorkerLostError(
                        f"replica {self.replica} has {self._shards} workers, but not all of them came within "
                        f"{self._patience.start_s:g} s; read the output of the others"
                    )
                self._clock.sleep(_POLL_S)
            self.store.set(f"asks/{self.store.add('num_asks', 1)}", self.name)

    def asking(self, members: Sequence[str]) -> list[str]:
        """Return those who ask to join, live, and are no members, by number."""
        with self._asking():
            for number in range(1, self.store.add("num_asks", 0) + 1):
                if number not in self._asks and self.store.check([f"asks/{number}"]):
                    self._asks[number] = self.store.get(f"asks/{number}").decode()
        return self.living(name for name in self._asks.values() if name not in members)

    def living(self, names: Iterable[str]) -> list[str]:
        """Return which of these live, by number: none that was reported, fell silent or began anew."""
        with self._asking():
            return sorted((name for name in set(names) if not self._is_lost(name)), key=_number)

    def read_list(self, generation: int) -> list[str] | None:
        """Return the members of a generation; None if it is not decided."""
        with self._asking():
            if not self.store.check([f"members/{generation}"]):
                return None
            return json.loads(self.store.get(f"members/{generation}"))

    def write_list(self, generation: int, names: Sequence[str]) -> None:
        """Decide the members of a generation, unless someone did."""
        with self._asking():
            self.store.compare_set(f"members/{generation}", "", json.dumps(sorted(names, key=_number)))

    def say_ready(self, generation: int) -> None:
        """Say that this worker has left the generations before and waits for this one."""
        with self._asking():
            self.store.set(f"ready/{generation}/{self.name}/{self.shard}", "")

    def is_ready(self, name: str, generation: int) -> bool:
        """Return whether all workers of a replica wait for this generation."""
        with self._asking():
            return self.store.check([f"ready/{generation}/{name}/{shard}" for shard in range(self._shards)])

    def all_connected(self, generation: int, names: Sequence[str]) -> bool:
        """Say that this worker is connected; return whether all of the list are before one gives up."""
        places = [f"{name}/{shard}" for name in names for shard in range(self._shards)]
        since_s = self._clock.now()
        with self._asking():
            self.store.set(f"connected/{generation}/{self.name}/{self.shard}", "")
            while not self.store.check([f"connected/{generation}/{place}" for place in places]):
                gave_up = any(self.store.check([f"ready/{generation + 1}/{place}"]) for place in places)
                if gave_up or self._clock.now() - since_s > self._patience.timeout_s:
                    return False
                self._clock.sleep(_POLL_S)
        return True

    def _is_lost(self, name: str) -> bool:
        if name == self.name:
            return False
        replica, start = name.split(".")
        if name in self._gone or self.store.check([f"lost/{name}"]):
            self._gone.add(name)
            return True
        if self.store.add(f"starts/{replica}", 0) > int(start):  # it began anew
            self._gone.add(name)
            return True
        with self._lock:
            for shard in range(self._shards):
                key = self._counter(name, shard)
                _, moved_s = self._seen.setdefault(key, (0, self._looked_s))
                if self._looked_s - moved_s > self._patience.limit_s:
                    return True
        return False

    def _live(self, store: TCPStore) -> None:
        """Be the thread: count on, and see who else does."""
        while not self._ended.wait(self._patience.heartbeat_s):
            try:
                self._beat(store)
                self._look(store)
            except RuntimeError:
                try:
                    store = self._open()
                except WorkerLostError as error:  # a store that is gone does not come back
                    logger.warning("no signs of life are given any more: %s", error)
                    return

    def _beat(self, store: TCPStore) -> None:
        store.add(self._counter(self.name, self.shard), 1)

    def _look(self, store: TCPStore) -> None:
        with self._lock:
            keys = list(self._seen)
        counts = {key: store.add(key, 0) for key in keys}
        now_s = self._clock.now()
        with self._lock:
            # One who was stopped itself has seen nobody, which says nothing about them.
            forgives = now_s - self._looked_s > self._patience.limit_s / 2
            for key, count in counts.items():
                if forgives or count != self._seen[key][0]:
                    self._seen[key] = (count, now_s)
            self._looked_s = now_s

    def _counter(self, name: str, shard: int) -> str:
        return f"beats/{name}/{shard}"

    def _open(self) -> TCPStore:
        with self._asking():
            return connect_store(self._address, timeout_s=self._patience.start_s)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Say what to check when the store fails."""
        try:
            yield
        except RuntimeError as error:
            raise WorkerLostError(
                f"replica {self.replica} gets no answer from the store at {self._address} within "
                f"{self._patience.start_s:g} s; check that the launcher which holds it is alive, that host "
                f"and port are right, and that no firewall is between. torch says: {error}"
            ) from error


def _number(name: str) -> int:
    return int(name.split(".")[0])
