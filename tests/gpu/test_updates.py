"""The Triton back end on a CUDA device: against the eager one, without waits, in a graph, with its speed.

The last test prints bytes, times and bandwidths (`pytest -s`); its assertions are far from the goals, which
depend on the device: it is there to be read.
"""

import copy
from dataclasses import fields

import pytest
import torch

from hardy.ops import philox, updates_eager
from hardy.ops.factorize import matrix_shape
from hardy.ops.updates import (
    AdamTask,
    FillTask,
    MomentTask,
    Place,
    Rounding,
    ScaleTask,
    SketchTask,
    SweepTask,
)

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16, FP32 = torch.bfloat16, torch.float32
WRITTEN = ("param", "exp_avg", "exp_avg_sq", "sketch", "squares", "before", "after", "sums")
SHAPES = [(512, 512), (768, 2048), (2048, 776), (512, 517), (64, 2100), (333, 517), (1, 4099), (4099, 1)]
DTYPES = [(FP32, FP32, "nearest"), (BF16, BF16, "stochastic"), (BF16, FP32, "kahan"), (FP32, BF16, "nearest")]


def triton_back_end():
    from hardy.ops import updates_triton

    return updates_triton


def draw(*shape, seed, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def how(param, mode, place=None):
    place = place or Place(base=0, stride=param.shape[1])
    rest = torch.zeros_like(param) if mode == "kahan" else None
    return Rounding(
        mode=mode, key=(1 << 63) + 9, step=torch.tensor(3.0, device="cuda"), place=place, rest=rest
    )


def pair(shape, dtypes):
    return draw(*shape, seed=0, dtype=dtypes[0]), draw(*shape, seed=1, dtype=dtypes[1])


def adam_task(shape, dtypes):
    param, grad = pair(shape, dtypes)
    return AdamTask(
        param=param,
        grad=grad,
        exp_avg=draw(*shape, seed=2),
        exp_avg_sq=draw(*shape, seed=3).square(),
        coefficients=torch.tensor([1, 0.9, 0.99, 0.02, 1.3, 1e-8, 0.98, 0.1, 0.5], device="cuda"),
        rounding=how(param, dtypes[2]),
    )


def scale_task(shape, dtypes):
    param, grad = pair(shape, dtypes)
    along = "rows" if shape[0] >= shape[1] else "cols"
    factor = draw(max(shape), seed=2).abs()
    keep = torch.tensor([0.98], device="cuda")
    return ScaleTask(
        param=param, grad=grad, factor=factor, along=along, keep=keep, rounding=how(param, dtypes[2])
    )


def sketch_task(shape, dtypes, rank=1):
    grad, tall = pair(shape, dtypes)[1], shape[0] >= shape[1]
    return SketchTask(
        grad=grad,
        projection_KR=draw(min(shape), rank, seed=2).bfloat16().float(),
        contracts="cols" if tall else "rows",
        sketch=torch.full((shape[0], rank) if tall else (rank, shape[1]), 7.0, device="cuda"),
        squares=torch.full((max(shape),), 7.0, device="cuda"),
    )


def moment_task(shape, dtypes, rank=16):
    tall = shape[0] >= shape[1]
    sketched = (shape[0], rank) if tall else (rank, shape[1])
    return MomentTask(
        sketch=draw(*sketched, seed=0),
        exp_avg=draw(*sketched, seed=1),
        exp_avg_sq=draw(*sketched, seed=2).square(),
        channels="rows" if tall else "cols",
        coefficients=torch.tensor([1, 0.9, 0.99, 1e-6, 0.25], device="cuda"),
        before=torch.full((max(shape),), 7.0, device="cuda"),
        after=torch.full((max(shape),), 7.0, device="cuda"),
    )


def sweep_task(shape, dtypes, signs="packed", place=None, numel=None):
    param, grad = pair(shape, dtypes)
    height, width = matrix_shape(numel or param.numel())
    place = place or Place(base=0, stride=shape[1])
    momentum, cols = signs != "none", -(-shape[1] // 8) if signs == "packed" else shape[1]
    most = 256 if signs == "packed" else 2
    sign = torch.randint(
        most, (shape[0], cols), generator=torch.Generator().manual_seed(4), dtype=torch.uint8
    )
    if signs == "packed" and shape[1] % 8:
        sign[:, -1] &= (1 << shape[1] % 8) - 1
    return SweepTask(
        param=param,
        grad=grad,
        row_m=draw(height, seed=5).abs() if momentum else None,
        col_m=draw(width, seed=6).abs() if momentum else None,
        row_v=draw(height, seed=7).abs(),
        col_v=draw(width, seed=8).abs(),
        sign=sign.cuda() if momentum else None,
        packed=signs == "packed",
        coefficients=torch.tensor([1, 0.8, 0.95, 0.01, 0.99, 0.01, 1e-8, 0.5, 5.0], device="cuda"),
        skip_zeros=True,
        place=place,
        sums=torch.full(((1 + momentum) * (height + width) + 1,), 7.0, device="cuda"),
        rounding=how(param, dtypes[2], place),
    )


MAKERS = {
    "adam": adam_task,
    "scale": scale_task,
    "sketch": sketch_task,
    "moments": moment_task,
    "sweep": sweep_task,
}


def check_alike(task, other, *, relative=1e-6):
    """Both back ends round in fp32; bf16 weights may differ where that moves them over an edge."""
    for name in WRITTEN:
        ours, wanted = getattr(task, name, None), getattr(other, name, None)
        if ours is None:
            continue
        if ours.dtype == BF16:
            assert (ours != wanted).double().mean() < 2e-3, name
            assert (ours.double() - wanted.double()).abs().max() <= 2.0**-7 * wanted.double().abs().max(), (
                name
            )
        else:
            lost = (ours.double() - wanted.double()).abs()
            assert (lost / (wanted.double().abs() + wanted.double().abs().mean())).max() < relative, name
    if getattr(task, "sign", None) is not None:
        assert (task.sign != other.sign).double().mean() < 1e-4


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("sweep", MAKERS)
def test_parity_with_the_eager_back_end(sweep, dtypes):
    tasks = [MAKERS[sweep](shape, dtypes) for shape in [*SHAPES, SHAPES[0]]]
    others = copy.deepcopy(tasks)
    getattr(triton_back_end(), sweep)(tasks)
    getattr(updates_eager, sweep)(others)
    for task, other in zip(tasks, others, strict=True):
        check_alike(task, other, relative=3e-6 if sweep in ("sketch", "sweep") else 1e-6)


@pytest.mark.parametrize("rank", [2, 24, 256])
@pytest.mark.parametrize(
    ("dtypes", "projection"), [(DTYPES[0], FP32), (DTYPES[1], FP32), (DTYPES[1], BF16)], ids=str
)
@pytest.mark.parametrize("shape", [(1024, 520), (520, 1024), (520, 1021)], ids=str)
def test_sketches_by_tensor_cores_keep_fp32(shape, dtypes, projection, rank):
    task = sketch_task(shape, dtypes, rank)
    naive, exact = copy.deepcopy(task), copy.deepcopy(task)
    task.projection_KR = task.projection_KR.to(projection)
    for name in ("sketch", "squares", "projection_KR", "grad"):
        setattr(exact, name, getattr(exact, name).double())
    triton_back_end().sketch([task])
    updates_eager.sketch([naive])
    updates_eager.sketch([exact])
    for name in ("sketch", "squares"):
        ours, right = getattr(task, name).double(), getattr(exact, name)
        lost_by_naive = (getattr(naive, name).double() - right).abs().max()
        assert (ours - right).abs().max() <= 4 * lost_by_naive + 1e-6 * right.abs().max(), name


@pytest.mark.parametrize("signs", ["packed", "bytes", "none"])
@pytest.mark.parametrize(
    ("shape", "place", "numel"),
    [
        ((100, 512), Place(base=512 * 37, stride=512), 512 * 512),
        ((512, 128), Place(base=128, stride=512), 512 * 512),
        ((61, 77), Place(base=13, stride=333), 333 * 200),
        ((64, 517), Place(base=517 * 32, stride=517), 512 * 517),
    ],
    ids=["rows", "columns", "odd", "rows of odd length"],
)
def test_parts_of_a_matrix(shape, place, numel, signs):
    task = sweep_task(shape, DTYPES[1], signs, place, numel)
    other = copy.deepcopy(task)
    triton_back_end().sweep([task])
    updates_eager.sweep([other])
    check_alike(task, other, relative=3e-6)


@pytest.mark.parametrize("start", [0, 5])
def test_random_numbers_are_those_of_the_host(start):
    key, count = 0x8D744EE0202F6924, 100_003
    signs, normals = (torch.empty(count, device="cuda") for _ in range(2))
    numbers = {"key": key, "start": start, "epoch": 3, "slice": 1}
    triton_back_end().fill(
        [
            FillTask(out=signs, distribution="rademacher", **numbers),
            FillTask(out=normals, distribution="normal", **numbers),
        ]
    )
    assert torch.equal(signs.cpu(), philox.signs(key, start=start, count=count, third=3, fourth=1))
    wanted = philox.normals(key, start=start, count=count, third=3, fourth=1)
    assert (normals.cpu() - wanted).abs().max() < 1e-6


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("sweep", MAKERS)
def test_nothing_waits_for_the_device(sweep):
    tasks = [MAKERS[sweep](shape, DTYPES[1]) for shape in SHAPES]
    run = getattr(triton_back_end(), sweep)
    run(tasks)
    torch.cuda.synchronize()
    fresh = [MAKERS[sweep](shape, DTYPES[1]) for shape in SHAPES]  # other addresses: a new plan is made too
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(tasks)
        run(fresh)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sweep", MAKERS)
def test_a_graph_does_what_a_call_does_with_gradients_of_its_own(sweep):
    tasks = [MAKERS[sweep](shape, DTYPES[1]) for shape in SHAPES]
    called = copy.deepcopy(tasks)
    run = getattr(triton_back_end(), sweep)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(copy.deepcopy(tasks))  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    sources = [task.grad if hasattr(task, "grad") else task.sketch for task in tasks]
    with torch.cuda.graph(graph):
        # Made while capturing, as backward does: at addresses that no plan knows.
        for task, source in zip(tasks, sources, strict=True):
            setattr(task, "grad" if hasattr(task, "grad") else "sketch", source * 1)
        run(tasks)
    for _ in range(2):
        graph.replay()
        run(called)
    for task, other in zip(tasks, called, strict=True):
        for field in fields(task):
            ours, wanted = getattr(task, field.name), getattr(other, field.name)
            if isinstance(ours, torch.Tensor) and field.name in (*WRITTEN, "sign"):
                assert torch.equal(ours, wanted), field.name


@pytest.mark.parametrize("sweep", ["sketch", "sweep", "adam"])
def test_runs_are_equal_bit_for_bit_and_so_are_tasks_one_by_one(sweep):
    tasks = [MAKERS[sweep]((1024, 1536), DTYPES[1]) for _ in range(5)]
    alone = copy.deepcopy(tasks)
    run = getattr(triton_back_end(), sweep)
    run(tasks)
    for task in alone:
        run([task])
    for task, other in zip(tasks, alone, strict=True):
        same = [name for name in WRITTEN if getattr(task, name, None) is not None]
        assert all(torch.equal(getattr(task, name), getattr(other, name)) for name in same)


@pytest.mark.parametrize("sweep", MAKERS)
def test_temporaries_stay_below_64_mib(sweep):
    tasks = [MAKERS[sweep]((4096, 4096), DTYPES[1]) for _ in range(4)]
    run = getattr(triton_back_end(), sweep)
    run(tasks)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(tasks)
    assert torch.cuda.max_memory_allocated() - before <= 64 << 20


def bytes_of(sweep, tasks):
    """Bytes that a sweep must move: weights twice, gradients once, state twice, signs twice."""
    total = 0
    for task in tasks:
        total += task.grad.nbytes if hasattr(task, "grad") else task.sketch.nbytes
        for name in ("param", "exp_avg", "exp_avg_sq", "sign"):
            held = getattr(task, name, None)
            total += 0 if held is None else 2 * held.nbytes
        total += task.sketch.nbytes + task.projection_KR.nbytes if sweep == "sketch" else 0
    return total


def median_ms(run, *, repeats=20):
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


@pytest.mark.slow
def test_speed_is_printed():
    shape, count = (4096, 4096), 16
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    peak = 2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e6
    params = [draw(*shape, seed=0, dtype=BF16).requires_grad_() for _ in range(count)]
    for param in params:
        param.grad = torch.randn_like(param)
    fused = torch.optim.AdamW(params, fused=True)
    fused_ms = median_ms(fused.step)
    print(f"\ncopy {peak:.0f} GB/s; torch fused AdamW, bf16 state: {fused_ms:.3f} ms for {count} of {shape}")
    cases = [("sketch", {}), ("sketch", {"rank": 256}), ("scale", {}), ("adam", {}), ("sweep", {})]
    slowest = 0.0
    for sweep, more in cases:
        tasks = [MAKERS[sweep](shape, DTYPES[1], **more) for _ in range(count)]
        run = getattr(triton_back_end(), sweep)
        ms, moved = median_ms(lambda run=run, tasks=tasks: run(tasks)), bytes_of(sweep, tasks)
        rate = moved / ms / 1e6
        per_weight = moved / (count * shape[0] * shape[1])
        print(
            f"{sweep:8} {more!s:14} {ms:7.3f} ms  {per_weight:6.2f} B/weight  {rate:6.0f} GB/s = "
            f"{rate / peak:4.0%} of a copy  {ms / fused_ms:5.2f} of fused AdamW"
        )
        slowest = max(slowest, ms / fused_ms)
    assert slowest < 10
