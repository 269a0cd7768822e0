"""The coordinator, told by hand: elections, losses, repeats, catching up, the end."""

import math

import pytest

from hardy.distributed.robust.admission import NO_STATE
from hardy.distributed.robust.coordinator import MAX_TRIES, Coordinator
from hardy.distributed.robust.election import Rules
from hardy.distributed.robust.records import Kind, Reason, Record

DIGEST = b"d" * 16


class Office:
    """A coordinator and its members' letters."""

    def __init__(self, rules, *, replicas=4, at=0, join=True, **settings):
        self.lines = []
        self.coordinator = Coordinator(
            rules, replicas=replicas, digest=DIGEST, record_line=self.lines.append, **settings
        )
        self.now_s, self.nonces, self.numbers, self.generations = 100.0, 0, {}, {}
        self.mail = {}
        if join:
            for rank in range(replicas):
                self.join(rank, at=at)

    def join(self, rank, *, at=0, **changes):
        self.nonces += 1
        nonce = self.nonces.to_bytes(16, "big")
        record = Record(
            **{"kind": Kind.JOIN, "rank": rank, "step": at, "nonce": nonce, "digest": DIGEST} | changes
        )
        self.coordinator.receive(record, self.now_s)
        self.tick()
        answer = self.mail.pop(record.nonce, [[None]])[0][0]
        if answer is not None and answer.kind is Kind.ADMIT:
            self.generations[rank], self.numbers[rank] = answer.generation, 0
        return answer

    def say(self, kind, rank, *, after_s=0.0, **values):
        self.now_s += after_s
        self.numbers[rank] += 1
        about = {"rank": rank, "generation": self.generations[rank], "number": self.numbers[rank]}
        record = Record(**({"kind": kind} | about | values))
        self.coordinator.receive(record, self.now_s)
        self.tick()
        return record

    def ready(self, *ranks, step=0, **values):
        for rank in ranks:
            self.say(Kind.ANNOUNCE, rank, **({"step": step, "made_at": step} | values))

    def done(self, *ranks, number, kind=Kind.DONE, peer=-1):
        for rank in ranks:
            self.say(kind, rank, attempt=number, peer=peer)

    def tick(self, after_s=0.0):
        self.now_s += after_s
        self.coordinator.tick(self.now_s)
        for address, records in self.coordinator.take_mail():
            self.mail.setdefault(address, []).append(records)

    def heard(self, rank, generation=None):
        """Return what this member was told since last asked: kinds, and the records."""
        told = self.mail.pop((rank, generation or self.generations.get(rank)), [])
        return [[record.kind.name for record in records] for records in told], told

    def step(self, *ranks, step):
        """Do a whole step of these, of whom k are elected; return the number of the attempt."""
        self.ready(*ranks, step=step)
        number = 0
        for rank in ranks:
            kinds, told = self.heard(rank)
            if kinds and kinds[-1][0] == "GO":
                number = told[-1][0].attempt
        elected = [rank for rank in ranks if rank in self.coordinator._attempt.elected]
        self.done(*elected, number=number)
        return number


def test_a_step_from_announcement_to_commit():
    office = Office(Rules(k=2))
    office.ready(3, loss=1.5)
    assert office.heard(3)[0] == []
    office.ready(1, square=4.0)
    (kinds,), ((go, *announced),) = office.heard(3)
    assert kinds == ["GO", "ANNOUNCE", "ANNOUNCE"] and go.step == 0
    assert [(record.rank, record.generation) for record in announced] == [(1, 1), (3, 1)]
    assert (announced[1].loss, announced[0].square) == (1.5, 4.0)
    assert office.heard(1)[0] == [kinds] and office.heard(0)[0] == []
    office.done(1, number=go.attempt)
    assert office.heard(1)[0] == []
    office.done(3, number=go.attempt)
    for rank in (1, 3):
        assert office.heard(rank)[0] == [["COMMIT", "COUNTS"]]
    (line,) = office.lines
    assert (line.step, line.elected, line.attempts, list(line.offsets_s)) == (0, (1, 3), 1, [3, 1])


def test_one_that_comes_after_the_election_takes_the_state_of_the_next_step():
    office = Office(Rules(k=2))
    office.ready(0, 1, 2)
    number = office.heard(0)[1][0][0].attempt
    assert office.coordinator.counts["late"] == 1 and office.heard(2)[0] == []
    office.done(0, 1, number=number)
    (take,) = office.heard(2)[1][0]
    (told,) = office.heard(take.peer)[1][-1:]
    give = told[-1]
    assert (take.kind, take.step, give.kind, give.step) == (Kind.TAKE, 1, Kind.GIVE, 1)
    assert (take.rank, take.peer, give.rank, give.peer) == (2, give.rank, take.peer, 2)
    assert take.attempt == give.attempt != number
    assert {take.generation, take.peer_generation, give.generation, give.peer_generation} == {1}
    office.ready(2, step=1)  # it is at the next step with all others
    assert office.coordinator.counts["refused"] == 0 and office.coordinator._election.arrived.keys() == {2}


def test_one_that_is_late_by_steps_is_served_at_the_next_boundary():
    office = Office(Rules(k=2))
    for step in range(3):
        office.step(0, 1, step=step)
    office.heard(0), office.heard(1)
    office.ready(3, step=0)
    assert office.heard(3)[0] == [] and office.coordinator.counts["late"] == 1
    office.ready(3, step=0)  # again, while it waits
    assert office.coordinator.counts["duplicates"] == 1
    office.step(0, 1, step=3)
    assert office.heard(3)[1][0][0].step == 4


def test_helpers_are_used_in_turn():
    office = Office(Rules(k=2), replicas=5)
    office.ready(0, 1, 2, 3, 4)
    office.done(0, 1, number=office.heard(0)[1][0][0].attempt)
    peers = [office.heard(rank)[1][0][0].peer for rank in (2, 3, 4)]
    assert peers == [0, 1, 0]


def test_repeats_old_steps_and_strangers_are_ignored_and_counted():
    office = Office(Rules(k=3))
    office.ready(0)
    record = office.say(Kind.ANNOUNCE, 0, step=0, made_at=0)
    office.coordinator.receive(record, office.now_s)  # the same bytes once more
    assert office.coordinator.counts["duplicates"] == 2
    office.say(Kind.ANNOUNCE, 1, step=1, made_at=1)
    office.say(Kind.GO, 1)
    office.coordinator.receive(Record(kind=Kind.ANNOUNCE, rank=2, generation=9, number=1), office.now_s)
    office.coordinator.receive(Record(kind=Kind.ANNOUNCE, rank=9, generation=1, number=1), office.now_s)
    assert office.coordinator.counts["refused"] == 4
    office.ready(1, 2)
    assert office.heard(1)[0][0][0] == "GO"
    assert set(office.coordinator._attempt.elected) == {0, 1, 2}


def test_a_replayed_record_changes_nothing_though_it_was_good_once():
    office = Office(Rules(k=2))
    asked = office.say(Kind.ASK, 0)
    office.step(1, 2, step=0)
    office.heard(0)
    office.coordinator.receive(asked, office.now_s)
    assert office.coordinator.counts["duplicates"] == 1
    assert office.coordinator._seats[0].at == 1  # else it would be handed the state once more


def test_an_announcement_for_a_step_before_the_own_is_late_and_costs_nothing():
    office = Office(Rules(k=2))
    office.step(0, 1, step=0)
    office.ready(0, step=0)
    assert office.coordinator.counts["late"] == 1
    office.step(0, 1, step=1)
    assert len(office.lines) == 2


def test_a_stale_gradient_is_late_or_dampened():
    office = Office(Rules(k=2))
    office.step(0, 1, step=0)
    office.say(Kind.ANNOUNCE, 0, step=1, made_at=0)
    assert office.coordinator.counts["late"] == 1 and 0 not in office.coordinator._election.arrived
    office = Office(Rules(k=2, takes_late=True))
    office.step(0, 1, step=0)
    office.say(Kind.ANNOUNCE, 0, step=1, made_at=0)
    office.say(Kind.ANNOUNCE, 1, step=1, made_at=1)
    announced = office.heard(0)[1][-1][1:]
    assert [record.made_at for record in announced] == [0, 1]


def test_nothing_is_elected_before_the_founders_have_come():
    office = Office(Rules(k=1), replicas=3, join=False)
    office.join(0)
    office.ready(0)
    office.join(1)
    assert office.coordinator._attempt is None
    office.coordinator.lose(2, office.now_s)  # the launcher has seen it end
    office.tick(after_s=5.0)
    assert set(office.coordinator._attempt.elected) == {0}
    assert office.coordinator._election.offsets_s == {0: 0.0}


def test_one_that_founds_with_another_step_or_none_takes_the_state():
    office = Office(Rules(k=2), replicas=4, join=False)
    assert office.join(0, at=7).step == 7
    assert office.join(1, at=7).step == 7
    assert office.join(2, at=3).step == NO_STATE
    assert office.join(3, at=NO_STATE).step == NO_STATE
    office.ready(0, 1, step=7)
    office.done(0, 1, number=office.heard(0)[1][0][0].attempt)
    assert [office.heard(rank)[1][0][0].step for rank in (2, 3)] == [8, 8]


def test_a_run_in_which_nobody_has_state_ends():
    office = Office(Rules(k=2), replicas=2, join=False)
    office.join(0, at=NO_STATE)
    office.join(1, at=NO_STATE)
    assert office.heard(0)[1][0][0].reason is Reason.NO_STATE


@pytest.mark.parametrize(
    ("rank", "changes", "reason"),
    [(0, {"digest": b"e" * 16}, Reason.SETTINGS), (7, {}, Reason.NUMBER), (-1, {}, Reason.NUMBER)],
)
def test_who_does_not_belong_is_refused_with_the_reason(rank, changes, reason):
    office = Office(Rules(k=2))
    answer = office.join(rank, **changes)
    assert (answer.kind, answer.reason) == (Kind.REFUSE, reason)
    assert office.coordinator.counts["refused"] == 1 and len(office.coordinator.members) == 4


def test_a_replayed_join_changes_nothing():
    office = Office(Rules(k=2))
    assert office.join(1, nonce=(1).to_bytes(16, "big")) is None
    assert office.coordinator.members[1] == 1 and office.coordinator.counts["duplicates"] == 1


def test_a_failed_attempt_is_tried_again_without_the_lost():
    office = Office(Rules(k=3, least=2, silence_s=2.0))
    office.ready(0, 1, 2)
    first = office.heard(0)[1][0][0].attempt
    office.done(0, number=first, kind=Kind.FAILED, peer=1)
    office.done(2, number=first)
    assert office.coordinator.due_s(office.now_s) == office.now_s + 2.0
    office.tick(after_s=1.9)
    assert office.heard(0)[0] == []
    office.tick(after_s=0.1)
    assert office.heard(0)[0] == office.heard(2)[0][-1:] == [["RETRY"]]
    assert office.heard(1)[1][-1][0].reason is Reason.SILENT
    assert office.coordinator.counts["lost"] == 1 and office.coordinator.members.keys() == {0, 2, 3}
    office.ready(3)  # the next to come takes its place, without the others' announcing again
    second = office.heard(0)[1][0][0].attempt
    assert second > first
    office.done(0, number=first)  # of the attempt that is over
    assert office.coordinator._attempt.answers == {}
    office.done(0, 2, 3, number=second)
    assert office.lines[0].elected == (0, 2, 3) and office.lines[0].attempts == 2
    assert office.coordinator.counts["reelections"] == 1


def test_a_loss_that_is_reported_is_not_waited_for():
    office = Office(Rules(k=3, silence_s=1e9))
    office.ready(0, 1, 2)
    number = office.heard(0)[1][0][0].attempt
    office.done(0, number=number, kind=Kind.FAILED, peer=1)
    office.done(2, number=number, kind=Kind.FAILED, peer=0)
    office.coordinator.lose(1, office.now_s)
    office.tick()
    assert office.heard(0)[0] == [["RETRY"]]


def test_one_that_dies_when_the_others_have_the_result_does_not_undo_it():
    office = Office(Rules(k=3, silence_s=2.0))
    office.ready(0, 1, 2)
    office.done(0, 2, number=office.heard(0)[1][0][0].attempt)
    office.tick(after_s=2.0)
    assert office.heard(0)[0] == [["COMMIT", "COUNTS"]] and office.lines[0].elected == (0, 1, 2)
    assert office.coordinator.counts["lost"] == 1 and office.coordinator.counts["reelections"] == 0


def test_all_or_nothing_one_failure_undoes_the_others():
    office = Office(Rules(k=3))
    office.ready(0, 1, 2)
    number = office.heard(0)[1][0][0].attempt
    office.done(0, 1, number=number)
    office.done(2, number=number, kind=Kind.FAILED, peer=0)
    assert office.lines == []
    assert [kinds[0] for kinds in office.heard(0)[0]] == ["RETRY", "GO"]


def test_one_that_answers_but_cannot_be_reached_is_left_out():
    office = Office(Rules(k=3))
    office.ready(0, 1, 2)
    for _ in range(MAX_TRIES):
        number = office.coordinator._attempt.number
        office.done(0, 2, number=number, kind=Kind.FAILED, peer=1)
        office.done(1, number=number, kind=Kind.FAILED, peer=0)
    assert office.coordinator.members.keys() == {0, 2, 3}
    assert office.heard(1)[1][-1][0].reason is Reason.UNREACHABLE


def test_when_too_few_hold_the_state_one_that_waits_hands_it_out_before_the_step():
    office = Office(Rules(k=3))
    office.step(0, 1, 2, step=0)
    for rank in range(4):
        office.heard(rank)
    office.coordinator.lose(2, office.now_s)
    office.ready(3, step=0)  # late, and without it nobody can go on
    assert office.heard(3)[0] == []
    office.ready(0, step=1)
    (give,), (take,) = office.heard(0)[1][0], office.heard(3)[1][0]
    assert (give.kind, give.step, take.kind, take.step) == (Kind.GIVE, 1, Kind.TAKE, 1)
    office.ready(1, 3, step=1)
    assert [kinds[0] for kinds in office.heard(0)[0]] == ["GO"]


def test_one_that_could_not_take_asks_again():
    office = Office(Rules(k=2))
    office.ready(0, 1, 2)
    office.done(0, 1, number=office.heard(0)[1][0][0].attempt)
    assert office.heard(2)[0] == [["TAKE"]]
    office.say(Kind.ASK, 2)
    office.step(0, 1, step=1)
    assert office.heard(2)[1][0][0].step == 2


def test_a_replica_that_begins_anew_takes_the_place_of_what_it_was():
    office = Office(Rules(k=2))
    office.step(0, 1, step=0)
    answer = office.join(0, at=0)
    assert (answer.generation, answer.step) == (2, NO_STATE)
    assert office.heard(0, generation=1)[1][-1][0].reason is Reason.REPLACED
    office.coordinator.receive(Record(kind=Kind.ANNOUNCE, rank=0, generation=1, number=50), office.now_s)
    assert office.coordinator.counts["refused"] == 1


def test_one_that_floods_is_not_let_in_again():
    office = Office(Rules(k=2))
    office.coordinator.lose(0, office.now_s, reason=Reason.FLOOD)
    assert office.join(0).reason is Reason.FLOOD


def test_those_who_have_finished_serve_until_all_have():
    office = Office(Rules(k=2, finish_s=30.0))
    for step in range(2):
        office.step(0, 1, step=step)
    for rank in (0, 1):
        office.heard(rank)
        office.say(Kind.FINISH, rank, step=2)
    office.ready(2, step=0)
    assert office.heard(2)[1][0][0].step == 2
    office.say(Kind.FINISH, 2, step=2)
    assert not office.coordinator.has_ended
    assert office.coordinator.due_s(office.now_s) == 130.0
    office.tick(after_s=30.0)  # replica 3 does not come
    assert office.coordinator.has_ended
    assert [office.heard(rank)[1][-1][0].reason for rank in range(4)] == [Reason.NONE] * 3 + [Reason.SILENT]
    office.ready(0, step=2)
    assert office.heard(0)[0] == []


def test_a_run_ends_at_once_when_all_have_finished():
    office = Office(Rules(k=2), replicas=2)
    office.step(0, 1, step=0)
    office.heard(0)
    office.say(Kind.FINISH, 0, step=1)
    assert not office.coordinator.has_ended
    office.say(Kind.FINISH, 1, step=1)
    assert office.coordinator.has_ended and office.heard(0)[1][-1][0].kind is Kind.END


def test_a_shortfall_that_is_an_error_ends_the_run():
    office = Office(Rules(k=3, patience_s=5.0, on_shortfall="error"))
    office.ready(0)
    office.tick(after_s=4.9)
    assert office.heard(0)[0] == []
    office.tick(after_s=0.1)
    assert office.heard(0)[1][0][0].reason is Reason.SHORTFALL and office.coordinator.has_ended


def test_time_alone_is_due_only_when_it_can_decide():
    office = Office(Rules(k=2))
    assert office.coordinator.due_s(office.now_s) == math.inf
    office = Office(Rules(k=2, patience_s=5.0, on_shortfall="shrink"))
    assert office.coordinator.due_s(office.now_s) == 105.0
    office.tick(after_s=6.0)
    assert office.coordinator.due_s(office.now_s) == math.inf  # else its thread would never rest


def test_starved_replicas_are_named_once_and_waited_for_when_asked(caplog):
    office = Office(Rules(k=2, starve_limit=3), replicas=3)
    for step in range(5):
        office.step(0, 1, step=step)
    assert caplog.text.count("replica 2 was not among the first for 3 steps in a row") == 1
    counts = office.heard(0)[1][-1][1]
    assert counts.peer == 1
    office = Office(Rules(k=2, starve_limit=2, include_starved=True, patience_s=50.0), replicas=3)
    for step in range(2):
        office.ready(0, 1, 2, step=step)
        number = office.coordinator._attempt.number
        office.done(0, 1, number=number)
    office.ready(0, 1, step=2)
    assert office.coordinator._attempt is None  # replica 2 has the state by now, and is waited for once
    office.ready(2, step=2)
    assert set(office.coordinator._attempt.elected) == {0, 1, 2}


def test_a_log_is_replayed_whoever_is_first(caplog):
    caplog.set_level("INFO")
    office = Office(Rules(k=2), replay={0: (1, 3), 1: (2, 3)})
    office.ready(0, 1, 2)
    assert office.coordinator._attempt is None
    office.ready(3)
    assert set(office.coordinator._attempt.elected) == {1, 3}
    office.done(1, 3, number=office.coordinator._attempt.number)
    office.ready(1, 3, 2, step=1)
    assert set(office.coordinator._attempt.elected) == {2, 3}
    office.done(2, 3, number=office.coordinator._attempt.number)
    assert "step 2 is not in the log that is replayed" in caplog.text
    office.ready(3, 1, step=2)
    assert set(office.coordinator._attempt.elected) == {1, 3}


def test_refusals_are_logged_ever_more_rarely(caplog):
    office = Office(Rules(k=2))
    for _ in range(1000):
        office.coordinator.refuse("one", "nonsense")
    assert office.coordinator.counts["refused"] == 1000
    assert caplog.text.count("of one that is refused: nonsense") == 10


def test_one_that_leaves_is_not_lost():
    office = Office(Rules(k=2))
    office.say(Kind.LEAVE, 3)
    assert office.coordinator.counts["lost"] == 0 and 3 not in office.coordinator.members


def test_one_that_is_elected_alone_and_falls_silent_is_not_waited_for_for_ever():
    office = Office(Rules(k=1, silence_s=2.0, finish_s=10.0), replicas=3)
    office.ready(0, 1)
    assert office.heard(0)[0][-1] == ["GO", "ANNOUNCE"]
    assert office.coordinator.due_s(office.now_s) == office.now_s + 12.0
    office.tick(after_s=11.9)
    assert 0 in office.coordinator.members
    office.tick(after_s=0.2)
    assert 0 not in office.coordinator.members and office.heard(0, 1)[0] == [["OUT"]]
    assert office.heard(1)[0][-1] == ["GO", "ANNOUNCE"]
    office.coordinator.lose(2, office.now_s)
    assert office.coordinator.due_s(office.now_s) == math.inf  # nobody else is left who could go on


def test_strangers_of_any_number_fill_neither_log_nor_memory(caplog):
    office = Office(Rules(k=2), replicas=3)
    for number in range(1000):
        assert office.join(100 + number).reason is Reason.NUMBER
        assert office.join(number % 3, digest=b"other".ljust(16)).reason is Reason.SETTINGS
    assert office.coordinator.counts["refused"] == 2000 and len(caplog.records) == 11  # 1, 2, 4, ... 1024
    assert len(office.coordinator._refused) == 1 and len(office.coordinator._admission._nonces) == 3
