"""The fastest k of n among simulated workers: the same coordinator and group, in virtual time.

Paper: none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from hardy.distributed.robust.coordinator import Address, Coordinator
from hardy.distributed.robust.election import Rules
from hardy.distributed.robust.election_log import Elected
from hardy.distributed.robust.records import TOKEN_BYTES, Kind, Record
from hardy.distributed.simulation import SimComm


@dataclass(eq=False)
class _Office:
    """The coordinator and what it has to say, as all simulated workers see it."""

    coordinator: Coordinator
    mail: dict[Address, list[list[Record]]] = field(default_factory=dict)

    def tick(self, now_s: float) -> None:
        """Decide, and put the answers where they are looked for."""
        self.coordinator.tick(now_s)
        for address, records in self.coordinator.take_mail():
            self.mail.setdefault(address, []).append(records)


class SimWire:
    """A simulated replica's side. A `Wire`.

    Args:
        comm: the replicas; for a replica of several workers, those with this one's place.
        rules: of elections.
        poll_s: virtual seconds between two looks for an answer.
        record_line: takes the log of elections.
        replay: who is elected at each step, instead of by arrival.
    """

    def __init__(
        self,
        comm: SimComm,
        *,
        rules: Rules,
        poll_s: float = 1e-3,
        record_line: Callable[[Elected], None] | None = None,
        replay: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        self.rank, self.generation, self.clock = comm.rank, 0, comm.clock
        self._comm, self._poll_s, self._number, self._joins = comm, poll_s, 0, 0
        if "fastest" not in comm.store:
            made = Coordinator(
                rules, replicas=comm.size, digest=bytes(TOKEN_BYTES), record_line=record_line, replay=replay
            )
            comm.store["fastest"] = _Office(made)
        self._office: _Office = comm.store["fastest"]

    @property
    def coordinator(self) -> Coordinator:
        """The one of all workers."""
        return self._office.coordinator

    def join(self, step: int) -> Record:
        """Ask to be let in with the parameters of a step, or -1 for none; return the ADMIT."""
        self._joins += 1
        self._number = 0
        nonce = f"{self.rank}.{self._joins}".encode().ljust(TOKEN_BYTES)
        record = Record(kind=Kind.JOIN, rank=self.rank, step=step, nonce=nonce)
        self.coordinator.receive(record, self.clock.now())
        admitted = self._next(nonce)[0]
        self.generation = admitted.generation
        return admitted

    def send(self, record: Record) -> None:
        """Tell the coordinator something."""
        self._number += 1
        own = replace(record, rank=self.rank, generation=self.generation, number=self._number)
        self.coordinator.receive(own, self.clock.now())
        self._office.tick(self.clock.now())

    def hear(self) -> list[Record]:
        """Wait for the coordinator's next message."""
        return self._next((self.rank, self.generation))

    def comm(self, members: Mapping[int, int], *, meeting: int) -> SimComm:
        """Return the communicator of some replicas."""
        return self._comm.among(sorted(members), name=f"meeting {meeting}")

    def drop(self, *ranks: int) -> None:
        """Nothing to close: who waits for one that died is told."""

    def close(self) -> None:
        """Nothing to close."""

    def _next(self, address: Address) -> list[Record]:
        office = self._office
        while True:
            now_s = self.clock.now()
            for rank in list(office.coordinator.members):
                if self._comm.is_lost(self._comm.ranks[rank]):
                    office.coordinator.lose(rank, now_s)
            office.tick(now_s)
            waiting = office.mail.get(address)
            if waiting:
                return waiting.pop(0)
            self.clock.sleep(self._poll_s)
