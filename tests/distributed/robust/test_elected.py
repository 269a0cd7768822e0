"""Collectives among some of the workers, by mail between two."""

import pytest
import torch

from hardy.clock import VirtualClock
from hardy.distributed.comm import PeerLostError, WorkerLostError
from hardy.distributed.robust.elected import SMALL_BYTES, ElectedComm
from hardy.distributed.simulation import SimWorld

MEMBERS = (1, 2, 4)


def among(body, *, members=MEMBERS, num_workers=5, **world):
    """Run `body` on the members of a world; the others end at once."""

    def work(comm):
        if comm.rank not in members:
            return None
        return body(ElectedComm(comm, members, replica=comm.rank, meeting=3, clock=comm.clock))

    results = SimWorld(num_workers, **world).run(work)
    return [results[rank] for rank in members]


def test_ranks_count_along_the_members():
    assert among(lambda comm: (comm.rank, comm.size, comm.replicas)) == [(i, 3, MEMBERS) for i in range(3)]


@pytest.mark.parametrize("numel", [1, 7, SMALL_BYTES // 4, SMALL_BYTES // 4 + 1, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_a_sum_is_that_of_the_members_and_the_same_bits_for_all(numel, dtype):
    values = [
        (torch.randn(numel, generator=torch.Generator().manual_seed(i)) * 9).to(dtype) for i in range(3)
    ]
    expected = values[0] + values[1] + values[2]
    sums = among(lambda comm: comm.sum(values[comm.rank].view(-1, 1)))
    assert all(torch.equal(got, expected.view(-1, 1)) for got in sums)


def test_mean_gather_rows_broadcast_and_barrier():
    x = torch.arange(6.0).view(3, 2)
    assert [m.tolist() for m in among(lambda comm: comm.mean(x[comm.rank]))] == [[2.0, 3.0]] * 3
    assert all(torch.equal(got, x) for got in among(lambda comm: comm.all_gather(x[comm.rank])))
    rows = among(lambda comm: comm.all_to_all(x + 10 * comm.rank))
    for receiver, got in enumerate(rows):
        assert torch.equal(got, torch.stack([x[receiver] + 10 * sender for sender in range(3)]))
    for source in range(3):
        sent = among(lambda comm, source=source: comm.broadcast(x[comm.rank], source=source))
        assert all(torch.equal(got, x[source]) for got in sent)
    assert among(lambda comm: comm.barrier()) == [None] * 3


def test_calls_follow_each_other_without_mixing():
    def body(comm):
        return [comm.sum(torch.tensor(float(i * (comm.rank + 1)))).item() for i in range(20)]

    assert among(body) == [[6.0 * i for i in range(20)]] * 3


def test_results_are_new_and_inputs_stay():
    def body(comm):
        x = torch.ones(2000, requires_grad=True)
        before = x.detach().clone()
        for result in (comm.sum(x), comm.mean(x), comm.all_gather(x), comm.broadcast(x, source=comm.rank)):
            assert not result.requires_grad
            result += 1
        assert torch.equal(x, before)

    among(body, members=(1,))


def test_one_alone_is_a_group_too():
    x = torch.randn(3000)
    assert torch.equal(among(lambda comm: comm.sum(x), members=(2,))[0], x)
    assert among(lambda comm: comm.bytes_sent, members=(2,)) == [0]


def test_a_sum_sends_what_a_ring_would():
    def body(comm):
        comm.sum(torch.zeros(3000))
        return comm.bytes_sent

    assert among(body) == [2 * 2 * 1000 * 4] * 3


def test_a_member_that_dies_is_named():
    def body(comm):
        if comm.replicas[comm.rank] == 4:
            comm.clock.sleep(5.0)
        with pytest.raises(PeerLostError) as error:
            comm.sum(torch.zeros(3000))
        return error.value.peer

    assert among(body, deaths={4: 1.0}) == [4, 4, None]


def test_what_all_worlds_refuse_is_refused():
    def body(comm):
        with pytest.raises(ValueError, match="workers cannot add up torch.bool"):
            comm.sum(torch.ones(2, dtype=torch.bool))
        with pytest.raises(ValueError, match="the mean of torch.int64"):
            comm.mean(torch.ones(2, dtype=torch.int64))
        with pytest.raises(ValueError, match="one row for each of the 3 workers"):
            comm.all_to_all(torch.ones(2))
        with pytest.raises(ValueError, match="broadcast source must be a rank from 0 to 2"):
            comm.broadcast(torch.ones(2), source=4)

    among(body)


def test_meetings_have_tags_of_their_own():
    class Heard:
        def __init__(self):
            self.tags = []

        def post(self, x, *, to, tag):
            self.tags.append(tag)

        def take(self, like, *, source, tag):
            raise WorkerLostError("nobody is there")

    tags = []
    for meeting in (1, 2, 4095, 4096 + 1):
        mail = Heard()
        comm = ElectedComm(mail, (0, 1), replica=0, meeting=meeting, clock=VirtualClock())
        for _ in range(2):
            with pytest.raises(WorkerLostError):
                comm.all_gather(torch.ones(1))
        tags.append(mail.tags)
    assert tags[0] == tags[3] and len({tag for pair in tags[:3] for tag in pair}) == 6
    assert max(tag for pair in tags for tag in pair) < 2**31
