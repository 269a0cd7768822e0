"""What every Communicator promises: the same bodies run alone, simulated and through torch.distributed."""

import importlib.util
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hardy.distributed import costs
from hardy.distributed.comm import Alone
from hardy.distributed.gloo import GlooComm
from hardy.distributed.groups import FixedGroup, SimGroup, split
from hardy.distributed.simulation import SimWorld

spec = importlib.util.spec_from_file_location("mp_conftest", Path(__file__).parents[1] / "mp" / "conftest.py")
processes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(processes)
run_workers = processes.run_workers

DIVISIBLE = [
    pytest.param(("alone", 1), id="alone"),
    pytest.param(("simulated", 3), id="simulated-3"),
    pytest.param(("torch", 1), id="gloo-1", marks=pytest.mark.mp),
    pytest.param(("torch", 3), id="gloo-3", marks=pytest.mark.mp),
]
WORLDS = [
    *DIVISIBLE,
    pytest.param(("part of a simulated world", 3), id="simulated-3-of-4"),
    pytest.param(("part of a torch world", 2), id="gloo-2-of-3", marks=pytest.mark.mp),
    pytest.param(("fixed group", 3), id="fixed-group-3"),
    pytest.param(("simulated elastic group", 3), id="simulated-group-3"),
    pytest.param(("group of no world", 3), id="bare-gloo-3", marks=pytest.mark.mp),
]
DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.int64,
    torch.uint8,
]
ANY_DTYPES = [*DTYPES, torch.bool, torch.int16, torch.float8_e4m3fn]


def enter(request):
    """Return `run(body)` of a world; it returns what each worker's body returned."""
    kind, size = request.param
    if kind == "alone":
        return lambda body: [body(Alone())]
    if kind == "simulated":
        return SimWorld(size).run
    if kind == "part of a simulated world":
        return lambda body: SimWorld(size + 1).run(lambda comm: in_part(body, comm))[:size]
    if kind == "fixed group":
        return lambda body: SimWorld(size).run(lambda comm: body(FixedGroup(comm)))
    if kind == "simulated elastic group":
        return lambda body: SimWorld(size).run(lambda comm: body(SimGroup(comm, founders=size)))
    in_processes = request.getfixturevalue("run_workers")
    if kind == "part of a torch world":
        return lambda body: in_processes(lambda comm: in_part(body, comm), size=size + 1)[:size]
    if kind == "group of no world":
        new_folder = request.getfixturevalue("tmp_path_factory").mktemp
        return lambda body: in_bare_group(body, in_processes, new_folder("bare") / "store", size)
    return lambda body: in_processes(body, size=size)


def in_part(body, comm):
    """Run the body in a group of all workers but the last."""
    part = comm.divide([range(comm.size - 1), [comm.size - 1]])
    return body(part) if comm.rank < comm.size - 1 else None


def in_bare_group(body, in_processes, path, size):
    """Run the body in gloo groups that torch.distributed does not know of."""

    def inside(comm):
        group = dist.ProcessGroupGloo(dist.FileStore(str(path), size), comm.rank, size, timedelta(seconds=30))
        return body(GlooComm(group, clock=comm.clock, whose=f"{size} processes"))

    return in_processes(inside, size=size)


@pytest.fixture(params=WORLDS)
def world(request):
    return enter(request)


@pytest.fixture(params=DIVISIBLE)
def divisible_world(request):
    return enter(request)


def of_rank(rank, dtype=torch.float64):
    """A tensor that tells who sent it; small numbers, exact in every dtype."""
    return (torch.arange(6).reshape(2, 3) % 2 + rank).to(dtype)


def of_rows(comm):
    """One row for each worker."""
    return torch.stack([of_rank(comm.rank)] * comm.size)


def test_ranks_count_from_zero(world):
    answers = world(lambda comm: (comm.rank, comm.size))
    assert answers == [(rank, len(answers)) for rank in range(len(answers))]


def test_sum_adds_everyone_in_every_summable_dtype(world):
    answers = world(lambda comm: [comm.sum(of_rank(comm.rank, dtype)) for dtype in DTYPES])
    for per_dtype in answers:
        for dtype, got in zip(DTYPES, per_dtype, strict=True):
            want = sum(of_rank(rank).long() for rank in range(len(answers)))
            assert got.dtype == dtype and torch.equal(got, want.to(dtype))


def test_mean_is_the_sum_over_the_size(world):
    answers = world(lambda comm: comm.mean(of_rank(comm.rank)))
    want = sum(of_rank(rank) for rank in range(len(answers))) / len(answers)
    for got in answers:
        torch.testing.assert_close(got, want, rtol=1e-15, atol=0)


def test_all_gather_stacks_in_rank_order_in_any_dtype(world):
    answers = world(lambda comm: [comm.all_gather(of_rank(comm.rank, dtype)) for dtype in ANY_DTYPES])
    for per_dtype in answers:
        for dtype, got in zip(ANY_DTYPES, per_dtype, strict=True):
            want = torch.stack([of_rank(rank, dtype).view(torch.uint8) for rank in range(len(answers))])
            assert got.dtype == dtype and torch.equal(got.view(torch.uint8), want)


def test_all_to_all_turns_the_table_of_who_sends_what_to_whom_in_any_dtype(world):
    def body(comm):
        rows = [of_rank(10 * comm.rank + receiver) for receiver in range(comm.size)]
        return [comm.all_to_all(torch.stack(rows).to(dtype)) for dtype in ANY_DTYPES]

    answers = world(body)
    for receiver, per_dtype in enumerate(answers):
        for dtype, got in zip(ANY_DTYPES, per_dtype, strict=True):
            rows = [of_rank(10 * sender + receiver) for sender in range(len(answers))]
            want = torch.stack(rows).to(dtype)
            assert got.dtype == dtype and torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_broadcast_gives_the_sources_value_in_any_dtype(world):
    def body(comm):
        source = comm.size - 1
        return [comm.broadcast(of_rank(comm.rank, dtype), source=source) for dtype in ANY_DTYPES]

    answers = world(body)
    for per_dtype in answers:
        for dtype, got in zip(ANY_DTYPES, per_dtype, strict=True):
            want = of_rank(len(answers) - 1, dtype)
            assert got.dtype == dtype and torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_scalars_empty_and_strided_tensors_travel(world):
    def body(comm):
        transposed = of_rank(comm.rank).t()
        results = [comm.sum(x) for x in (torch.tensor(1.0), torch.zeros(0, 3), transposed)]
        gathered = [comm.all_gather(x) for x in (torch.tensor(1.0), torch.zeros(0, 3), transposed)]
        sent = [comm.broadcast(x, source=0) for x in (torch.tensor(1.0), torch.zeros(0, 3), transposed)]
        turned = [comm.all_to_all(torch.zeros(comm.size, 0)), comm.all_to_all(of_rows(comm).mT)]
        assert [list(x.shape) for x in turned] == [[comm.size, 0], [comm.size, 3, 2]]
        assert torch.equal(turned[1].mT[comm.rank], of_rows(comm)[comm.rank])
        return [list(x.shape) for x in results + gathered + sent], float(results[0]), results[2]

    answers = world(body)
    size = len(answers)
    for shapes, total, added in answers:
        assert shapes == [[], [0, 3], [3, 2], [size], [size, 0, 3], [size, 3, 2], [], [0, 3], [3, 2]]
        assert total == size
        assert torch.equal(added, sum(of_rank(rank).t() for rank in range(size)))


def test_inputs_stay_and_results_are_new_and_outside_autograd(world):
    def body(comm):
        x = of_rank(comm.rank).requires_grad_()
        results = [comm.sum(x), comm.mean(x), comm.all_gather(x), comm.broadcast(x, source=0)]
        rows = of_rows(comm).requires_grad_()
        results.append(comm.all_to_all(rows))
        for result in results:
            result.fill_(99.0)
        comm.barrier()
        same = torch.equal(x, of_rank(comm.rank)) and torch.equal(rows, of_rows(comm))
        return same, [result.requires_grad for result in results]

    assert all(answer == (True, [False] * 5) for answer in world(body))


def test_bytes_sent_follow_the_ring_formulas(world):
    def body(comm):
        counts = [comm.bytes_sent]
        for call in (
            comm.sum,
            comm.mean,
            comm.all_gather,
            lambda x: comm.broadcast(x, source=0),
            lambda _: comm.barrier(),
            lambda x: comm.all_to_all(x.expand(comm.size, 10)),
        ):
            call(torch.zeros(10, dtype=torch.float32))
            counts.append(comm.bytes_sent)
        return counts

    answers = world(body)
    n = len(answers)
    steps = [
        costs.all_reduce(40, n),
        costs.all_reduce(40, n),
        costs.all_gather(40, n),
        costs.broadcast(40, n),
    ]
    want = [0]
    for traffic in [*steps, costs.barrier(n), costs.all_to_all(40 * n, n)]:
        want.append(want[-1] + traffic.bytes_sent)
    assert all(answer == want for answer in answers)


def test_what_one_world_cannot_do_all_refuse(world):
    def body(comm):
        refusals = []
        for call in (
            lambda: comm.sum(torch.ones(2, dtype=torch.bool)),
            lambda: comm.mean(torch.ones(2, dtype=torch.int64)),
            lambda: comm.broadcast(torch.ones(2), source=comm.size),
            lambda: comm.all_to_all(torch.ones(comm.size + 1, 2)),
            lambda: comm.all_to_all(torch.tensor(1.0)),
        ):
            with pytest.raises(ValueError) as refusal:
                call()
            refusals.append(str(refusal.value))
        return refusals

    for cannot_add, no_mean, no_source, rows, no_rows in world(body):
        assert cannot_add.startswith("workers cannot add up torch.bool; convert to one of bfloat16, ")
        assert no_mean.startswith("the mean of torch.int64 over the workers is no torch.int64; use sum")
        assert no_source.startswith("broadcast source must be a rank from 0 to ")
        assert rows.startswith("all_to_all needs one row for each of the ") and no_rows.endswith("shape []")


def test_clocks_run_forward(world):
    def body(comm):
        before_s = comm.clock.now()
        comm.clock.sleep(0.001)
        return comm.clock.now() - before_s

    assert all(passed_s >= 0.001 for passed_s in world(body))


POSTAL = [param for param in WORLDS if "group" not in param.id or param.id == "bare-gloo-3"]
"""The worlds with mail: groups of replicas that come and go have none."""


@pytest.fixture(params=[param for param in POSTAL if param.values[0][1] > 1])
def postal_world(request):
    return enter(request)


@pytest.fixture(params=[param for param in POSTAL if param.values[0][1] == 1])
def lonely_world(request):
    return enter(request)


def test_mail_goes_around_in_any_dtype_and_shape_and_with_tags_out_of_order(postal_world):
    def body(comm):
        following, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        for tag, dtype in enumerate(ANY_DTYPES):
            comm.post(of_rank(comm.rank, dtype).t(), to=following, tag=tag)
        comm.post(torch.tensor(2.5 + comm.rank), to=following, tag=50)
        comm.post(torch.zeros(0, 3), to=following, tag=51)
        shapes = [comm.take(torch.zeros(0, 3), source=before, tag=51).shape]
        number = comm.take(torch.tensor(0.0), source=before, tag=50)
        taken = [
            comm.take(torch.empty(3, 2, dtype=dtype), source=before, tag=tag)
            for tag, dtype in reversed(list(enumerate(ANY_DTYPES)))
        ]
        comm.finish_posts()
        return before, shapes, number, taken[::-1]

    for before, shapes, number, taken in postal_world(body):
        assert shapes == [(0, 3)] and number.item() == 2.5 + before and number.shape == ()
        for dtype, got in zip(ANY_DTYPES, taken, strict=True):
            want = of_rank(before, dtype).t().contiguous()
            assert got.dtype == dtype and torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_posts_with_one_tag_are_taken_in_their_order_and_hold_what_was_posted(postal_world):
    def body(comm):
        peers = [rank for rank in range(comm.size) if rank != comm.rank]
        for size in (3, 300_000):
            x = torch.full((size,), float(comm.rank), requires_grad=True)
            for _ in range(3):
                for peer in peers:
                    comm.post(x, to=peer, tag=7)
                x = (x.detach() + 10.0).requires_grad_()
            with torch.no_grad():
                x.fill_(-1.0)
            seen = [
                (peer, round_, comm.take(torch.empty(size), source=peer, tag=7))
                for round_ in range(3)
                for peer in peers
            ]
            for peer, round_, got in seen:
                assert torch.equal(got, torch.full((size,), peer + 10.0 * round_))
                assert not got.requires_grad
                got.zero_()
            comm.finish_posts()
        return comm.bytes_sent

    answers = postal_world(body)
    n = len(answers)
    assert answers == [(n - 1) * 3 * 4 * (3 + 300_000)] * n


def test_mail_with_nobody_is_refused(postal_world):
    def body(comm):
        refusals = []
        for peer in (comm.rank, comm.size, -1):
            for call in (comm.post, comm.take):
                key = "to" if call == comm.post else "source"
                with pytest.raises(ValueError, match="has mail with another rank from 0 to") as refusal:
                    call(torch.ones(2), **{key: peer}, tag=0)
                refusals.append(str(refusal.value))
        return refusals, comm.bytes_sent

    for rank, (refusals, sent) in enumerate(postal_world(body)):
        assert refusals[0].startswith(f"worker {rank} has mail") and sent == 0 and len(refusals) == 6


def test_a_lonely_worker_has_no_mail(lonely_world):
    def body(comm):
        for call, key in ((comm.post, "to"), (comm.take, "source")):
            with pytest.raises(ValueError, match="mail needs another worker, and there is only one"):
                call(torch.ones(2), **{key: 0}, tag=0)
        comm.finish_posts()
        return "refused"

    assert lonely_world(body) == ["refused"]


@pytest.mark.parametrize("shape", ["one replica", "one worker each", "part of the world"])
def test_a_grid_has_communicators_of_its_own(divisible_world, shape):
    def body(comm):
        if shape == "part of the world" and comm.size > 1:  # the last worker stays outside
            comm = comm.divide([range(comm.size - 1), [comm.size - 1]])
        n = comm.size
        grid = split(
            comm, replicas=1 if shape == "one replica" else n, shards=n if shape == "one replica" else 1
        )
        totals = [group.sum(torch.tensor(1 << comm.rank)).item() for group in (grid.inner, grid.outer)]
        assert comm.bytes_sent == 0
        return comm.rank, n, totals

    for rank, n, (inner, outer) in divisible_world(body):
        alone, together = 1 << rank, (1 << n) - 1
        assert (inner, outer) == ((together, alone) if shape == "one replica" else (alone, together))
