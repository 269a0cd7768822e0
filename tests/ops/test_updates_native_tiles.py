"""APOLLO's sketch by tile instructions (AMX): as exact as fp32, and the same bits however the work is cut."""

import os
import signal

import pytest
import torch

from hardy.ops import native_ops, updates_native
from hardy.ops.updates import SketchTask

pytestmark = pytest.mark.skipif(
    not native_ops.has_tiles(), reason="needs a processor, a system and a compiler with AMX"
)

NAN = float("nan")
FP32, BF16 = torch.float32, torch.bfloat16
AXES = pytest.mark.parametrize("contracts", ["rows", "cols"])


def draw(*shape, seed, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def task_of(grad, projection, contracts):
    channels, rank = grad.shape[1 if contracts == "rows" else 0], projection.shape[1]
    return SketchTask(
        grad=grad,
        projection_KR=projection,
        contracts=contracts,
        sketch=torch.full((rank, channels) if contracts == "rows" else (channels, rank), NAN),
        squares=torch.full((channels,), NAN),
    )


def swept(grad, projection, contracts, *, threads=1):
    """The sketch, a row for each channel, and the squares."""
    task = task_of(grad, projection, contracts)
    torch.set_num_threads(threads)
    updates_native.sketch([task])
    torch.set_num_threads(1)
    return task.sketch.T if contracts == "rows" else task.sketch, task.squares


def channels_first(grad, contracts):
    return grad.T if contracts == "rows" else grad


def against_torch(shape, rank, dtypes, contracts, within_budget):
    """Compare a sketch and squares with fp64; they may lose what torch's product in fp32 does."""
    grad = channels_first(draw(*shape, seed=1, dtype=dtypes[0]), contracts).contiguous()
    projection = draw(shape[1], rank, seed=2, dtype=dtypes[1]).float()
    sketch, squares = swept(grad, projection, contracts)
    wide = channels_first(grad, contracts)
    within_budget(sketch, wide.float() @ projection, wide.double() @ projection.double(), factor=1.0)
    assert torch.allclose(squares.double(), wide.double().square().sum(1), rtol=1e-6)


@AXES
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (FP32, BF16), (BF16, FP32), (BF16, BF16)], ids=str)
@pytest.mark.parametrize(("shape", "rank"), [((500, 1101), 40), ((1101, 300), 17)], ids=str)
def test_sums_over_many_tiles_lose_no_more_than_torchs_product(shape, rank, dtypes, contracts, within_budget):
    """Tiles at every edge, several blocks along each axis."""
    against_torch(shape, rank, dtypes, contracts, within_budget)


@AXES
def test_a_projection_too_large_to_be_held_at_once(contracts, within_budget):
    """At rank 2048 it is held in bands of 2048 rows."""
    against_torch((70, 2100), 2048, (FP32, FP32), contracts, within_budget)


@AXES
@pytest.mark.parametrize("scale", [1.0, 2.0**-80, 2.0**100])
def test_each_product_is_as_exact_as_fp32(scale, contracts):
    """One number in each channel: a sum of one product. Without any one of the six pieces this fails."""
    grad = torch.zeros(64, 96)
    values = (1 + torch.rand(64, generator=torch.Generator().manual_seed(1))) * scale
    where = torch.arange(64) * 3 // 2
    grad[torch.arange(64), where] = values
    projection = draw(96, 48, seed=2)
    sketch, _ = swept(channels_first(grad, contracts).contiguous(), projection, contracts)
    exact = values.double()[:, None] * projection[where].double()
    assert ((sketch - exact) / exact).abs().max() < 1.5 * 2**-23


@AXES
@pytest.mark.parametrize("bits", [0x7F800000, 0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF, 0x7F7FFFFF], ids=hex)
def test_what_is_not_finite_stays_so_and_in_its_channel(bits, contracts):
    """Infinity, NaNs of all payloads, and the largest number, whose square is infinite."""
    grad, projection = draw(100, 70, seed=1), draw(70, 20, seed=2)
    wanted, squares = swept(channels_first(grad, contracts).contiguous(), projection, contracts)
    grad[37, 41:42] = torch.tensor([bits], dtype=torch.int32).view(FP32)
    sketch, other = swept(channels_first(grad, contracts).contiguous(), projection, contracts)
    rest = torch.arange(100) != 37
    assert torch.equal(sketch[rest], wanted[rest]) and torch.equal(other[rest], squares[rest])
    assert not other[37].isfinite()
    assert not sketch[37].isfinite().any()


@AXES
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_threads_and_shards_of_channels_change_no_bit(dtype, contracts):
    """World-size invariance where channels are sharded, and on any number of threads."""
    shape = (1900, 300)
    grad = channels_first(draw(*shape, seed=1, dtype=dtype), contracts).contiguous()
    projection = draw(300, 48, seed=2)
    sketch, squares = swept(grad, projection, contracts)
    for threads in (2, 3):
        again = swept(grad, projection, contracts, threads=threads)
        assert torch.equal(again[0], sketch) and torch.equal(again[1], squares)
    part = slice(333, 1501)
    shard = grad[:, part] if contracts == "rows" else grad[part]
    again = swept(shard, projection, contracts)
    assert torch.equal(again[0], sketch[part]) and torch.equal(again[1], squares[part])


@AXES
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_nothing_around_a_tensor_is_read(dtype, contracts):
    grad = channels_first(draw(70, 85, seed=1, dtype=dtype), contracts).contiguous()
    projection, rows, cols = draw(85, 20, seed=2), *grad.shape
    around = torch.full((rows + 80, cols + 80), NAN, dtype=dtype)
    longer = torch.full((85 + 80, 20), NAN)
    inner = around[40 : 40 + rows, 40 : 40 + cols]
    inner.copy_(grad)
    longer[:85].copy_(projection)
    wanted = swept(grad, projection, contracts)
    again = swept(inner, longer[:85], contracts)
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_tiles_too():
    grad, projection = draw(600, 300, seed=1), draw(300, 48, seed=2)
    wanted, _ = swept(grad, projection, "cols", threads=2)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends the child, should it hang
        same = False
        try:
            same = torch.equal(swept(grad, projection, "cols", threads=2)[0], wanted)
        finally:
            os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_tasks_of_all_kinds_in_one_call():
    """Ranks below 8 and gradients without elements go other ways."""
    tasks = [
        task_of(draw(rows, 40, seed=1), draw(40, rank, seed=2), "cols")
        for rows, rank in ((30, 2), (50, 16), (0, 16), (20, 9))
    ]
    updates_native.sketch(tasks)
    for task in tasks:
        assert torch.allclose(task.sketch, task.grad @ task.projection_KR, atol=1e-4)
