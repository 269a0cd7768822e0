"""The wire between members and coordinator: queues of a store that the launcher holds.

Paper: none. `ElectionHost` is the launcher's side, `StoreWire` a member's.

Each member has two queues of its own, and one is for those who ask to be let in. A bell (one key) wakes the
coordinator, which takes at most `POPS` messages from each queue in turn. So a queue that is flooded delays
nobody else; one with more than `LANE_LIMIT` messages, or one of a length that no record has, ends its
sender's membership. Names of members' queues depend on the secret, so strangers can only flood the queue of
those who ask.

What a TCPStore does (measured, torch 2.13): a push takes 1 us, a pop 7 us, an empty one 16 us. A message
has to be taken to see its length; above 8 MiB the store itself closes the sender's connection. A queue
cannot be deleted, nor is it listed; values are held in memory without a limit, so a peer that goes on
pushing can exhaust the memory of the launcher: put the port where only the replicas reach it. The store
listens at the given interface only.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from secrets import token_bytes

# Documented, but torch does not mark them as exported.
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from hardy.clock import WallClock
from hardy.config import UserError
from hardy.distributed.comm import WorkerLostError
from hardy.distributed.robust.coordinator import Address, Coordinator
from hardy.distributed.robust.elected import ElectedComm
from hardy.distributed.robust.election import Rules
from hardy.distributed.robust.election_log import Elected
from hardy.distributed.robust.links import Links
from hardy.distributed.robust.records import (
    ONE_RECORD_BYTES,
    REASONS,
    TOKEN_BYTES,
    Kind,
    Reason,
    Record,
    RecordError,
    Seal,
    digest_of,
)
from hardy.distributed.store import connect_store, open_store

POPS = 8
"""Messages that are taken from one queue before the next has its turn."""
LANE_LIMIT = 64
"""Messages that a member's queue may hold; an honest member has at most three under way."""
_POLL_S = 0.001
"""Between two looks for the bell, while a decision is due by time."""
_LONG = timedelta(days=365)
_JOIN, _BELL, _SALT, _PROOF = "fastest/join", "fastest/bell", "fastest/salt", "fastest/proof"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunKey:
    """What host and members of a run have in common."""

    run_id: str
    fingerprint: str
    """Of settings and versions."""
    secret: bytes = b""
    """Empty lets in whoever reaches the port."""

    def __repr__(self) -> str:
        return f"RunKey(run_id={self.run_id!r}, fingerprint={self.fingerprint!r})"  # no secret in any log


class ElectionHost:
    """The store and the coordinator of a run, held by the launcher: they must outlive all replicas.

    Args:
        rules: of elections.
        key: of the run; members that have another are refused.
        replicas: how many there are; a lost one may come again under its number.
        host: name or address of the interface to listen at.
        record_line: takes the log of elections, in a thread of its own.
        replay: who is elected at each step, instead of by arrival.
    """

    def __init__(
        self,
        rules: Rules,
        key: RunKey,
        *,
        replicas: int,
        host: str = "127.0.0.1",
        record_line: Callable[[Elected], None] | None = None,
        replay: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        self._store = open_store(host)
        self.address = f"{host}:{self._store.port}"
        self.coordinator = Coordinator(
            rules,
            replicas=replicas,
            digest=digest_of(key.run_id, key.fingerprint),
            record_line=record_line,
            replay=replay,
        )
        salt = token_bytes(TOKEN_BYTES)
        self._seal = Seal(digest_of(key.run_id, salt.hex()), secret=key.secret)
        self._store.set(_PROOF, self._seal.proof().hex())
        self._store.set(_SALT, salt.hex())
        self._clock, self._ended = WallClock(), threading.Event()
        self._lost: list[int] = []
        self._thread = threading.Thread(
            target=self._live,
            args=(connect_store(self.address, timeout_s=60.0),),  # a connection serves one thread
            daemon=True,
            name="election",
        )
        self._thread.start()

    def report_loss(self, replica: int) -> None:
        """Say that this replica has ended. Call it before the replica is started again."""
        self._lost.append(replica)
        self._store.set(_BELL, "")

    def close(self) -> None:
        """End the coordinator."""
        self._ended.set()
        self._store.set(_BELL, "")
        self._thread.join(5.0)

    def _live(self, store: TCPStore) -> None:
        """Be the thread: wait for the bell, look into the queues, decide, answer."""
        coordinator, is_busy, due_s = self.coordinator, False, math.inf
        while not self._ended.is_set():
            try:
                if not is_busy:
                    self._wait_for_bell(store, due_s)
                is_busy = self._sweep(store)
                now_s = self._clock.now()
                coordinator.tick(now_s)
                due_s = coordinator.due_s(now_s)  # of the same moment, or one in between would be missed
            except Exception:  # whoever waits for an answer must hear that there is none
                logger.exception("the coordinator of the elections failed")
                coordinator.fail(Reason.FAULT)
                self._ended.set()
            for address, records in coordinator.take_mail():
                store.queue_push(self._queue(address), self._seal.pack(records))

    def _wait_for_bell(self, store: TCPStore, due_s: float) -> None:
        """Return when someone has rung, or time alone may decide."""
        if due_s == math.inf:
            store.wait([_BELL], _LONG)
        while not store.check([_BELL]):  # no wait with a time-out: each that expires fills torch's log
            if self._clock.now() >= due_s:
                return
            self._clock.sleep(_POLL_S)
        store.delete_key(_BELL)  # before the queues are looked into, so that no ring is missed

    def _sweep(self, store: TCPStore) -> bool:
        """Take some messages from each queue; return whether there may be more."""
        now_s, coordinator = self._clock.now(), self.coordinator
        while self._lost:
            coordinator.lose(self._lost.pop(0), now_s)
        is_busy = self._take(store, _JOIN, "one that asks to join", None)
        for rank, generation in coordinator.members.items():
            lane = self._seal.lane(rank, generation, way="up")
            if self._take(store, lane, f"replica {rank}", rank):
                is_busy = True
                if store.queue_len(lane) > LANE_LIMIT:
                    coordinator.refuse(f"replica {rank}", f"more than {LANE_LIMIT} messages at once")
                    coordinator.lose(rank, now_s, reason=Reason.FLOOD)
        return is_busy

    def _take(self, store: TCPStore, lane: str, whose: str, rank: int | None) -> bool:
        """Take some messages from one queue; return whether there may be more."""
        for _ in range(POPS):
            if store.queue_len(lane) == 0:
                return False
            self._read(store.queue_pop(lane, block=False), whose, rank)
        return True

    def _read(self, data: bytes, whose: str, rank: int | None) -> None:
        now_s, coordinator = self._clock.now(), self.coordinator
        try:
            record = self._seal.unpack(data, max_records=1)[0]
            if (record.kind is Kind.JOIN) != (rank is None) or rank not in (None, record.rank):
                raise RecordError(f"a {record.kind.name} of replica {record.rank} in the wrong queue")
        except RecordError as error:
            coordinator.refuse(whose, str(error))
            if rank is not None and len(data) > ONE_RECORD_BYTES:
                coordinator.lose(rank, now_s, reason=Reason.OVERSIZED)
            return
        coordinator.receive(record, now_s)

    def _queue(self, address: Address) -> str:
        if isinstance(address, bytes):
            return f"fastest/hello/{address.hex()}"
        return self._seal.lane(*address, way="down")


class StoreWire:
    """A member's side, and its connections to the other replicas.

    All workers of a replica make one; the first of them talks to the coordinator (`FastestGroup`).

    Args:
        address: "host:port" of the launcher's `ElectionHost`.
        rank: number of this replica.
        key: of the run, as the host has it.
        shard: this worker's place in its replica.
        silence_s: how long another replica is waited for when both connect.
        timeout_s: how long one is waited for in an exchange.
        start_s: how long the host is waited for.

    Raises:
        UserError: the host belongs to another run, or has another secret.
        WorkerLostError: the store does not answer.
    """

    def __init__(
        self,
        address: str,
        rank: int,
        key: RunKey,
        *,
        shard: int = 0,
        silence_s: float = 10.0,
        timeout_s: float = 60.0,
        start_s: float = 300.0,
    ) -> None:
        self.rank, self.generation, self.clock = rank, 0, WallClock()
        self._address, self._start_s = address, start_s
        self._digest, self._number = digest_of(key.run_id, key.fingerprint), 0
        with _answering(address):
            self._store = connect_store(address, timeout_s=start_s)
            self._inbox = connect_store(address, timeout_s=start_s)
            salt, proof = self._store.get(_SALT).decode(), self._store.get(_PROOF).decode()
        self._seal = Seal(digest_of(key.run_id, salt), secret=key.secret)
        if proof != self._seal.proof().hex():
            raise UserError(
                f"replica {rank} has another secret than the host at {address} (strategy.fastest."
                f"secret_file), or belongs to another run than {key.run_id!r}; give all the same"
            )
        self._links = Links(
            self._store, rank, shard=shard, clock=self.clock, connect_s=silence_s, timeout_s=timeout_s
        )

    def join(self, step: int) -> Record:
        """Ask to be let in with the parameters of a step, or -1 for none; return the ADMIT.

        Raises:
            UserError: the coordinator refuses.
            WorkerLostError: it does not answer.
        """
        nonce, self._number = token_bytes(TOKEN_BYTES), 0
        record = Record(kind=Kind.JOIN, rank=self.rank, step=step, nonce=nonce, digest=self._digest)
        self._push(_JOIN, record)
        self._inbox.set_timeout(timedelta(seconds=self._start_s))
        answer = self._pop(f"fastest/hello/{nonce.hex()}")[0]
        self._inbox.set_timeout(_LONG)
        if answer.kind is not Kind.ADMIT:
            raise UserError(f"replica {self.rank} is refused: {REASONS[answer.reason]}")
        self.generation = answer.generation
        return answer

    def send(self, record: Record) -> None:
        """Tell the coordinator something."""
        self._number += 1
        self._push(self._seal.lane(self.rank, self.generation, way="up"), self._own(record))

    def hear(self) -> list[Record]:
        """Wait for the coordinator's next message."""
        return self._pop(self._seal.lane(self.rank, self.generation, way="down"))

    def comm(self, members: Mapping[int, int], *, meeting: int) -> ElectedComm:
        """Connect with some replicas, who do the same.

        Args:
            members: generation by rank, with this replica among them.
            meeting: number of what they meet for.

        Raises:
            PeerLostError: one of them did not come.
        """
        self._links.open(members, meeting=meeting)
        return ElectedComm(self._links, sorted(members), replica=self.rank, meeting=meeting, clock=self.clock)

    def drop(self, *ranks: int) -> None:
        """Close the connections to some replicas, so that they notice at once."""
        self._links.drop(*ranks)

    def close(self) -> None:
        """Close all connections."""
        self._links.close()

    def _own(self, record: Record) -> Record:
        return replace(record, rank=self.rank, generation=self.generation, number=self._number)

    def _push(self, queue: str, record: Record) -> None:
        with _answering(self._address):
            self._store.queue_push(queue, self._seal.pack([record]))
            self._store.set(_BELL, "")

    def _pop(self, queue: str) -> list[Record]:
        while True:
            with _answering(self._address):
                data = self._inbox.queue_pop(queue)
            try:
                return self._seal.unpack(data)
            except RecordError as error:
                logger.warning("a message to replica %d is refused: %s", self.rank, error)


@contextmanager
def _answering(address: str) -> Iterator[None]:
    """Say what to check when the store is gone."""
    try:
        yield
    except RuntimeError as error:
        raise WorkerLostError(
            f"the store of the elections at {address} does not answer; check that the launcher which "
            f"holds it is alive, that host and port are right, and that no firewall is between. torch "
            f"says: {error}"
        ) from error
